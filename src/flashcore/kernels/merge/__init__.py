"""This folder has the kernels that merge two results of attention, and their gradients."""
