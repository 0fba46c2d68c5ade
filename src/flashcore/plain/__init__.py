"""Compute attention by plain operations of torch: forward mode, and derivatives of derivatives."""
