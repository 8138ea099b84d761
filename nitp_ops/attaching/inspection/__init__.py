"""What `attach` reads off a Hugging Face model: its head, its blocks, what it does to the logits,
its loss."""
