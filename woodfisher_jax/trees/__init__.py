"""Pytrees as paths, flat vectors and blocks, and back; masks; batches of samples."""
