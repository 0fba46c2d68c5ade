"""This package holds the forward kernel for Hopper: its text, plan, tiles and parameters."""
