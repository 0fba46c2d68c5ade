"""This package holds the backward kernels for Hopper: their text, plan and parameters."""
