"""A planted bug is a text replacement that codegen makes in a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Plant:
    """A plant is a bug as a text replacement.

    Args:
        name: as `--plant` takes it.
        title: the mistake, in a few words.
        file: kernel file below kernels/.
        find: text that occurs in it exactly once.
        replace: what stands there instead.
            It has as many lines as `find`, so that reports name the kernel's own lines.
        caught_by: kind of the alarm that must be raised, or "wrong-result" when only the comparison
            with the oracle can tell.
        or_by: kinds that are raised first under some schedules.
        extra_smem_bytes: shared memory behind the kernel's own (from byte SMEM_BYTES on) that the
            planted code uses.
        plan: fields of the plan without which the bug has no effect.
    """

    name: str
    title: str
    file: str
    find: str
    replace: str
    caught_by: str
    or_by: tuple[str, ...] = ()
    extra_smem_bytes: int = 0
    plan: Mapping[str, Any] = field(default_factory=dict, hash=False)


def by_name(*plants: Plant) -> dict[str, Plant]:
    """Return plants by the name that `--plant` takes."""
    return {plant.name: plant for plant in plants}
