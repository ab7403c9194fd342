"""A trained MuLaN at work: embeddings of sounds, and search in them."""
