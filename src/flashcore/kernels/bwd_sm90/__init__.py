"""The backward kernels for Hopper: their text, plan and parameters."""
