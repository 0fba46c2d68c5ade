"""The forward kernel for Hopper: its text, plan, tiles and parameters."""
