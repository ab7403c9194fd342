"""MusicLM, and the project folder of a trained MusicLM."""
