"""Pure functions: arrays and pytrees in, arrays and NamedTuples out."""
