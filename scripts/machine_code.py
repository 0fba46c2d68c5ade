"""Read machine code as nvdisasm lists it, and say how two kernels' differ. Pure functions."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

SAME_CODE = "same code"
# The instructions of matrix products.
PRODUCTS = ("HGMMA", "HMMA", "IMMA")

_NAMED = 12  # instructions whose numbers are told, of those that changed most
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_CONSTANT = re.compile(r"c\[0x0\]\[0x[0-9a-f]+\]")
_PREDICATE = re.compile(r"^@!?U?P[T\d]+\s+")
_NUMBER = re.compile(r"(?<![\w.])-?0x[0-9a-f]+")
_ALWAYS_LEAVES = re.compile(r"(BRA `|EXIT|BRX|RET)")


@dataclass(frozen=True, slots=True)
class Code:
    """A code is a kernel's machine code.

    Args:
        instructions: as nvdisasm writes them, but a branch names the number of the instruction that
            it goes to.
        waits: what the scheduler is told with each instruction: stalls and barriers.
    """

    instructions: tuple[str, ...]
    waits: tuple[int, ...] = ()

    @property
    def opcodes(self) -> list[str]:
        """Return the instructions' names, with what qualifies them."""
        return [_PREDICATE.sub("", text).split(" ")[0] for text in self.instructions]

    @property
    def names(self) -> list[str]:
        """Return the instructions' names alone."""
        return [opcode.split(".")[0] for opcode in self.opcodes]

    def in_loops(self) -> Counter[str]:
        """Return how many of each instruction run whenever an innermost loop with products goes
        round once: those that no way round avoids, added up over these loops."""
        names = self.names
        edges = [list(self._next(at)) for at in range(len(names))]
        products = {at for at, name in enumerate(names) if name in PRODUCTS}
        loops = _innermost(edges, range(len(names)), products)
        return Counter(names[at] for loop in loops for at in _on_every_way(edges, loop))

    def _next(self, at: int) -> Iterator[int]:
        text = self.instructions[at]
        if not _ALWAYS_LEAVES.match(text) and at + 1 < len(self.instructions):
            yield at + 1
        if "BSSY" not in text:  # it says where threads meet again
            yield from (int(target) for target in re.findall(r"`\((\d+)\)", text))


def read_code(listing: str, text: bytes = b"") -> Code:
    """Return the code that `nvdisasm -c` lists.

    Args:
        listing: what it prints.
        text: the section that it read, for what the scheduler is told; nvdisasm leaves that out.
    """
    instructions: list[str] = []
    place: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            place[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(" ".join(found[1].split()))
    # An instruction has 128 bits; bits 41 to 61 of the upper 64 are the scheduler's.
    waits = tuple(
        struct.unpack_from("<Q", text, at + 8)[0] >> 41 & 0x1FFFFF
        for at in range(0, len(text) // 16 * 16, 16)
    )
    return Code(
        tuple(_TARGET.sub(lambda label: f"`({place[label[1]]})", text) for text in instructions),
        waits,
    )


def difference(base: Code, now: Code) -> tuple[str, str]:
    """Return the kind of difference between two codes, and its details.

    The kinds, from the least: "same code" but for where in the constant bank parameters lie, "other
    waits", "other numbers", "other registers" in the same instructions, "other order" of as many of
    each, "other instructions".
    """

    def alike(change: Callable[[str], str]) -> bool:
        return [change(x) for x in base.instructions] == [change(x) for x in now.instructions]

    if alike(_without_place):
        return (SAME_CODE if base.waits == now.waits else "other waits"), ""
    if alike(lambda text: _NUMBER.sub("number", _without_place(text))):
        changed = sum(
            _without_place(a) != _without_place(b)
            for a, b in zip(base.instructions, now.instructions, strict=True)
        )
        return "other numbers", f"in {changed} of {len(now.instructions)} instructions"
    if base.opcodes == now.opcodes:
        return "other registers", ""
    if Counter(base.opcodes) == Counter(now.opcodes):
        return "other order", ""
    in_all = _changes(Counter(base.names), Counter(now.names))
    in_loops = _changes(base.in_loops(), now.in_loops())
    return "other instructions", f"{in_all}; on every way round products {in_loops}"


def _without_place(text: str) -> str:
    return _CONSTANT.sub("c[parameter]", text)


def _changes(base: Counter[str], now: Counter[str]) -> str:
    """Return how many instructions there were and are, in all and of those that changed most."""
    changed = sorted(
        (name for name in base | now if base[name] != now[name]),
        key=lambda name: (-abs(base[name] - now[name]), name),
    )
    told = [f"{name} {base[name]} -> {now[name]}" for name in changed[:_NAMED]]
    told += ["..."] if len(changed) > _NAMED else []
    return ", ".join([f"{base.total()} -> {now.total()}", *told])


def _innermost(
    edges: Sequence[Sequence[int]], nodes: Collection[int], products: set[int]
) -> list[list[int]]:
    """Return the loops within `nodes` that have products and no smaller loop with products."""
    found: list[list[int]] = []
    for loop in _loops(edges, nodes):
        if products.isdisjoint(loop):
            continue
        # Without the instruction that it begins with, a loop falls apart into those within it.
        found += _innermost(edges, sorted(loop)[1:], products) or [loop]
    return found


def _on_every_way(edges: Sequence[Sequence[int]], loop: Collection[int]) -> list[int]:
    """Return the instructions of a loop without which its first one cannot be reached again."""
    first = min(loop)
    inside = set(loop)
    within = {at: [to for to in edges[at] if to in inside] for at in loop}
    num_ways_to = Counter(to for ahead in within.values() for to in ahead)
    found: list[int] = []
    previous = -1
    for at in sorted(loop):
        follows = num_ways_to[at] == 1 and within.get(previous) == [at]  # as the one before
        if (found[-1:] == [previous]) if follows else not _comes_round(within, first, at):
            found.append(at)
        previous = at
    return found


def _comes_round(within: Mapping[int, Sequence[int]], first: int, without: int) -> bool:
    if first == without:
        return False
    seen: set[int] = set()
    waiting = [to for to in within[first] if to != without]
    while waiting:
        at = waiting.pop()
        if at == first:
            return True
        if at not in seen:
            seen.add(at)
            waiting += [to for to in within[at] if to != without]
    return False


def _loops(edges: Sequence[Sequence[int]], nodes: Collection[int]) -> list[list[int]]:
    """Return the strongly connected components of some nodes (Tarjan) that are loops."""
    inside = set(nodes)
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for root in nodes:
        if root in order:
            continue
        walk = [(root, iter(edges[root]))]
        order[root] = low[root] = len(order)
        stack.append(root)
        on_stack.add(root)
        while walk:
            node, ahead = walk[-1]
            for other in ahead:
                if other not in inside:
                    continue
                if other not in order:
                    order[other] = low[other] = len(order)
                    stack.append(other)
                    on_stack.add(other)
                    walk.append((other, iter(edges[other])))
                    break
                if other in on_stack:
                    low[node] = min(low[node], order[other])
            else:
                walk.pop()
                if walk:
                    low[walk[-1][0]] = min(low[walk[-1][0]], low[node])
                if low[node] == order[node]:
                    at = stack.index(node)
                    component = stack[at:]
                    del stack[at:]
                    on_stack.difference_update(component)
                    if len(component) > 1 or node in edges[node]:
                        found.append(component)
    return found
