"""This package holds the portable forward kernel: its text, plan and parameters."""
