"""Describe the steps of a kernel by which `isolate` takes it apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage is one step of the isolation. `gate` is the kernel's debug gate, None for the kernel
    itself; `suspects` is where to look when this stage is the first wrong one."""

    name: str
    gate: str | None
    title: str
    checks: str
    suspects: str
