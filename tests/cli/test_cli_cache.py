"""`flashcore cache` removes what flashcore wrote, and nothing else; doctor says how things are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flashcore import errors
from flashcore.base import env, store, temporary
from flashcore.checks import cases
from flashcore.cli import app, doctor
from flashcore.compile import cxx
from flashcore.errors import BackendUnavailableError, CompileError


def invoke(*arguments: str) -> tuple[int, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    return result.exit_code, json.loads(result.stdout)


KEPT = {
    f"kernels/nvrtc-13.0/{'a' * 64}.bin": 3000,
    f"sim/kernel-{'b' * 40}.so": 2000,
    f"sim/runtime-{'c' * 40}.o": 1000,
    f"launcher/launcher-{'d' * 40}.so": 500,
    f"sim/inputs/{'e' * 16}.pt": 100,
}
FOREIGN = ("thesis.tex", "sim/kernel.so", "kernels/notes.txt", "photos/kernels/a.bin", "a.tmp")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a cache in a folder that somebody also uses for other things."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(env.CACHE_DIR.name, str(folder))
    monkeypatch.setattr(errors, "_warned", set())
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(temporary.tempfile, "tempdir", str(tmp_path / "tmp"))
    names = {**KEPT, **dict.fromkeys(FOREIGN, 7), "tuned-sm_90.json": 11, "sim/.killed.tmp": 13}
    for age, (name, size) in enumerate(reversed(names.items())):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
        if name not in KEPT:
            os.utime(path, (0, 0))
        else:  # the first of them is the one that was used last
            used = path.stat().st_mtime - 3600 * (len(names) - age)
            os.utime(path, (used, used))
    return folder


def names(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in found}


def test_dir_and_size(cache: Path) -> None:
    assert invoke("cache", "dir") == (
        0,
        {"dir": str(cache), "instead": str(store.folders()[1])},
    )
    status, document = invoke("cache", "size")
    assert status == 0
    assert document["kinds"]["kernels"] == {"files": 1, "bytes": 3000}
    assert document["kinds"]["simulator"] == {"files": 2, "bytes": 3000}
    assert document["kinds"]["leftovers"] == {"files": 1, "bytes": 13}
    assert document["bytes"] == sum(KEPT.values()) + 11 + 13


def test_prune_removes_leftovers_and_what_was_unused_for_long(cache: Path) -> None:
    status, document = invoke("cache", "prune")
    assert (status, document["removed"]) == (0, 1)
    assert names(cache) == {*KEPT, *FOREIGN, "tuned-sm_90.json"}
    oldest = next(iter(KEPT))
    os.utime(cache / oldest, (0, 0))
    invoke("cache", "prune", "--days", "7")
    assert names(cache) == {*KEPT, *FOREIGN, "tuned-sm_90.json"} - {oldest}


def test_prune_to_a_size_removes_what_was_used_longest_ago(cache: Path) -> None:
    by_use = sorted(KEPT, key=lambda name: (cache / name).stat().st_atime)
    invoke("cache", "prune", "--max-size", "5.4K")
    kept, total = list(by_use), sum(KEPT.values())
    while total > 5.4 * 1024:
        total -= KEPT[kept.pop(0)]
    assert 0 < len(kept) < len(KEPT)
    assert names(cache) == {*kept, *FOREIGN, "tuned-sm_90.json"}
    result = CliRunner().invoke(app, ["cache", "prune", "--max-size", "much"])
    assert result.exit_code == 2
    assert "500M" in result.stderr


def test_clean_leaves_what_others_wrote_and_what_was_tuned(cache: Path) -> None:
    status, document = invoke("cache", "clean")
    assert (status, document["stayed"]) == (0, [])
    assert names(cache) == {*FOREIGN, "tuned-sm_90.json"}
    invoke("cache", "clean", "--tuned")
    assert names(cache) == {*FOREIGN}


def test_clean_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "none"))
    monkeypatch.setattr(temporary.tempfile, "tempdir", str(tmp_path))
    assert invoke("cache", "clean")[1]["removed"] == 0
    assert not (tmp_path / "none").exists()


def findings(check: Any) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor._findings(check)}


def test_doctor_tells_a_missing_compiler_from_other_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome: list[Exception] = []

    def fail(*_: object, **__: object) -> None:
        raise outcome[-1]

    monkeypatch.setattr("flashcore.attention", fail)
    monkeypatch.setattr(cases, "make_inputs", cases.make_inputs)
    for error, state in (
        (CompileError("c++ does not compile it:\nkernel.cuh:3: error: no"), "broken"),
        (BackendUnavailableError("the system does not load it"), "broken"),
        (OSError("failed to map segment"), "broken"),
    ):
        outcome.append(error)
        found = [doctor.Finding("C++ compiler", "ok", ""), *doctor._findings(doctor._simulator)]
        assert found[-1].state == state
        works, text = doctor._backends(found)["sim"]
        assert not works
        assert "needs a C++ compiler" not in text

    def no_compiler(what: str) -> None:
        raise BackendUnavailableError("found none")

    monkeypatch.setattr(cxx, "find_compiler", no_compiler)
    outcome.append(BackendUnavailableError("found none"))
    found = [*doctor._findings(doctor._compiler), *doctor._findings(doctor._simulator)]
    assert [finding.state for finding in found] == ["absent", "absent"]
    assert doctor._backends(found)["sim"] == (False, "needs a C++ compiler")


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def _strange() -> Any:
        raise ZeroDivisionError("oh")
        yield

    assert findings(_strange)["strange"].detail == "ZeroDivisionError: oh"


def test_doctor_explains_a_cache_without_a_home(cache: Path, monkeypatch) -> None:
    monkeypatch.setenv(env.CACHE_DIR.name, "~no-such-user/x")
    found = findings(doctor._cache)["cache"]
    assert found.state == "absent"
    assert "no such user" in found.detail
    assert str(store.folders()[0]) in found.detail
    assert env.CACHE_DIR.name in found.remedy


def test_doctor_finds_a_read_only_cache_right(cache: Path, monkeypatch) -> None:
    def read_only(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "write", read_only)
    found = findings(doctor._cache)["cache"]
    assert found.state == "ok"
    assert "read-only" in found.detail
    assert str(store.folders()[1]) in found.detail


def test_variables_that_mean_nothing_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    wrong = env.CACHE_DIR.name.replace("CACHE_", "CACHE")
    monkeypatch.setenv(wrong, "x")
    assert env.unknown_variables() == [
        f"the environment variable {wrong} means nothing to flashcore: did you mean "
        f"{env.CACHE_DIR.name}?"
    ]
    assert findings(doctor._environment)["environment"].state == "broken"
    monkeypatch.setattr(errors, "_warned", set())
    monkeypatch.setattr(env, "notice_unknown_variables", env.notice_unknown_variables.__wrapped__)
    with pytest.warns(RuntimeWarning, match=f"did you mean {env.CACHE_DIR.name}") as caught:
        assert (env.sim_arch(), env.tuned()) == (80, True)
    assert len(caught) == 1
    monkeypatch.delenv(wrong)
    monkeypatch.setenv(env.CACHE_DIR.name.replace("CACHE_DIR", "QUIET"), "1")
    (sentence,) = env.unknown_variables()
    assert all(variable.name in sentence for variable in env.VARIABLES)
