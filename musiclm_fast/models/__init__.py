"""Upstream's classes: MuLaN and its towers, losses, quantizer and MusicLM."""
