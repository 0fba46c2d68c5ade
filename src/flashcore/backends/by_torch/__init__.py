"""Attention by torch's own operators, where they mean the same."""
