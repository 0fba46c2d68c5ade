"""Planted bugs of the Hopper kernel alone."""
