"""What a loss is made of, from its jaxpr: layers, their inputs, their cost."""
