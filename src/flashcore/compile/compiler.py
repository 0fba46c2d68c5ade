"""Compile by NVRTC through cuda-core: source text becomes machine code and its resource report; no
GPU needed."""

from __future__ import annotations

import functools
import io
import re
import struct
import threading
from dataclasses import dataclass
from typing import Any

from flashcore.base.machine import install_command
from flashcore.errors import BackendUnavailableError, CompileError

# Options that every kernel is compiled with; part of the cache key.
OPTIONS = ("std=c++17", "lineinfo", "ptxas=-v")


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A CompiledKernel holds the machine code of one kernel.

    Args:
        name: the entry point.
        arch: what it was compiled for, "sm_90".
        code_type: "cubin", or "ptx" where NVRTC is older than the GPU and the driver finishes.
        code: the image.
        registers: of one thread; -1 for PTX.
        static_smem_bytes: shared memory that the code declares besides the dynamic.
        spill_bytes: spilled stores and loads of one thread.
        code_bytes: machine instructions.
        remarks: what ptxas said of its own accord, such as that it serialised WGMMA (C7510).
    """

    name: str
    arch: str
    code_type: str
    code: bytes
    registers: int
    static_smem_bytes: int
    spill_bytes: int
    code_bytes: int
    remarks: tuple[str, ...] = ()


# Modules of cuda.core import each other: a second thread may see one that is half there.
_IMPORTING = threading.Lock()


def _import_nvrtc() -> Any:
    try:
        with _IMPORTING:
            import cuda.core
            from cuda.bindings import nvrtc
    except ImportError as error:
        raise BackendUnavailableError(
            f"compiling a kernel needs cuda-core and cuda-bindings ({error}); "
            f"install them: {install_command()}"
        ) from error
    return cuda.core, nvrtc


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Return version of the NVRTC that would compile. Raises BackendUnavailableError when there is
    none; its message says where NVRTC was looked for."""
    _, nvrtc = _import_nvrtc()
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the loader's own exception types differ between its versions
        raise BackendUnavailableError(
            f"NVRTC was not found; install it: {install_command()}. Looked here: {error}"
        ) from error
    if int(status) != 0:
        raise BackendUnavailableError(f"NVRTC does not answer: {status!r}")
    return int(major), int(minor)


@functools.cache
def nvrtc_archs() -> tuple[int, ...]:
    """Return architectures that this NVRTC compiles for (90 for sm_90), ascending."""
    nvrtc_version()
    _, nvrtc = _import_nvrtc()
    status, archs = nvrtc.nvrtcGetSupportedArchs()
    if int(status) != 0:
        raise BackendUnavailableError(f"NVRTC does not say what it supports: {status!r}")
    return tuple(sorted(int(arch) for arch in archs))


def _code_bytes(elf: bytes, kernel_name: str) -> int:
    """Return size of a kernel's `.text` section in a cubin (ELF64: section header table)."""
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
    """Return registers, static shared memory and spilled bytes in `ptxas -v` output."""
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


def _run_nvrtc(
    source: str, target: str, code_type: str, kernel_name: str, *, no_cache: bool = False
) -> tuple[bytes, str]:
    """Return the image and ptxas's report, which is empty when NVRTC had the image in its own
    cache."""
    core, _ = _import_nvrtc()
    log = io.StringIO()
    options = core.ProgramOptions(
        name=f"{kernel_name}.cu",
        arch=target,
        std="c++17",
        lineinfo=True,
        ptxas_options=["-v"] if code_type == "cubin" else None,
        no_cache=no_cache or None,
    )
    try:
        code = bytes(core.Program(source, "c++", options).compile(code_type, logs=log).code)
    except Exception as error:
        raise CompileError(
            f"{kernel_name} does not compile for {target}:\n{error}\n{log.getvalue()}"
        ) from error
    return code, log.getvalue().replace("\0", "")


def compile_uncached(
    source: str, arch: int, kernel_name: str, arch_suffix: str = ""
) -> CompiledKernel:
    """Compile one translation unit.

    Args:
        source: flattened source text.
        arch: architecture, 90 for sm_90. One that NVRTC does not know gets PTX for the newest that
            it does, which the driver compiles.
        kernel_name: the entry point.
        arch_suffix: "a" for the architecture-specific instructions of sm_90a.

    Raises:
        BackendUnavailableError: no NVRTC, or one that is too new for the architecture.
        CompileError: the compiler rejects the source; the message holds its log.
    """
    archs = nvrtc_archs()
    code_type, target = "cubin", f"sm_{arch}{arch_suffix}"
    if arch not in archs:
        older = [known for known in archs if known < arch]
        if not older:
            raise BackendUnavailableError(
                f"sm_{arch}: NVRTC {'.'.join(map(str, nvrtc_version()))} compiles for "
                f"sm_{archs[0]} to sm_{archs[-1]}; install another: {install_command()}"
            )
        code_type, target = "ptx", f"compute_{older[-1]}"
    code, log = _run_nvrtc(source, target, code_type, kernel_name)
    if code_type == "cubin" and "registers" not in log:
        code, log = _run_nvrtc(source, target, code_type, kernel_name, no_cache=True)
    remarks = tuple(line.strip() for line in log.splitlines() if re.search(r"\(C\d{4}\)", line))
    registers, static_smem, spills = -1, 0, 0
    code_bytes = len(code)
    if code_type == "cubin":
        registers, static_smem, spills = _parse_ptxas_log(log)
        code_bytes = _code_bytes(code, kernel_name)
    return CompiledKernel(
        kernel_name, target, code_type, code, registers, static_smem, spills, code_bytes, remarks
    )
