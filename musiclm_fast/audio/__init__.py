"""Sound: files read and written, rates changed, clips put into batches."""
