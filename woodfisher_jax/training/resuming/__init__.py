"""A run's folder and checkpoints, and how a stopped run goes on from them."""
