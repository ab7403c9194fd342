"""Data, trainers, metrics and checkpoints."""
