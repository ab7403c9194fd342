"""What MuLaN's towers and AudioLM's stages share."""
