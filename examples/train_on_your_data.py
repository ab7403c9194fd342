"""Train a MuLaN on a dataset of your own with the log-mel front end.

    python examples/train_on_your_data.py

Any dataset of (clip, caption) rows works. This one makes its sounds: tones, noise and clicks.
"""

import math
import tempfile

import torch
from torch.utils.data import Dataset

from musiclm_fast import AudioSpectrogramTransformer, MuLaN, MuLaNTrainer, TextTransformer

SAMPLE_HZ = 16_000
KINDS = ("a low tone", "a high tone", "white noise", "a train of clicks")


class Sounds(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        generator = torch.Generator().manual_seed(index)
        kind = index % len(KINDS)
        t = torch.arange(SAMPLE_HZ) / SAMPLE_HZ
        jitter = torch.rand(1, generator=generator).item()
        wav = [
            lambda: torch.sin(2 * math.pi * (150 + 50 * jitter) * t),
            lambda: torch.sin(2 * math.pi * (2_000 + 500 * jitter) * t),
            lambda: torch.randn(SAMPLE_HZ, generator=generator),
            lambda: ((t * (20 + 5 * jitter)) % 1 < 0.02).float(),
        ][kind]()
        return 0.3 * wav, KINDS[kind]


torch.manual_seed(0)
mulan = MuLaN(
    AudioSpectrogramTransformer(dim=64, depth=2, heads=2, dim_head=32, front_end="mulan"),
    TextTransformer(dim=64, depth=1, heads=2, dim_head=32),
    dim_latent=32,
)
with tempfile.TemporaryDirectory() as folder:
    trainer = MuLaNTrainer(
        mulan, Sounds(), num_train_steps=30, batch_size=8, lr=1e-3, valid_frac=0,
        results_folder=folder, save_model_every=30,
    )  # fmt: skip
    trainer.train()

mulan.eval()
with torch.no_grad():
    clips = torch.stack([Sounds()[i][0] for i in range(4)])
    similarity = mulan(clips, raw_texts=list(KINDS), return_pairwise_similarities=True)
for kind, row in zip(KINDS, similarity, strict=True):
    print(f"{kind:<18} sounds most like: {KINDS[int(row.argmax())]}")
