"""Pages quote the results file and nothing else: scripts/readme_results.py, and the pages today."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "readme_results.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_results", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["readme_results"] = module
    spec.loader.exec_module(module)
    return module


def row(group: str, seqlen: int, library: str, microseconds: float | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "workload": f"B1 H8 S{seqlen} D64 full",
        "group": group,
        "seqlen": seqlen,
        "dtype": "float16" if group == "seed" else "bfloat16",
        "library": library,
    }
    if microseconds is None:
        return entry | {"skipped": "would store 99 GiB of scores"}
    return entry | {
        "seconds": microseconds * 1e-6,
        "flops_per_second": 1e9 / (microseconds * 1e-6),
        "max_error": 1.4e-4,
        "mean_error": 1.5e-5,
    }


DOCUMENT: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "flashcore bench --output benchmarks/results/h200.json",
    "gpu": {"name": "GPU", "arch": 90, "driver": "1.2", "power_limit_w": 700.0},
    "cpu": "CPU",
    "versions": {"torch": "2.11.0"},
    "method": "by hand",
    "ceilings": {"matmul_n": 8192.0, "matmul_flops": 7e14, "copy_bytes": 4e12},
    "results": [
        row("seed", 512, "flashcore", 5.0),
        row("seed", 512, "sdpa-flash", 10.0),
        row("seed", 512, "sdpa-cudnn", 8.0),
        row("seed", 512, "unfused", 20.0),
        row("sweep", 1024, "flashcore", 100.0),
        row("sweep", 1024, "sdpa-cudnn", 90.0),
        row("sweep", 16384, "flashcore", 400.0),
        row("sweep", 16384, "flashcore-wmma", 300.0),
        row("sweep", 16384, "sdpa-cudnn", 500.0),
        row("sweep", 16384, "unfused", None),
    ],
}


@pytest.fixture
def repository(script: ModuleType, tmp_path: Path) -> Path:
    """Return both pages with empty markers, and results."""
    (tmp_path / "docs").mkdir()
    for page in script.PAGES:
        text = f"before\n\n{script.BEGIN}\nold\n{script.END}\n\nafter\n"
        (tmp_path / page).write_text(text, encoding="utf-8")
    results = tmp_path / script.RESULTS
    results.parent.mkdir(parents=True)
    results.write_text(json.dumps(DOCUMENT), encoding="utf-8")
    return tmp_path


def test_pages_quote_the_results_file(script: ModuleType) -> None:
    if not (ROOT / script.RESULTS).is_file():
        pytest.skip(f"{script.RESULTS} is not there yet")
    assert script.update(ROOT, check=True) == [], "run python scripts/readme_results.py"


def test_pages_of_this_repository_have_their_markers(script: ModuleType) -> None:
    for page in script.PAGES:
        script.filled((ROOT / page).read_text(encoding="utf-8"), "", page)


def test_the_page_of_the_backward_pass_is_made_of_its_file(
    script: ModuleType, repository: Path
) -> None:
    page = repository / "docs" / "backward-speed.md"
    named = script.BEGIN.replace(" -->", " gradients -->")
    page.write_text(f"before\n{named}\nold\n{script.END}\n", encoding="utf-8")
    readme = repository / "README.md"
    with readme.open("a", encoding="utf-8") as file:
        file.write(f"{named}\nold\n{script.END}\n")
    assert "docs/backward-speed.md" not in script.update(repository, check=True)  # nothing measured
    rows = []
    for group in ("sweep", "small"):
        for library, backward_us, both_us in (("flashcore", 50.0, 90.0), ("fa4", 100.0, 99.0)):
            rows.append(
                row(group, 1024, library, backward_us)
                | {
                    "head_dim": 64,
                    "pass": "backward",
                    "eager_seconds": both_us * 1e-6,
                    "fraction_of_limit": 0.61,
                }
            )
    path = repository / script.BACKWARD_RESULTS
    path.write_text(json.dumps(DOCUMENT | {"pass": "backward", "results": rows}))
    assert "docs/backward-speed.md" in script.update(repository, check=False)
    lines = page.read_text(encoding="utf-8").splitlines()
    name = "B1 H8 S1024 D64 full"
    assert "| TFLOP/s | flashcore | of limit | fa4 | vs best peer |" in lines
    assert f"| {name} | 20 | 61% | 10 | 2.00x |" in lines
    assert f"| {name} | 90.0 | 99.0 | 1.10x |" in lines
    assert any(x.startswith("| sweep, with forward and host | 1 | 1.10x |") for x in lines)
    lines = readme.read_text(encoding="utf-8").splitlines()
    assert "| flashcore's speed over | shapes | fa4 | best of each shape |" in lines
    assert "| head_dim 64 | 1 | 2.00x | 2.00x |" in lines
    assert "| all | 1 | 2.00x | 2.00x |" in lines
    for name in ("README.md", "docs/backward-speed.md"):
        script.filled((ROOT / name).read_text(encoding="utf-8"), "", name, "gradients")


def test_training_steps_are_a_table_of_what_ran(script: ModuleType, tmp_path: Path) -> None:
    assert script.training_parts(tmp_path) == []
    path = tmp_path / script.RESULTS.with_name("h200-training-gpt.json")
    path.parent.mkdir(parents=True)
    ran = {"implementation": "sdpa", "tokens_per_second": 1234.5, "flashcore_over_this": 1.25}
    failed = {"implementation": "eager", "failed": "no memory"}
    results = [ran | {"peak_gib": 3.0}, failed]
    path.write_text(json.dumps({"batch": 2, "seqlen": 64, "results": results}))
    sentence, table = script.training_parts(tmp_path)
    assert "(../benchmarks/results/h200-training-gpt.json)" in sentence
    assert table.splitlines()[2:] == [
        f"| {script.TRAINING['gpt']}, B2 S64 | sdpa | 1,234 | 1.250 | 3.0 |"
    ]


def test_filling_is_idempotent_and_keeps_the_rest(script: ModuleType, repository: Path) -> None:
    assert script.update(repository, check=True) == list(script.PAGES)
    assert script.update(repository, check=False) == list(script.PAGES)
    assert script.update(repository, check=True) == []
    for page in script.PAGES:
        text = (repository / page).read_text(encoding="utf-8")
        assert text.startswith("before\n\n<!--")
        assert text.endswith("-->\n\nafter\n")
        assert "old" not in text


def test_a_changed_number_is_stale(script: ModuleType, repository: Path) -> None:
    script.update(repository, check=False)
    page = repository / "README.md"
    page.write_text(page.read_text(encoding="utf-8").replace("1.06x", "1.07x"), encoding="utf-8")
    assert script.update(repository, check=True) == ["README.md"]


def test_what_the_tables_say(script: ModuleType) -> None:
    name = "B1 H8 S512 D64 full"
    assert script.seed_table(DOCUMENT).splitlines()[-1] == (
        f"| {name} | 20.0 | 10.0 | 8.0 (sdpa-cudnn) | - | 5.0 | 1.4e-04 / 1.5e-05 |"
    )
    assert script.group_table(DOCUMENT, "sweep").splitlines() == [
        "| us / TFLOP/s | flashcore | flashcore-wmma | sdpa-cudnn | vs best peer |",
        "| --- | --- | --- | --- | --- |",
        "| B1 H8 S1024 D64 full | 100.0 / 10 | - | 90.0 / 11.1 | 0.90x |",
        "| B1 H8 S16384 D64 full | 400.0 / 2.5 | 300.0 / 3.33 | 500.0 / 2 | 1.25x |",
    ]
    assert "hidden size 2048, bfloat16" in script.performance_section(DOCUMENT, ROOT)


def test_every_group_of_the_file_has_its_table(script: ModuleType) -> None:
    rows = [
        row("decode", 1, "flashcore", 10.0) | {"bytes_per_second": 3e12},
        row("decode", 1, "sdpa-efficient", 15.0) | {"bytes_per_second": 2e12},
        row("small", 128, "flashcore", 4.0),
        row("small", 128, "sdpa-cudnn", 9.0),
    ]
    document = DOCUMENT | {"results": DOCUMENT["results"] + rows}
    sections = script.group_sections(document)
    assert [text for text in sections if text.endswith(":")] == [
        "Small calls (bfloat16):",
        "Decoding: one query, a long cache (bfloat16):",
    ]
    assert sections[-1].splitlines()[0] == "| us / GB/s | flashcore | vs best peer |"
    # The best peer has no column of its own, so it is named.
    assert sections[-1].endswith("| 10.0 / 3000 | 1.50x (sdpa-efficient) |")
    means = script.means_table(document).splitlines()
    assert "| sweep | 2 | 1.06x | 1 | 0.90x (B1 H8 S1024 D64 full) |" in means
    assert "| small | 1 | 2.25x | 1 | 2.25x (B1 H8 S128 D64 full) |" in means
    for page in (script.readme_section, script.performance_section):
        assert script.means_table(document) in page(document, ROOT)


def test_summary_counts_losses_too(script: ModuleType) -> None:
    assert script.summary(DOCUMENT) == (
        "Against the fastest other implementation of each shape, flashcore takes less time on 2 of "
        "3: at best 1.60x its speed (B1 H8 S512 D64 full), at worst 0.90x (B1 H8 S1024 D64 full)."
    )


def test_links_only_to_what_exists(script: ModuleType, repository: Path) -> None:
    assert "](" not in script.performance_section(DOCUMENT, repository).split(").", 1)[1]
    for suffix in (".png", ".md"):
        (repository / script.RESULTS).with_suffix(suffix).touch()
    section = script.performance_section(DOCUMENT, repository)
    assert "(../benchmarks/results/h200.png)" in section
    assert "(../benchmarks/results/h200.md)" in section


@pytest.mark.parametrize("text", ["", "{0}", "{1}\n{0}", "{0}\n{1}\n{0}"])
def test_lost_markers_are_an_error(script: ModuleType, text: str) -> None:
    with pytest.raises(script.MarkerError, match=r"README\.md needs one line"):
        script.filled(text.format(script.BEGIN, script.END), "section", "README.md")


STUDIES: dict[str, list[dict[str, Any]]] = {
    "h200-masks.json": [
        {
            "case": name, "shape": "B8 H16 S2048 D64", "mask": mask, "needs_grad": needs_grad,
            "kernel_ms": kernels, "step_ms": 1.0, "efficient_ms": 4.0, "cudnn_ms": "no kernel",
        }
        for name, mask, needs_grad, kernels in (
            ("none", None, False, {"attn_fwd_sm90": 0.2, "attn_bwd_dkdv_sm90": 0.9}),
            ("one", "bool [B, 1, S, S]", True,
             {"attn_fwd_sm90": 0.4, "attn_bwd_dq_sm90": 0.5, "attn_bwd_dkdv_sm90": 0.7,
              "attn_bwd_dmask_sm90": 0.3, "fill": 0.1}),
        )
    ] + [{"case": "failed", "shape": "B1", "mask": None, "needs_grad": False, "skipped": "why"}],
    "h200-packed-decode.json": [
        {"batch": "decodes", "page_size": 16, "bound_us": 268.0, "packed_us": 252.0},
        {"batch": "decodes", "page_size": 256, "bound_us": 268.0, "packed_us": "why"},
    ],
    "h200-steps.json": [{"drafts": 8, "room": 4096, "us": {"attention": 137.6, "step": "why"}}],
}  # fmt: skip
LINES = {
    "h200-masks.json": [
        "| B8 H16 S2048 D64, none | 0.20 |  | 0.90 |  |  |  | 1.00 | 4.00 | no |",
        "| bool [B, 1, S, S], yes | 0.40 | 0.50 | 0.70 | 0.30 | 0.50 | 0.75 | 1.00 | 4.00 | no |",
    ],
    "h200-packed-decode.json": ["| decodes | 268 | 252.0 / no |  |"],
    "h200-steps.json": ["| us | 8 new, room 4096 |", "| attention | 137.6 |", "| step | no |"],
}


@pytest.mark.parametrize("name", STUDIES)
def test_files_of_one_subject_have_named_markers(
    script: ModuleType, repository: Path, name: str
) -> None:
    """They share pages with other files, whose sections stay as they are."""
    source = script.RESULTS.with_name(name)
    page = next(iter(script.SOURCES[source]))
    script.filled((ROOT / page).read_text(encoding="utf-8"), "", page, script.NAMES[source])
    named = script.BEGIN.replace(" -->", f" {script.NAMES[source]} -->")
    other = f"{script.BEGIN}\nother\n{script.END}\n"
    path = repository / page
    path.write_text(f"{other}{named}\nold\n{script.END}\nafter\n", encoding="utf-8")
    document = DOCUMENT | {"results": STUDIES[name]}
    (repository / source).write_text(json.dumps(document), encoding="utf-8")
    assert page in script.update(repository, check=False)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(other)
    assert text.endswith(f"{script.END}\nafter\n")
    assert "old" not in text
    assert all(line in text.splitlines() for line in LINES[name])
    lost = text.replace(script.END, "", 1)
    with pytest.raises(script.MarkerError, match=r"needs one line <!-- results:begin"):
        script.filled(lost, "", page, script.NAMES[source])
