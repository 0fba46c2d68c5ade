"""`flashcore doctor` says what works on this machine, and what to do about what does not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flashcore import __version__
from flashcore.cli.output import JsonFlag, command, si_bytes, table

_MARK = {"ok": "[green]ok[/]", "absent": "[yellow]absent[/]", "broken": "[red]broken[/]"}


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding is one thing that was looked at. `state` is "ok", "absent" (fine, but something is
    not possible without it) or "broken"; `remedy` says what to do."""

    name: str
    state: str
    detail: str
    remedy: str = ""


def doctor(json_output: JsonFlag = False) -> None:
    """Look at GPU, driver, torch, NVRTC, C++ compiler and cache; say what works.

    It compiles one small kernel for a GPU (no GPU needed) and runs one in the simulator. Exit
    status 1 when something is broken; a machine without a GPU is not broken.

    Example:

        flashcore doctor
    """
    with command(json_output) as out:
        findings: list[Finding] = []
        with out.progress("Examining this machine", total=len(_CHECKS)) as advance:
            for check in _CHECKS:
                findings.extend(_findings(check))
                advance()
        rows = [[f.name, _MARK[f.state], f.detail.replace("[", "\\[")] for f in findings]
        out.print(table("This machine", ["what", "state", "found"], rows))
        for finding in findings:
            if finding.remedy:
                remedy = finding.remedy.replace("[", "\\[")
                out.print(f"[bold]{finding.name}[/]: {remedy}")
        backends = _backends(findings)
        out.print("")
        for name, (works, text) in backends.items():
            out.print(f'backend="{name}" {"[green]works[/]" if works else "[yellow]no[/]"}: {text}')
        document = {
            "findings": findings,
            "backends": {name: works for name, (works, _) in backends.items()},
        }
        out.finish(document, ok=all(finding.state != "broken" for finding in findings))


def _findings(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Return what a check finds; that it fails is a finding too, and keeps nobody from the
    others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say what the findings say
            yield from check()
    except Exception as error:
        name = check.__name__.strip("_").replace("_", " ")
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        yield Finding(name, "broken", text, "please report this")


def _python() -> Iterator[Finding]:
    import torch

    from flashcore.base import machine

    found = machine.versions()
    yield Finding("flashcore", "ok", found["flashcore"])
    yield Finding("python", "ok", f"{found['python']}, {machine.cpu_name()}")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding("torch", "ok", f"{torch.__version__}, {built}")


def _gpu() -> Iterator[Finding]:
    import torch

    from flashcore.base import machine

    gpu = machine.gpu()
    if gpu is None:
        has_device = Path("/dev/nvidiactl").exists()
        if has_device and torch.version.cuda is None:
            remedy = "there is an NVIDIA device: install a torch built with CUDA"
        elif has_device:
            remedy = "there is an NVIDIA device that torch cannot use: see what nvidia-smi says"
        else:
            remedy = "kernels run in the simulator here; timing them needs a GPU, sm_75 or later"
        yield Finding("GPU", "broken" if has_device else "absent", "torch sees none", remedy)
        return
    detail = (
        f"{gpu.name}, sm_{gpu.arch}, {gpu.num_sms} SMs, {si_bytes(gpu.memory_bytes)}, "
        f"driver {gpu.driver or 'unknown'}"
    )
    if gpu.arch < 75:
        yield Finding("GPU", "broken", detail, "the kernels need sm_75 (Turing) or later")
    else:
        yield Finding("GPU", "ok", detail)


def _nvrtc() -> Iterator[Finding]:
    from flashcore.base import machine
    from flashcore.errors import FlashCoreError

    core = machine.package_version("cuda-core")
    bindings = machine.package_version("cuda-bindings")
    install = machine.install_command()
    if core is None or bindings is None:
        missing = "cuda-core" if core is None else "cuda-bindings"
        yield Finding("cuda-core", "absent", f"{missing} is not installed", install)
        return
    yield Finding("cuda-core", "ok", f"{core}, cuda-bindings {bindings}")
    try:
        from flashcore.compile.compiler import nvrtc_archs, nvrtc_version

        version, archs = nvrtc_version(), nvrtc_archs()
    except FlashCoreError as error:
        yield Finding("NVRTC", "absent", str(error), install)
        return
    detail = f"{'.'.join(map(str, version))}, compiles for sm_{archs[0]} to sm_{archs[-1]}"
    yield Finding("NVRTC", "ok", detail)


def _headers() -> Iterator[Finding]:
    yield Finding("CUDA headers", "ok", "none needed: the kernels include no CUDA header")


def _compile_for_gpu() -> Iterator[Finding]:
    from flashcore.base import machine
    from flashcore.errors import BackendUnavailableError, FlashCoreError
    from flashcore.selection.configurations import configurations

    gpu = machine.gpu()
    arch = 80 if gpu is None else gpu.arch
    try:
        from flashcore.compile.jit import compile_plan
        from flashcore.kernels.fwd_wmma.plan import SUPPORTED_ARCHS

        planned = arch if arch in SUPPORTED_ARCHS else max(a for a in SUPPORTED_ARCHS if a <= arch)
        (first, *_) = configurations(
            archs=[planned], head_dims=[64], dtypes=["float16"], variants=["full"]
        )
        kernel = compile_plan(first.plan)
    except BackendUnavailableError as error:
        yield Finding("compile for GPU", "absent", str(error).splitlines()[0])
    except FlashCoreError as error:
        text = str(error).splitlines()[0]
        yield Finding("compile for GPU", "broken", text, "please report this with the full log")
    else:
        detail = f"{kernel.name} for sm_{planned}: {kernel.registers} registers"
        yield Finding("compile for GPU", "ok", detail)


def _compiler() -> Iterator[Finding]:
    from flashcore.compile.cxx import find_compiler
    from flashcore.errors import FlashCoreError

    try:
        found = find_compiler("the simulator")
    except FlashCoreError as error:
        yield Finding("C++ compiler", "absent", "the simulator needs one", str(error))
        return
    yield Finding("C++ compiler", "ok", str(found))


def _launcher() -> Iterator[Finding]:
    from flashcore.base import env
    from flashcore.launch.launcher import background

    asked = env.launcher()
    name, obstacle = "compiled launcher", background.obstacle()
    if asked == "python":
        yield Finding(name, "ok", f"not used, as {env.LAUNCHER.name}=python")
    elif background.is_built():
        yield Finding(name, "ok", "built: eager calls are made by C++")
    elif obstacle:
        detail = f"{obstacle.splitlines()[0].rstrip(':')}: Python makes the calls"
        remedy = f"{env.LAUNCHER.name}=compiled tries again; without it calls take the host longer"
        yield Finding(name, "absent", detail, remedy)
    else:
        when = "when" if asked == "compiled" else "in the background when"
        yield Finding(name, "ok", f"to be built {when} a process first launches a kernel")


def _run_small(backend: str, device: str, name: str, is_absent: bool) -> Iterator[Finding]:
    """Return whether a small attention is right. Where it cannot run it `is_absent`, as something
    else is, or broken."""
    from flashcore.checks.cases import make_inputs
    from flashcore.errors import BackendUnavailableError, CompileError
    from flashcore.problem.case import Case

    try:
        from flashcore import attention
        from flashcore.checks.accuracy import error_report

        inputs = make_inputs(Case(seqlen_q=70, seqlen_k=70), device)
        out = attention(inputs.q, inputs.k, inputs.v, backend=backend)
        report = error_report(out, inputs.q, inputs.k, inputs.v)
    except BackendUnavailableError as error:
        state = "absent" if is_absent else "broken"
        yield Finding(name, state, str(error).splitlines()[0])
    except CompileError as error:
        lines = str(error).splitlines()
        told = next((line for line in lines[1:] if "error" in line), "".join(lines[1:2]))
        remedy = "please report this with the compiler's version, or set FLASHCORE_CXX to another"
        yield Finding(name, "broken", f"{lines[0]} {told.strip()}", remedy)
    except Exception as error:  # whatever happens, the doctor's answer is "broken"
        text = str(error).splitlines()[0] if str(error) else ""
        yield Finding(name, "broken", f"{type(error).__name__}: {text}", "flashcore isolate")
    else:
        detail = f"a small attention, max error {report.max_error:.1e}"
        remedy = "" if report.ok else "flashcore isolate finds the stage that is wrong"
        yield Finding(name, "ok" if report.ok else "broken", detail, remedy)


def _simulator() -> Iterator[Finding]:
    has_compiler = all(finding.state == "ok" for finding in _compiler())
    yield from _run_small("sim", "cpu", "simulator", is_absent=not has_compiler)


def _kernel_on_gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        yield from _run_small("wmma", "cuda", "kernel on GPU", is_absent=True)


def _cache() -> Iterator[Finding]:
    from flashcore.base import env, store
    from flashcore.base.housekeeping import items

    remedy = f"set {env.CACHE_DIR.name} to a folder that can be written"
    wanted, trouble = env.wanted_cache_dir()
    stand_in = store.folders()[-1]
    if wanted is None:
        text = f"{trouble}; what is compiled is kept in {stand_in}"
        yield Finding("cache", "absent", text, remedy)
        return
    probe = f".doctor-{os.getpid()}"
    try:
        store.write(wanted, "", probe, b"")
        store.remove(wanted / probe)
    except OSError as error:
        if wanted.is_dir() and os.access(wanted, os.R_OK | os.X_OK):
            text = f"{wanted}: read-only; what is not in it is compiled and kept in {stand_in}"
            yield Finding("cache", "ok", text)
            return
        instead = f"what is compiled is kept in {stand_in}"
        if stand_in == wanted:
            instead = "each process compiles anew"
        yield Finding("cache", "broken", f"{wanted}: {error.strerror}; {instead}", remedy)
        return
    found = items()
    size = si_bytes(sum(item.size for item in found))
    text = f"{wanted}: writable, {len(found)} files, {size}"
    if os.statvfs(wanted).f_flag & os.ST_NOEXEC:
        text += f"; mounted noexec, so what a C++ compiler builds is loaded from {stand_in}"
    yield Finding("cache", "ok", text)


def _bundle() -> Iterator[Finding]:
    from flashcore.base import env, machine
    from flashcore.compile import bundle
    from flashcore.errors import FlashCoreError

    path = env.bundle()
    if path is None:
        return
    remedy = f"unset {env.BUNDLE.name}, or write the bundle with `flashcore build`"
    try:
        count, said = bundle.check(path), bundle.about(path)
        size = si_bytes(path.stat().st_size)
    except (FlashCoreError, OSError) as error:
        yield Finding("bundle", "broken", str(error), remedy)
        return
    archs = said.get("archs", [])
    text = f"{path}: {count} kernels, {size}"
    text += f", for {', '.join(f'sm_{arch}' for arch in archs)}" if archs else ""
    gpu, version = machine.gpu(), said.get("flashcore", __version__)
    if version != __version__:
        yield Finding("bundle", "broken", f"{text}, by flashcore {version}", remedy)
    elif gpu is not None and archs and gpu.arch not in archs:
        yield Finding("bundle", "broken", f"{text}; this GPU is sm_{gpu.arch}", remedy)
    else:
        yield Finding("bundle", "ok", text)


def _environment() -> Iterator[Finding]:
    from flashcore.base import env

    for sentence in env.unknown_variables():
        yield Finding("environment", "broken", sentence, "unset it, or set the one that is meant")


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _gpu,
    _nvrtc,
    _headers,
    _compile_for_gpu,
    _kernel_on_gpu,
    _compiler,
    _launcher,
    _simulator,
    _cache,
    _bundle,
    _environment,
)


def _backends(findings: list[Finding]) -> dict[str, tuple[bool, str]]:
    """Return which backends of flashcore.attention work here."""
    state = {finding.name: finding.state for finding in findings}
    works = {name: state.get(name) == "ok" for name in ("kernel on GPU", "simulator")}
    wmma, sim = works.values()
    why_no_sim = "needs a C++ compiler"
    if state.get("C++ compiler") == "ok":
        why_no_sim = "fails: see simulator, above"
    return {
        "wmma": (wmma, "the fused kernel on the GPU" if wmma else "needs a GPU that works"),
        "sim": (sim, "the fused kernel on the CPU, checked for races" if sim else why_no_sim),
        "torch": (True, "PyTorch operations, CPU and GPU"),
    }
