"""Several pruning steps in sequence, each of which depends on the previous ones."""
