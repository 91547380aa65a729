"""Formulas of the papers, each for one block: arrays in, arrays out."""
