"""Upstream's names and upstream's models."""
