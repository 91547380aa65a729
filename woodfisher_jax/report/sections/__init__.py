"""Sections of the page of a run, one module each."""
