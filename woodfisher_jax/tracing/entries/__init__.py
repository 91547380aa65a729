"""The entries of a program's arrays that can only be taken out together."""
