"""This package says which backend serves a call, and how a kernel, the simulator or PyTorch runs
it."""
