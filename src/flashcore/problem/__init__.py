"""This package describes the call that is asked for: its shapes, strides and options; the message
for a wrong argument."""

from __future__ import annotations

from flashcore.problem.bands import widest_band
from flashcore.problem.problem import Causal, Problem, Window, arch_of_device

__all__ = ["Causal", "Problem", "Window", "arch_of_device", "widest_band"]
