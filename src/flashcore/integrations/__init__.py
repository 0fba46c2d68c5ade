"""This package puts flashcore inside other libraries; each module here needs the library it is
named after."""

from __future__ import annotations

__all__: list[str] = []
