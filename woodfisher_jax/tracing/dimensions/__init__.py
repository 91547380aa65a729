"""The dimensions that the axes of a program's arrays are made of, by its products."""
