"""Compatibility with upstream: its module names and its models."""
