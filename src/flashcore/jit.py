"""Source text -> compiled kernel, through the caches; compiler.py does the compiling.

Looked for in this order: this process, the bundle that FLASHCORE_BUNDLE names, the on-disk cache,
the compiler. The key is a hash of the flattened source and the options, so a changed header, tile
or flag is another key and nothing can be stale. An entry on disk is a checksummed file that is
written under a temporary name and renamed, so processes may race; a corrupt one is a miss.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from flashcore import env
from flashcore.codegen import PROBE, generate_probe_source, generate_source
from flashcore.compiler import OPTIONS, CompiledKernel, compile_uncached, nvrtc_version
from flashcore.errors import BackendUnavailableError
from flashcore.plan import Plan

_MAGIC = b"flashcore kernel 2\n"


@dataclass(frozen=True, slots=True)
class Resources:
    """What one configuration costs a GPU; see `flashcore resources`."""

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


def _pack(kernel: CompiledKernel) -> bytes:
    fields = asdict(kernel)
    code = fields.pop("code")
    body = json.dumps(fields).encode() + b"\n" + code
    return _MAGIC + hashlib.sha256(body).digest() + body


def _unpack(entry: bytes) -> CompiledKernel | None:
    """The kernel of a cache entry, or None when it is corrupt."""
    body = entry[len(_MAGIC) + 32 :]
    if not entry.startswith(_MAGIC) or hashlib.sha256(body).digest() != entry[len(_MAGIC) :][:32]:
        return None
    head, _, code = body.partition(b"\n")
    fields = json.loads(head)
    remarks = tuple(fields.pop("remarks"))
    return CompiledKernel(code=code, remarks=remarks, **fields)


@functools.cache
def _corrupt_before(path: Path) -> list[Path]:
    return []


def _read_cached(path: Path) -> CompiledKernel | None:
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    kernel = _unpack(entry)
    if kernel is None:
        seen = _corrupt_before(path)
        if seen:
            warnings.warn(
                f"{path} is corrupt again after it was written anew; check the disk, or set "
                "FLASHCORE_CACHE_DIR to another folder",
                RuntimeWarning,
                stacklevel=2,
            )
        seen.append(path)
        path.unlink(missing_ok=True)
    return kernel


def _write_cached(path: Path, kernel: CompiledKernel) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(_pack(kernel))
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"the compiled kernel cannot be cached ({error}); set FLASHCORE_CACHE_DIR to a "
            "writable folder",
            RuntimeWarning,
            stacklevel=2,
        )


@functools.lru_cache(maxsize=4)
def _bundle_entries(path: Path, modified_ns: int) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as bundle:
        return {name: bundle.read(name) for name in bundle.namelist()}


def _read_bundled(key: str) -> CompiledKernel | None:
    path = env.bundle()
    if path is None:
        return None
    try:
        entry = _bundle_entries(path, path.stat().st_mtime_ns).get(key)
    except (OSError, zipfile.BadZipFile) as error:
        raise BackendUnavailableError(
            f"FLASHCORE_BUNDLE={path} cannot be read ({error}); unset it, or build the bundle "
            "anew with `flashcore build`"
        ) from error
    return None if entry is None else _unpack(entry)


@functools.lru_cache(maxsize=4096)
def compile_source(
    source: str, arch: int, kernel_name: str, arch_suffix: str = ""
) -> CompiledKernel:
    """Compiles one translation unit, or finds it compiled.

    Args:
        source: flattened source text (see codegen.flatten).
        arch: architecture, 90 for sm_90.
        kernel_name: the entry point in it.
        arch_suffix: "a" for the architecture-specific instructions of sm_90a.

    Returns:
        The compiled kernel.

    Raises:
        BackendUnavailableError: cuda-core or NVRTC is missing and nothing compiled was found.
        CompileError: the compiler rejects the source; the message holds its log.
    """
    key = cache_key(source, arch, arch_suffix)
    kernel = _read_bundled(key)
    if kernel is not None:
        return kernel
    version = ".".join(map(str, nvrtc_version()))
    path = env.cache_dir() / "kernels" / f"nvrtc-{version}" / f"{key}.bin"
    kernel = _read_cached(path)
    if kernel is None:
        kernel = compile_uncached(source, arch, kernel_name, arch_suffix)
        _write_cached(path, kernel)
    return kernel


def compile_plan(plan: Plan) -> CompiledKernel:
    """Compiles a plan's kernel, or finds it compiled. See `compile_source`."""
    return compile_source(generate_source(plan), plan.arch, plan.kernel, plan.arch_suffix)


def resources(plan: Plan) -> Resources:
    """Registers, shared memory, spills and code size of a plan's kernel."""
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


def write_bundle(path: Path, plans: Iterable[Plan]) -> int:
    """Compiles plans, and what launching them needs, into one file for machines where nothing may
    be compiled.

    Args:
        path: the bundle to write (a zip archive); FLASHCORE_BUNDLE names it there.
        plans: what to compile; duplicates are written once.

    Returns:
        How many kernels the bundle holds, the check of the element map included.
    """
    wanted = {}
    for plan in plans:
        wanted[(generate_source(plan), plan.arch, plan.arch_suffix)] = plan.kernel
        wanted[(generate_probe_source(plan.dtype), plan.arch, "")] = PROBE
    entries = {
        cache_key(source, arch, suffix): _pack(compile_source(source, arch, name, suffix))
        for (source, arch, suffix), name in wanted.items()
    }
    temporary = path.with_name(path.name + ".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as bundle:
        for key, entry in sorted(entries.items()):
            bundle.writestr(key, entry)
    os.replace(temporary, path)
    return len(entries)
