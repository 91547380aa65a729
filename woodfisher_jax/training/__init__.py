"""A run: its config, the training loop, its checkpoints."""
