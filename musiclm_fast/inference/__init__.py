"""Inference with a trained MuLaN: embeddings of sounds, and search."""
