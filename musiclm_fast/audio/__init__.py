"""Audio: reading, writing, resampling, windows, batches."""
