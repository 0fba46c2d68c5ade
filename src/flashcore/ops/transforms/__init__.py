"""This package holds what torch's transforms need of the operators: gradients, vmap."""
