"""Pruning layer after layer, from inputs alone."""
