"""Upstream's documented usage with only the import changed: towers, MuLaN, quantizer.

python examples/joint_embedding.py
"""

import torch

from musiclm_fast import (
    AudioSpectrogramTransformer,
    MuLaN,
    MuLaNEmbedQuantizer,
    TextTransformer,
)

audio_transformer = AudioSpectrogramTransformer(
    dim=512,
    depth=6,
    heads=8,
    dim_head=64,
    spec_n_fft=128,
    spec_win_length=24,
    spec_aug_stretch_factor=0.8,
)
text_transformer = TextTransformer(dim=512, depth=6, heads=8, dim_head=64)
mulan = MuLaN(audio_transformer=audio_transformer, text_transformer=text_transformer)

# A training step: paired clips and texts in, a contrastive loss out.
wavs = torch.randn(2, 1024)
texts = torch.randint(0, 20_000, (2, 256))
loss = mulan(wavs, texts)
loss.backward()
print(f"loss of two random pairs: {loss.item():.3f}")

# Clips and texts as unit vectors in one space.
embeds = mulan.get_audio_latents(wavs)
print("audio latents", tuple(embeds.shape))
print("text latents", tuple(mulan.get_text_latents(texts).shape))

# Quantized latents condition the three stages of AudioLM, each with its own embeddings.
quantizer = MuLaNEmbedQuantizer(
    mulan=mulan,
    conditioning_dims=(1024, 1024, 1024),
    namespaces=("semantic", "coarse", "fine"),
)
conds = quantizer(wavs=wavs, namespace="semantic")
print("conditioning", tuple(conds.shape))
assert conds.shape == (2, 8, 1024)
