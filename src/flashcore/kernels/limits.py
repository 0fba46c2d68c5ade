"""Say how much shared memory each architecture has."""

from __future__ import annotations

# Largest dynamic shared memory of one block, and all shared memory of one SM, in bytes (CUDA C++
# Programming Guide, "Technical Specifications per Compute Capability").
_SMEM_BYTES = {
    75: (65536, 65536),
    80: (166912, 167936),
    86: (101376, 102400),
    87: (166912, 167936),
    89: (101376, 102400),
    90: (232448, 233472),
    100: (232448, 233472),
    103: (232448, 233472),
    110: (232448, 233472),
    120: (101376, 102400),
    121: (101376, 102400),
}
KNOWN_ARCHS = tuple(_SMEM_BYTES)  # others are planned for as well, see `smem_limits`
_RESERVED_BYTES_PER_BLOCK = 1024  # what the system takes of an SM's for each block (same source)


def smem_limits(arch: int) -> tuple[int, int]:
    """Return the bytes of shared memory of one block at most, and of one SM. An architecture that
    is not listed counts as the smallest of its generation."""
    if arch in _SMEM_BYTES:
        return _SMEM_BYTES[arch]
    family = [limits for known, limits in _SMEM_BYTES.items() if known // 10 == arch // 10]
    return min(family, default=_SMEM_BYTES[89])


def blocks_that_fit(smem_bytes: int, arch: int) -> int:
    """Return how many blocks of `smem_bytes` each fit into the shared memory of an SM."""
    return smem_limits(arch)[1] // (smem_bytes + _RESERVED_BYTES_PER_BLOCK)
