"""Find out what this machine is: GPU, driver, package versions. Used by doctor and written into
benchmarks."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from flashcore import __version__

# Distributions whose version decides what can be compiled and launched.
_PACKAGES = (
    "torch",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-cuda-nvrtc-cu13",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)


def now() -> str:
    """Return the date and time of a measurement: UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A Gpu describes one GPU. `arch` is 90 for sm_90; sizes in bytes; power in watts, clocks in
    MHz."""

    name: str
    arch: int
    num_sms: int
    memory_bytes: int
    driver: str | None
    power_limit_w: float | None
    max_sm_clock_mhz: float | None


def gpu(index: int = 0) -> Gpu | None:
    """Return the GPU that torch would use, or None."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(index)
    driver, power, clock = _nvidia_smi(index)
    return Gpu(
        properties.name,
        properties.major * 10 + properties.minor,
        properties.multi_processor_count,
        properties.total_memory,
        driver,
        power,
        clock,
    )


def _nvidia_smi(index: int) -> tuple[str | None, float | None, float | None]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, None, None
    query = "--query-gpu=driver_version,power.limit,clocks.max.sm"
    command = [tool, f"--id={index}", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        driver, power, clock = (part.strip() for part in done.stdout.strip().split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None, None, None
    return driver, _number(power), _number(clock)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]" on virtual GPUs
        return None


def cpu_name() -> str:
    """Return the CPU's model name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {available_cores()} cores"


def available_cores() -> int:
    """Return cores this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def install_command() -> str:
    """Return the command that installs what compiles and launches kernels, for torch's CUDA. It
    names the packages themselves and not an extra of flashcore: on a package index the name
    `flashcore` is another project's."""
    if (torch.version.cuda or "").startswith("12."):
        return 'pip install cuda-core "cuda-bindings<13" nvidia-cuda-nvrtc-cu12'
    return "pip install cuda-core cuda-bindings nvidia-cuda-nvrtc"


def package_version(name: str) -> str | None:
    """Return version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return versions of Python and of the installed packages that matter here."""
    found = {"flashcore": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        version = package_version(name)
        if version is not None:
            found[name] = version
    if torch.version.cuda is not None:
        found["torch CUDA"] = torch.version.cuda
    return found
