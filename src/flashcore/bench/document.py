"""Make the documents that benchmarks write, which say on what and how they were measured."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashcore.base import machine


def command_line() -> str:
    """Return the command as typed, without the folders of absolute paths: they mean nothing
    elsewhere."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    program = Path(sys.argv[0])
    is_script = program.suffix == ".py" and program.parent.name == "scripts"
    return shlex.join(
        [*(("python", f"scripts/{program.name}") if is_script else ("flashcore",)), *words]
    )


def head(kind: str, device: str, method: str) -> dict[str, Any]:
    """Return what every document begins with: its kind, the date, the command as typed, the
    machine and the versions.

    Args:
        kind: what was measured, in a word or two.
        device: "cuda" or "cpu".
        method: how it was measured, for the pages that quote it.
    """
    gpu = machine.gpu() if device == "cuda" else None
    return {
        "schema": 1,
        "kind": kind,
        "date": machine.now(),
        "command": command_line(),
        "device": device,
        "gpu": None if gpu is None else asdict(gpu),
        "cpu": machine.cpu_name(),
        "versions": machine.versions(),
        "method": method,
    }


def write(path: Path | None, document: Mapping[str, Any]) -> None:
    """Write a document, with the folders that it lies in; nothing where `path` is None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
