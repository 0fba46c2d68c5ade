"""This folder has the kernel that appends new tokens to a cache, and its argument."""
