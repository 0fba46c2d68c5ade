"""Compile the kernels of calls in parallel, before the calls are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.launch import kernel_call
from flashcore.selection.compiling import Compiler


class _NotedError(Exception):
    """The exception says that a plan was noted in place of being compiled."""


def compile_ahead(calls: Iterable[Callable[[], object]]) -> None:
    """Compile what each call of attention needs, on all cores.

    Args:
        calls: each is made, as far as the place where its kernel would be compiled. One whose
            kernel is loaded already is made to its end.
    """
    plans: dict[Plan, None] = {}

    def note(plan: Plan) -> None:
        plans[plan] = None
        raise _NotedError

    compiles = kernel_call._compile
    setattr(kernel_call, "_compile", note)  # noqa: B010
    try:
        for call in calls:
            try:
                call()
            except _NotedError:
                continue
    finally:
        setattr(kernel_call, "_compile", compiles)  # noqa: B010
    with Compiler() as compiler:
        for _ in compiler(list(plans)):
            pass  # what does not compile says so where it is called
