"""This package holds the kernel of an additive mask's gradient for Hopper, and how masks come to
transposed scores in the kernel of dk and dv."""
