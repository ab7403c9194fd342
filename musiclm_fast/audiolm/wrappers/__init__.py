"""The three stages with tokenizer, codec and conditioner: training loss and generation."""
