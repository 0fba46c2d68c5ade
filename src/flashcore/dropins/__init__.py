"""Drop-ins: torch's SDPA argument for argument, and what flash-attn and Transformers need."""
