"""Planted bugs of the backward kernels for Hopper."""
