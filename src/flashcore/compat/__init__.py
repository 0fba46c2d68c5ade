"""This package has other libraries' attention functions on flashcore: the same signatures, layouts
and meaning."""

from __future__ import annotations

__all__: list[str] = []
