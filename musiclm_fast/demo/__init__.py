"""The two demos and what they are made of."""
