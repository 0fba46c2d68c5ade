"""Every command does what it says, and fails when it should."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import flashcore
from flashcore.base import store
from flashcore.bench.reporting import plotting, report
from flashcore.bench.run import run
from flashcore.bench.timing import Timing, time_on_cpu
from flashcore.bench.workloads import Workload
from flashcore.cli import app, doctor
from flashcore.compile import codegen, jit
from flashcore.kernels.fwd_sm90.plan import Sm90Plan
from flashcore.launch.launcher import build
from flashcore.problem import Problem
from flashcore.selection import configurations as configurations_module
from flashcore.selection.building import append_units
from flashcore.selection.configurations import configurations
from flashcore.selection.select import select_plan

runner = CliRunner()


def invoke(*arguments: str) -> tuple[int, Any]:
    result = runner.invoke(app, [*arguments, "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_demo_agrees_with_the_oracle() -> None:
    status, document = invoke("demo")
    assert status == 0
    ours = [row for row in document["results"] if row["ours"]]
    assert all(row["max_error"] <= row["max_limit"] for row in ours)
    kernel = document["results"][0]
    assert "WMMA" in kernel["name"]
    assert kernel["where"] == ("GPU" if torch.cuda.is_available() else "simulator")


def test_demo_says_that_the_kernel_ran_in_the_simulator() -> None:
    result = runner.invoke(app, ["demo"])
    assert result.exit_code == 0
    assert ("simulator" in result.stdout) == (not torch.cuda.is_available())
    assert "tomatoes" in result.stdout


def test_demo_fails_when_the_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = flashcore.attention

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        options["backend"] = "torch"
        return right(q, k, v * 1.02, **options)

    monkeypatch.setattr(flashcore, "attention", wrong)
    status, document = invoke("demo")
    assert status == 1
    assert not document["results"][0]["ok"]


def test_doctor_finds_what_is_here() -> None:
    status, document = invoke("doctor")
    states = {finding["name"]: finding["state"] for finding in document["findings"]}
    assert status == 0, document
    assert states["GPU"] == ("ok" if torch.cuda.is_available() else "absent")
    assert states["simulator"] == "ok"
    assert document["backends"]["torch"]


def test_doctor_says_what_to_do_without_compiler_and_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("FLASHCORE_CXX", "no-such-compiler")
    monkeypatch.setenv("FLASHCORE_BUNDLE", str(tmp_path / "missing.bundle"))
    jit.compile_source.cache_clear()
    status, document = invoke("doctor")
    findings = {finding["name"]: finding for finding in document["findings"]}
    assert status == 1
    assert findings["cache"]["state"] == "broken"
    assert "FLASHCORE_CACHE_DIR" in findings["cache"]["remedy"]
    assert findings["C++ compiler"]["state"] == "absent"
    assert "no-such-compiler" in findings["C++ compiler"]["remedy"]
    assert findings["simulator"]["state"] == "absent"
    assert findings["compiled launcher"]["state"] == "ok", "not used: Python is asked for"


@pytest.mark.parametrize("asked", ["auto", "python", "compiled"])
def test_doctor_says_who_makes_eager_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str
) -> None:
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASHCORE_LAUNCHER", asked)
    monkeypatch.setattr(build, "check_headers", lambda: None)

    def found() -> tuple[str, str]:
        (finding,) = doctor._launcher()
        return finding.state, finding.detail

    if asked == "python":
        assert found() == ("ok", "not used, as FLASHCORE_LAUNCHER=python")
        return
    how = "in the background " if asked == "auto" else ""
    assert found() == ("ok", f"to be built {how}when a process first launches a kernel")
    store.keep(build.KIND, build.failure_name(), b"g++ does not compile it:\nan error")
    assert found() == ("absent", "g++ does not compile it: Python makes the calls")
    store.keep(build.KIND, build.library_name(), b"a library")
    assert found() == ("ok", "built: eager calls are made by C++")


def test_verify_ends_with_the_count_and_fails_on_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["verify", "--backend", "torch", "--cases", "3", "--seed", "2"]
    good = runner.invoke(app, arguments)
    assert good.exit_code == 0
    assert good.stdout.splitlines()[-1] == "3 passed, 0 failed"

    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(flashcore, "attention", broken)
    bad = runner.invoke(app, arguments)
    assert bad.exit_code == 1
    assert bad.stdout.splitlines()[-1] == "0 passed, 3 failed"
    assert "replay: flashcore verify --backend torch --seed 2 --case 1" in bad.stdout


def test_isolate_names_the_seeds_bug() -> None:
    shape = ["--heads", "1", "--seqlen", "70", "--seqlen-k", "100"]
    result = runner.invoke(app, ["isolate", "--backend", "sim", "--plant", "pv-atomic", *shape])
    assert result.exit_code == 1
    assert "first wrong stage: P@V" in result.stdout
    assert "atomics from several warps" in " ".join(result.stdout.split())
    assert "python -m flashcore.sim" in result.stdout
    status, document = invoke("isolate", "--backend", "sim", "--plant", "pv-atomic", *shape)
    assert (status, document["first_wrong"], document["ok"]) == (1, "pv", False)


@pytest.mark.thorough
def test_isolate_simulates_the_hopper_kernel_where_a_bug_is_planted() -> None:
    arguments = ["isolate", "--backend", "sm90", "--plant", "no-init-fence"]
    status, document = invoke(*arguments)
    assert (status, document["kernel"], document["backend"]) == (1, "attn_fwd_sm90", "sim")
    assert document["first_wrong"] == "setup"
    case = document["case"]
    assert (case["seqlen_q"], case["head_dim"], case["head_dim_v"]) == (300, 96, 96)


@pytest.mark.thorough
def test_resources_are_objects_with_the_agreed_keys() -> None:
    arguments = ["--head-dim", "64", "--arch", "sm_90", "--variant", "full", "--sample"]
    status, rows = invoke("resources", *arguments)
    assert status == 0
    wanted = {"kernel", "arch", "head_dim", "dtype", "registers", "smem_bytes"}
    assert all(wanted | {"spill_bytes", "code_bytes"} <= set(row) for row in rows)
    assert {(row["arch"], row["head_dim"]) for row in rows} == {("sm_90", 64)}
    assert {row["dtype"] for row in rows} == {"float16", "bfloat16"}


@pytest.mark.usefixtures("nothing_ships")  # few enough for one process
@pytest.mark.parametrize(
    ("field", "value"), [("registers", 97), ("smem_bytes", 48 * 1024 + 1), ("spill_bytes", 4)]
)
def test_the_budget_is_enforced(monkeypatch: pytest.MonkeyPatch, field: str, value: int) -> None:
    within = {"registers": 96, "smem_bytes": 48 * 1024, "spill_bytes": 0}
    arguments = ["resources", "--head-dim", "64", "--arch", "sm_90", "--variant", "full", "--check"]

    def pretend(**numbers: int) -> None:
        def resources(plan: Any) -> jit.Resources:
            return jit.Resources(plan.kernel, "sm_90", 64, plan.dtype, code_bytes=1, **numbers)

        monkeypatch.setattr(jit, "resources", resources)

    pretend(**within)
    assert runner.invoke(app, arguments).exit_code == 0
    pretend(**{**within, field: value})
    masked = [word if word != "full" else "masked" for word in arguments]
    assert runner.invoke(app, masked).exit_code == 1
    failed = runner.invoke(app, arguments)
    assert failed.exit_code == 1
    assert "over budget" in failed.stdout


@pytest.mark.usefixtures("nothing_ships")
@pytest.mark.parametrize("kernel", ["sm90", "attn_fwd_sm90"])
def test_a_kernel_has_the_name_of_its_backend(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    compiled = []

    def resources(plan: Any) -> jit.Resources:
        compiled.append(plan.kernel)
        return jit.Resources(plan.kernel, "sm_90", 64, plan.dtype, 96, 1024, 0, 1)

    monkeypatch.setattr(jit, "resources", resources)
    arguments = ["resources", "--head-dim", "64", "--arch", "sm_90", "--variant", "full"]
    assert runner.invoke(app, [*arguments, "--kernel", kernel]).exit_code == 0
    assert set(compiled) == {"attn_fwd_sm90"}


def test_configurations_cover_every_architecture_and_are_distinct() -> None:
    found = configurations(head_dims=(64,))
    plans = [entry.plan for entry in found]
    assert len(set(plans)) == len(plans)
    assert {plan.arch for plan in plans} == {75, 80, 86, 89, 90, 100, 120}
    assert not [plan for plan in plans if plan.arch == 75 and plan.dtype == "bfloat16"]


def test_configurations_hold_whatever_the_hopper_kernels_table_chooses() -> None:
    known = {
        entry.plan
        for entry in configurations(archs=[90], head_dims=[64, 128], dtypes=["float16"])
        if isinstance(entry.plan, Sm90Plan)
    }
    rng = random.Random(0)
    for _ in range(200):
        heads, length = rng.randint(1, 300), int(2 ** rng.uniform(7.5, 14))
        head_dim = rng.choice((64, 128))
        x = torch.empty(1, 2, 256, head_dim, dtype=torch.float16)
        options = rng.choice(({}, {"causal": True}, {"window": (100, 50)}))
        asked = dataclasses.replace(
            Problem.from_tensors(x, x, x, **options),
            batch=heads,
            seqlen_q=length,
            seqlen_k=length,
            **dict.fromkeys(("q_strides", "k_strides", "v_strides"), (9 * head_dim,) * 3),
        )
        plan = select_plan(asked, 90)
        assert isinstance(plan, Sm90Plan)
        assert plan in known, plan.describe()


@pytest.mark.thorough  # several seconds
@pytest.mark.usefixtures("nothing_ships")  # few enough for one process
def test_a_built_bundle_serves_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(configurations_module, "SERVING_VARIANTS", {})
    monkeypatch.setattr(configurations_module, "VARIANTS", {"full": {}})
    monkeypatch.setattr(configurations_module, "_SIZES", ((4, 1024),))  # each has a tile or two
    bundle = tmp_path / "kernels.bundle"
    arguments = ["build", "--arch", "sm_90", "--head-dim", "64", "--dtype", "float16", "-j", "1"]
    status, document = invoke(*arguments, "--output", str(bundle))
    assert status == 0
    assert len(document["plans"]) > 0
    # And those that append to a cache, and the element map's check.
    assert document["kernels"] == len(document["plans"]) + len(append_units([90], ["float16"])) + 1
    (entry, *_) = configurations(archs=[90], head_dims=[64], dtypes=["float16"], variants=["full"])
    monkeypatch.setenv("FLASHCORE_BUNDLE", str(bundle))
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(jit, "compile_uncached", lambda *_: pytest.fail("compiled"))
    jit.compile_source.cache_clear()
    assert jit.compile_plan(entry.plan).arch == "sm_90"
    probe = codegen.generate_probe_source("float16")
    assert jit.compile_source(probe, 90, codegen.PROBE).arch == "sm_90"


def test_explain_shows_problem_backend_and_tiles() -> None:
    result = runner.invoke(app, ["explain", "--head-dim", "128", "--causal", "--arch", "sm_90"])
    assert result.exit_code == 0
    assert "D128" in result.stdout
    assert "sm_90" in result.stdout


TINY = Workload("sweep", 1, 2, 48, 16, True, "float32")


def test_bench_document_report_and_plot(tmp_path: Path) -> None:
    document = run("cpu", rounds=1, workloads=[TINY])
    rows = {row["library"]: row for row in document["results"]}
    assert {"flashcore", "sdpa", "unfused"} <= set(rows)
    assert all(row["max_error"] < 1e-5 for row in rows.values())
    ours = rows["flashcore"]
    assert ours["flops"] == 4 * 2 * 48 * 48 * 16 / 2
    assert ours["bytes"] == 4 * 4 * 2 * 48 * 16
    assert ours["fraction_of_limit"] == pytest.approx(ours["limit_seconds"] / ours["seconds"])
    text = report.markdown(document)
    assert "B1 H2 S48 D16 causal" in text
    assert document["versions"]["torch"] in text
    pytest.importorskip("matplotlib")
    plotting.plot(document, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_bench_shows_an_earlier_result(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(run("cpu", rounds=1, workloads=[TINY])))
    result = runner.invoke(
        app, ["bench", "--from", str(path), "--output", str(tmp_path / "b.json")]
    )
    assert result.exit_code == 0, result.output
    assert "B1 H2 S48 D16 causal" in result.stdout
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads(path.read_text())
    assert (tmp_path / "b.md").exists()


def test_a_library_that_cannot_run_gives_its_reason() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no kernel for this\nlong story")

    outcomes = time_on_cpu({"good": lambda: torch.zeros(1), "bad": broken}, rounds=2)
    assert outcomes["bad"] == "no kernel for this"
    assert isinstance(outcomes["good"], Timing)
    assert len(outcomes["good"].rounds) == 2


@pytest.mark.gpu
def test_bench_on_the_gpu() -> None:
    document = run("cuda", rounds=2, workloads=[Workload("seed", 1, 8, 512, 64, False)])
    ours = document["results"][0]
    assert ours["library"] == "flashcore"
    assert ours["max_error"] < 1e-3
