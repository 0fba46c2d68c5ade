"""Turn source text into a compiled kernel, through the caches; compile/compiler.py does the
compiling.

Looked for in this order: this process, the bundle that FLASHCORE_BUNDLE names, the on-disk cache,
the compiler. The key is a hash of the flattened source and the options, so a changed header, tile
or flag is another key and nothing can be stale. The files on disk are base/store.py's; processes
that want the same kernel wait for the one that compiles it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import asdict, dataclass

from flashcore.base import env, store
from flashcore.compile import bundle
from flashcore.compile.codegen import PROBE, generate_probe_source, generate_source
from flashcore.compile.compiler import OPTIONS, CompiledKernel, compile_uncached, nvrtc_version
from flashcore.errors import BackendUnavailableError, notice_once
from flashcore.kernels.fwd_wmma.plan import Plan

KIND = "kernels"  # their folder in the cache; below it one for each version of NVRTC


@dataclass(frozen=True, slots=True)
class Resources:
    """Say what one configuration costs a GPU; see `flashcore resources`."""

    kernel: str
    arch: str
    head_dim: int
    dtype: str
    registers: int
    smem_bytes: int
    spill_bytes: int
    code_bytes: int
    remarks: tuple[str, ...] = ()


def cache_key(source: str, arch: int, arch_suffix: str = "") -> str:
    """Name of a kernel in the cache and in bundles."""
    text = "\0".join((source, f"sm_{arch}{arch_suffix}", *OPTIONS))
    return hashlib.sha256(text.encode()).hexdigest()


def pack(kernel: CompiledKernel) -> bytes:
    """Return a kernel as the bytes of a cache entry."""
    fields = asdict(kernel)
    code = fields.pop("code")
    return json.dumps(fields).encode() + b"\n" + code


def unpack(entry: bytes) -> CompiledKernel | None:
    """Return the kernel of a cache entry, or None where another version wrote it."""
    head, _, code = entry.partition(b"\n")
    try:
        fields = json.loads(head)
        remarks = tuple(fields.pop("remarks"))
        return CompiledKernel(code=code, remarks=remarks, **fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _folders_of_versions() -> list[str]:
    """Return where kernels may lie in the cache: those of this NVRTC, or, without one, of any, the
    newest first, as a kernel that is there needs no compiler."""
    try:
        return [f"nvrtc-{'.'.join(map(str, nvrtc_version()))}"]
    except BackendUnavailableError:
        found = {
            path.name for folder in store.folders() for path in (folder / KIND).glob("nvrtc-*")
        }
        return sorted(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])[::-1]


def _read_cached(key: str) -> CompiledKernel | None:
    for version in _folders_of_versions():
        entry = store.find(f"{KIND}/{version}", f"{key}.bin")
        if entry is not None:
            return unpack(entry)
    return None


def _compile_and_keep(
    key: str, source: str, arch: int, kernel_name: str, arch_suffix: str
) -> CompiledKernel:
    with store.lock(key):
        kernel = _read_cached(key)  # another process may have had the lock
        if kernel is None:
            kernel = compile_uncached(source, arch, kernel_name, arch_suffix)
            (version,) = _folders_of_versions()
            store.keep(f"{KIND}/{version}", f"{key}.bin", pack(kernel))
    return kernel


@functools.lru_cache(maxsize=4096)
def compile_source(
    source: str, arch: int, kernel_name: str, arch_suffix: str = "", label: str = ""
) -> CompiledKernel:
    """Compile one translation unit, or find it compiled.

    Args:
        source: flattened source text (see codegen.flatten).
        arch: architecture, 90 for sm_90.
        kernel_name: the entry point in it.
        arch_suffix: "a" for the architecture-specific instructions of sm_90a.
        label: what the kernel is, for people; by default its name and architecture.

    Returns:
        The compiled kernel.

    Raises:
        BackendUnavailableError: cuda-core or NVRTC is missing and nothing compiled was found; or
            the bundle cannot be read.
        CompileError: the compiler rejects the source; the message holds its log.
    """
    key = cache_key(source, arch, arch_suffix)
    path = env.bundle()
    entry = None if path is None else bundle.read(path, key)
    kernel = None if entry is None else unpack(entry)
    if kernel is None:
        kernel = _read_cached(key)
    if kernel is not None:
        return kernel
    missed = ""
    if path is not None:
        missed = bundle.describe_miss(path, label or f"{kernel_name} sm_{arch}", arch)
    try:
        kernel = _compile_and_keep(key, source, arch, kernel_name, arch_suffix)
    except BackendUnavailableError as error:
        if not missed:
            raise
        raise BackendUnavailableError(f"{missed} It cannot be compiled here: {error}") from error
    if missed:
        notice_once(key, f"{missed} Until then each process without it in its cache compiles it.")
    return kernel


def compile_plan(plan: Plan) -> CompiledKernel:
    """Compile a plan's kernel, or find it compiled. See `compile_source`."""
    source = generate_source(plan)
    return compile_source(source, plan.arch, plan.kernel, plan.arch_suffix, plan.describe())


def compile_probe(dtype: str, arch: int) -> CompiledKernel:
    """Compile the check of an element map, or find it compiled. See `compile_source`."""
    label = f"the check of the {dtype} element map on sm_{arch}"
    return compile_source(generate_probe_source(dtype), arch, PROBE, "", label)


def resources(plan: Plan) -> Resources:
    """Return registers, shared memory, spills and code size of a plan's kernel."""
    kernel = compile_plan(plan)
    return Resources(
        kernel=plan.kernel,
        arch=f"sm_{plan.arch}",
        head_dim=plan.head_dim,
        dtype=plan.dtype,
        registers=kernel.registers,
        smem_bytes=plan.smem_bytes + kernel.static_smem_bytes,
        spill_bytes=kernel.spill_bytes,
        code_bytes=kernel.code_bytes,
        remarks=kernel.remarks,
    )
