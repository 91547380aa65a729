"""A pruning step: its arguments, its programs, and what it reports."""
