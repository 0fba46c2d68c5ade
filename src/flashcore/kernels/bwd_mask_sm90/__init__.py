"""This package holds the kernel of an additive mask's gradient for Hopper."""
