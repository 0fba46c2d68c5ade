"""This folder has what the Hopper kernel does with caches of 8 bits."""
