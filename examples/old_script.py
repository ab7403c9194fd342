"""An old script unchanged: one line makes ``import musiclm_pytorch`` resolve to this package.

python examples/old_script.py
"""

import musiclm_fast; musiclm_fast.install_as_musiclm_pytorch()  # noqa: E702  # fmt: skip

import torch
from musiclm_pytorch import AudioSpectrogramTransformer, MuLaN, TextTransformer

mulan = MuLaN(
    audio_transformer=AudioSpectrogramTransformer(dim=64, depth=2, heads=4, dim_head=16),
    text_transformer=TextTransformer(dim=64, depth=2, heads=4, dim_head=16),
)
loss = mulan(torch.randn(4, 1024), torch.randint(0, 20_000, (4, 32)))
print(type(mulan).__module__, f"loss {loss.item():.3f}")
