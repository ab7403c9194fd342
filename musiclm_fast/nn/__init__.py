"""Modules shared by MuLaN's towers and AudioLM's stages."""
