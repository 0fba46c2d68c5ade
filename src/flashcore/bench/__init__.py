"""Time side by side the attention implementations. `run` does the work, `report` shows it."""

from flashcore.bench.run import run

__all__ = ["run"]
