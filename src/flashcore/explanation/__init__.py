"""This room says how a call would run, and why, without running it: `explain`, `explain_varlen`,
and what `explain_with_kvcache` shares with them."""

from __future__ import annotations

from flashcore.explanation.dense import explain
from flashcore.explanation.found import Explanation

__all__ = ["Explanation", "explain"]
