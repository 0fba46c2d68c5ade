"""This package selects tile configurations: which exist, which ship, which were measured on this
GPU."""
