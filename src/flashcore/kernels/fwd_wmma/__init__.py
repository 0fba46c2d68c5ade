"""The portable forward kernel: its text, plan and parameters."""
