"""Conversions between pytrees, flat vectors and blocks; masks; batches of samples."""
