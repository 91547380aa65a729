"""Layers, their inputs and their cost, read from the jaxpr of a loss."""
