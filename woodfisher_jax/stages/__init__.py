"""Several pruning steps that depend on each other."""
