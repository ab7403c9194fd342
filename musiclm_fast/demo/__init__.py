"""The two demos and their parts."""
