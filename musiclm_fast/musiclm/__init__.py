"""MusicLM, and the folder in which one is made."""
