"""Per-sample gradients: forming, storing and sharding them within a memory limit."""
