"""This package holds what drop-ins are made of: torch's SDPA argument for argument, and what
flash-attn and Transformers need."""
