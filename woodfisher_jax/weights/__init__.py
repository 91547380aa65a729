"""Weight files: PyTorch, safetensors, sparse formats, serving programs."""
