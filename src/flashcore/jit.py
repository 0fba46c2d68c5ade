"""Source text -> compiled kernel, by NVRTC through cuda-core; no GPU and no CUDA header needed.

Looked for in this order: this process, the bundle that FLASHCORE_BUNDLE names, the on-disk cache,
the compiler. The key is a hash of the flattened source and the options, so a changed header, tile
or flag is another key and nothing can be stale. An entry on disk is a checksummed file that is
written under a temporary name and renamed, so processes may race; a corrupt one is a miss.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashcore import env
from flashcore.codegen import generate_source
from flashcore.errors import BackendUnavailableError, CompileError
from flashcore.plan import Plan

_OPTIONS = ("std=c++17", "lineinfo", "ptxas=-v")
_MAGIC = b"flashcore kernel 1\n"


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """Machine code of one kernel.

    Args:
        name: the entry point.
        arch: what it was compiled for, "sm_90".
        code_type: "cubin", or "ptx" where NVRTC is older than the GPU and the driver finishes.
        code: the image.
        registers: of one thread; -1 for PTX.
        static_smem_bytes: shared memory that the code declares besides the dynamic.
        spill_bytes: spilled stores and loads of one thread.
        code_bytes: machine instructions.
    """

    name: str
    arch: str
    code_type: str
    code: bytes
    registers: int
    static_smem_bytes: int
    spill_bytes: int
    code_bytes: int


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


def _import_nvrtc() -> Any:
    try:
        import cuda.core
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise BackendUnavailableError(
            f"compiling a kernel needs cuda-core and cuda-bindings ({error}); "
            'install them: pip install "flashcore[cuda]"'
        ) from error
    return cuda.core, nvrtc


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Version of the NVRTC that would compile. Raises BackendUnavailableError when there is none;
    its message says where NVRTC was looked for."""
    _, nvrtc = _import_nvrtc()
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the loader's own exception types differ between its versions
        raise BackendUnavailableError(
            f"NVRTC was not found; install it: pip install nvidia-cuda-nvrtc. Looked here: {error}"
        ) from error
    if int(status) != 0:
        raise BackendUnavailableError(f"NVRTC does not answer: {status!r}")
    return int(major), int(minor)


@functools.cache
def nvrtc_archs() -> tuple[int, ...]:
    """Architectures that this NVRTC compiles for (90 for sm_90), ascending."""
    nvrtc_version()
    _, nvrtc = _import_nvrtc()
    status, archs = nvrtc.nvrtcGetSupportedArchs()
    if int(status) != 0:
        raise BackendUnavailableError(f"NVRTC does not say what it supports: {status!r}")
    return tuple(sorted(int(arch) for arch in archs))


def _code_bytes(elf: bytes, kernel_name: str) -> int:
    """Size of a kernel's `.text` section in a cubin (ELF64: section header table)."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)

    def section(index: int) -> tuple[int, int, int]:
        name, _, _, _, offset, size = struct.unpack_from("<IIQQQQ", elf, table + index * entry_size)
        return name, offset, size

    _, names_offset, _ = section(names_index)
    wanted = b".text." + kernel_name.encode() + b"\0"
    for index in range(count):
        name, _, size = section(index)
        if elf.startswith(wanted, names_offset + name):
            return size
    raise CompileError(f"the compiled image has no code for {kernel_name}")


def _parse_ptxas_log(log: str) -> tuple[int, int, int]:
    """Registers, static shared memory and spilled bytes in `ptxas -v` output."""
    registers = static_smem = spills = 0
    words = log.replace(",", " ").split()
    for i, word in enumerate(words):
        following = words[i + 1 : i + 4]
        if word == "Used" and following[1:2] == ["registers"]:
            registers = int(following[0])
        elif word.isdigit() and following[:1] == ["bytes"]:
            if following[1:2] == ["smem"]:
                static_smem = int(word)
            elif following[1:2] == ["spill"]:
                spills += int(word)
    return registers, static_smem, spills


def _compile(source: str, arch: int, kernel_name: str) -> CompiledKernel:
    core, _ = _import_nvrtc()
    archs = nvrtc_archs()
    code_type, target = "cubin", f"sm_{arch}"
    if arch not in archs:
        older = [known for known in archs if known < arch]
        if not older:
            raise BackendUnavailableError(
                f"sm_{arch}: NVRTC {'.'.join(map(str, nvrtc_version()))} compiles for "
                f"sm_{archs[0]} to sm_{archs[-1]}; install another: pip install nvidia-cuda-nvrtc"
            )
        code_type, target = "ptx", f"compute_{older[-1]}"
    log = io.StringIO()
    try:
        program = core.Program(
            source,
            "c++",
            core.ProgramOptions(
                name=f"{kernel_name}.cu",
                arch=target,
                std="c++17",
                lineinfo=True,
                ptxas_options=["-v"] if code_type == "cubin" else None,
            ),
        )
        code = bytes(program.compile(code_type, logs=log).code)
    except Exception as error:
        raise CompileError(
            f"{kernel_name} does not compile for {target}:\n{error}\n{log.getvalue()}"
        ) from error
    registers, static_smem, spills = -1, 0, 0
    code_bytes = len(code)
    if code_type == "cubin":
        registers, static_smem, spills = _parse_ptxas_log(log.getvalue().replace("\0", ""))
        code_bytes = _code_bytes(code, kernel_name)
    return CompiledKernel(
        kernel_name, target, code_type, code, registers, static_smem, spills, code_bytes
    )


def cache_key(source: str, arch: int) -> str:
    """Name of a kernel in the cache and in bundles."""
    text = "\0".join((source, f"sm_{arch}", *_OPTIONS))
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
    fields, _, code = body.partition(b"\n")
    return CompiledKernel(code=code, **json.loads(fields))


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
def compile_source(source: str, arch: int, kernel_name: str) -> CompiledKernel:
    """Compiles one translation unit, or finds it compiled.

    Args:
        source: flattened source text (see codegen.flatten).
        arch: architecture, 90 for sm_90.
        kernel_name: the entry point in it.

    Returns:
        The compiled kernel.

    Raises:
        BackendUnavailableError: cuda-core or NVRTC is missing and nothing compiled was found.
        CompileError: the compiler rejects the source; the message holds its log.
    """
    key = cache_key(source, arch)
    kernel = _read_bundled(key)
    if kernel is not None:
        return kernel
    version = ".".join(map(str, nvrtc_version()))
    path = env.cache_dir() / "kernels" / f"nvrtc-{version}" / f"{key}.bin"
    kernel = _read_cached(path)
    if kernel is None:
        kernel = _compile(source, arch, kernel_name)
        _write_cached(path, kernel)
    return kernel


def compile_plan(plan: Plan) -> CompiledKernel:
    """Compiles a plan's kernel, or finds it compiled. See `compile_source`."""
    return compile_source(generate_source(plan), plan.arch, plan.kernel)


def resources(plan: Plan) -> Resources:
    """Registers, shared memory, spills and code size of a plan's kernel."""
    kernel = compile_plan(plan)
    return Resources(
        kernel=plan.kernel,
        arch=kernel.arch,
        head_dim=plan.head_dim,
        dtype=plan.dtype,
        registers=kernel.registers,
        smem_bytes=plan.smem_bytes + kernel.static_smem_bytes,
        spill_bytes=kernel.spill_bytes,
        code_bytes=kernel.code_bytes,
    )


def write_bundle(path: Path, plans: Iterable[Plan]) -> int:
    """Compiles plans into one file for machines where nothing may be compiled.

    Args:
        path: the bundle to write (a zip archive); FLASHCORE_BUNDLE names it there.
        plans: what to compile; duplicates are written once.

    Returns:
        How many kernels the bundle holds.
    """
    entries: dict[str, bytes] = {}
    for plan in plans:
        key = cache_key(generate_source(plan), plan.arch)
        if key not in entries:
            entries[key] = _pack(compile_plan(plan))
    temporary = path.with_name(path.name + ".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as bundle:
        for key, entry in sorted(entries.items()):
            bundle.writestr(key, entry)
    os.replace(temporary, path)
    return len(entries)
