"""A language model pruned in one shot, and measured."""
