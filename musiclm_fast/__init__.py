"""musiclm_fast."""
