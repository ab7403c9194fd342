"""The 128 General MIDI instruments, their names in words, and texts about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instrument:
    """One General MIDI program.

    Args:
        program: 0 to 127.
        name: the General MIDI name in lower case, the label of zero-shot classification.
        synonyms: other ways to say it, used by captions.
        family: one of the sixteen General MIDI families.
    """

    program: int
    name: str
    synonyms: tuple[str, ...]
    family: str


# One line per program: the General MIDI name, then synonyms.
_TABLE: dict[str, str] = {
    "piano": """
        acoustic grand piano / grand piano / concert grand
        bright acoustic piano / bright upright piano / bright piano
        electric grand piano / amplified grand piano / stage piano of the seventies
        honky-tonk piano / detuned saloon piano / barroom piano
        electric piano / rhodes piano / mellow tine piano
        fm electric piano / digital electric piano / dx electric piano
        harpsichord / baroque harpsichord / cembalo
        clavinet / funky clavinet / electric clavichord
    """,
    "chromatic percussion": """
        celesta / celeste / keyboard of steel plates
        glockenspiel / orchestra bells / bright metal bars
        music box / wind-up music box / musical box
        vibraphone / vibes / jazz vibraphone
        marimba / wooden marimba / mellow wooden bars
        xylophone / hard wooden bars / bright xylophone
        tubular bells / orchestral chimes / church chimes
        dulcimer / hammered dulcimer / santur
    """,
    "organ": """
        drawbar organ / hammond organ / tonewheel organ
        percussive organ / organ with percussion / clicky organ
        rock organ / overdriven organ / rotary speaker organ
        church organ / pipe organ / cathedral organ
        reed organ / harmonium / pump organ
        accordion / piano accordion / french accordion
        harmonica / mouth organ / blues harp
        tango accordion / bandoneon / argentine bandoneon
    """,
    "guitar": """
        nylon string guitar / classical guitar / spanish guitar
        steel string guitar / acoustic folk guitar / western guitar
        jazz guitar / hollow body guitar / archtop guitar
        clean electric guitar / undistorted electric guitar / chorus guitar
        muted guitar / palm muted guitar / damped electric guitar
        overdriven guitar / crunchy electric guitar / overdrive guitar
        distortion guitar / heavy metal guitar / fuzzy electric guitar
        guitar harmonics / flageolet guitar tones / guitar overtones
    """,
    "bass": """
        acoustic bass / upright bass / plucked double bass
        fingered bass / electric bass played with fingers / finger bass
        picked bass / electric bass played with a pick / plectrum bass
        fretless bass / singing fretless bass / gliding electric bass
        slap bass / thumb slapped bass / funk slap bass
        popped bass / second slap bass / snapping pop bass
        synth bass / analog synth bass / resonant synthesizer bass
        rubber synth bass / second synth bass / punchy synthesizer bass
    """,
    "strings": """
        violin / solo violin / classical violin
        viola / solo viola / alto fiddle
        cello / violoncello / solo cello
        contrabass / bowed double bass / arco bass
        tremolo strings / trembling strings / tremolo string section
        pizzicato strings / plucked string section / pizzicato
        orchestral harp / concert harp / plucked harp
        timpani / kettle drum / orchestral kettledrums
    """,
    "ensemble": """
        string ensemble / string orchestra / orchestral strings
        slow strings / slow string ensemble / soft swelling strings
        synth strings / synthesizer strings / analog string machine
        second synth strings / warm string synthesizer / dark string machine
        choir aahs / choir singing aah / vocal choir
        voice oohs / voices singing ooh / oohing vocals
        synth voice / synthetic voice / vocoder voice
        orchestra hit / orchestral stab / full orchestra accent
    """,
    "brass": """
        trumpet / solo trumpet / bright trumpet
        trombone / slide trombone / tenor trombone
        tuba / bass tuba / deep tuba
        muted trumpet / trumpet with a mute / harmon mute trumpet
        french horn / orchestral horn / horns
        brass section / brass ensemble / big band brass
        synth brass / synthesizer brass / analog brass
        soft synth brass / second synth brass / mellow synthesizer brass
    """,
    "reed": """
        soprano sax / soprano saxophone / high saxophone
        alto sax / alto saxophone / smooth saxophone
        tenor sax / tenor saxophone / jazz saxophone
        baritone sax / baritone saxophone / bari sax
        oboe / orchestral oboe / double reed oboe
        english horn / cor anglais / alto oboe
        bassoon / fagotto / low double reed
        clarinet / b flat clarinet / single reed clarinet
    """,
    "pipe": """
        piccolo / piccolo flute / small flute
        flute / concert flute / transverse flute
        recorder / wooden recorder / block flute
        pan flute / panpipes / andean pipes
        blown bottle / bottle blow / air over a bottle
        shakuhachi / japanese bamboo flute / breathy bamboo flute
        whistle / human whistle / whistling
        ocarina / clay ocarina / vessel flute
    """,
    "synth lead": """
        square lead / square wave synth / hollow square wave
        sawtooth lead / saw wave synth / buzzing sawtooth wave
        calliope lead / steam calliope / synth calliope
        chiff lead / chiffy synth lead / breathy attack synth
        charang lead / guitar-like synth lead / distorted synth lead
        voice lead / solo vox lead / vocal synth lead
        fifths lead / sawtooth in fifths / parallel fifths synth
        bass and lead / fat bass lead / layered synth lead
    """,
    "synth pad": """
        new age pad / fantasia pad / bell-like pad
        warm pad / soft analog pad / mellow pad
        polysynth pad / poly synth / bright polyphonic synth
        choir pad / space voice pad / airy choir synth
        bowed glass pad / bowed pad / glassy pad
        metallic pad / metal pad / shimmering metal synth
        halo pad / angelic pad / glowing synth halo
        sweep pad / filter sweep pad / slowly opening pad
    """,
    "synth effects": """
        ice rain / rain effect / icy synth rain
        soundtrack / cinematic soundtrack synth / rising fifths pad
        crystal / crystal synth / glassy synth bells
        atmosphere / atmospheric guitar synth / plucked atmosphere
        brightness / bright synth choir / shining synth
        goblins / goblin synth / eerie bubbling synth
        echo drops / echoing synth drops / echoes
        star theme / sci-fi star theme / space synth
    """,
    "ethnic": """
        sitar / indian sitar / buzzing sitar
        banjo / bluegrass banjo / five string banjo
        shamisen / japanese shamisen / japanese lute
        koto / japanese koto / japanese zither
        kalimba / thumb piano / mbira
        bagpipe / scottish bagpipes / highland pipes
        fiddle / country fiddle / folk fiddle
        shanai / shehnai / indian oboe
    """,
    "percussive": """
        tinkle bell / tinkling bell / small hand bell
        agogo / agogo bells / brazilian cowbell
        steel drums / steel pan / caribbean steelpan
        woodblock / wood block / hollow wood knock
        taiko drum / japanese taiko / huge taiko
        melodic tom / tuned tom / tom drum
        synth drum / electronic tom / synthesizer drum
        reverse cymbal / backwards cymbal / reversed crash
    """,
    "sound effects": """
        guitar fret noise / fret squeak / finger squeak on strings
        breath noise / breathing / flute breath
        seashore / ocean waves / surf
        bird tweet / bird song / chirping birds
        telephone ring / ringing telephone / phone bell
        helicopter / helicopter rotor / chopper
        applause / clapping audience / cheering crowd
        gunshot / gun shot / firing gun
    """,
}


def _parse_table() -> tuple[Instrument, ...]:
    rows = [(family, line) for family, text in _TABLE.items() for line in text.split("\n")]
    instruments: list[Instrument] = []
    for family, line in rows:
        if line.strip():
            name, *synonyms = (part.strip() for part in line.split("/"))
            instruments.append(Instrument(len(instruments), name, tuple(synonyms), family))
    return tuple(instruments)


INSTRUMENTS: tuple[Instrument, ...] = _parse_table()


# Captions of the training notes; {name} is the name or a synonym, {a} its article,
# {register} how high it sounds.
TRAIN_TEMPLATES: tuple[str, ...] = (
    "{name}",
    "{a} {name}",
    "the sound of {a} {name}",
    "a recording of {a} {name}",
    "a {register} note on {a} {name}",
    "{name}, {register} register",
    "a single note played by {a} {name}",
    "someone plays the {name}",
)


# Prompts of the evaluation: no training caption has these forms.
PROMPT_TEMPLATES: tuple[str, ...] = (
    "this is {a} {name}",
    "music played with {a} {name}",
    "one hears the {name}",
)


def zero_shot_prompts(
    instruments: Sequence[Instrument], templates: Sequence[str] = PROMPT_TEMPLATES
) -> list[list[str]]:
    """Text prompts of a zero-shot classification, one list of paraphrases per instrument.

    Args:
        instruments: the labels.
        templates: forms with a ``{name}`` field, and ``{a}`` for its article.

    Returns:
        ``prompts[i][j]``: template j filled with the name of instrument i.
    """
    return [[fill(form, item.name) for form in templates] for item in instruments]


def fill(template: str, name: str, register: str = "") -> str:
    """A caption from its template."""
    return template.format(a="an" if name[0] in "aeiou" else "a", name=name, register=register)


def register_of(pitch: int) -> str:
    """How high a MIDI pitch sounds, in a word."""
    return "low" if pitch < 52 else "middle" if pitch < 72 else "high"
