"""Captioned sounds: listed, drawn, split, checked and converted."""
