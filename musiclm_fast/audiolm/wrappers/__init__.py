"""The three stages from sound to loss, and from text to sound."""
