"""scripts/bench_training.py runs the same step by every implementation, at sizes for a test."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_training.py"
TINY = ["--layers", "2", "--width", "64", "--heads", "4", "--heads-kv", "2", "--vocabulary", "50"]
SHORT = ["--batch", "2", "--seqlen", "40", "--rounds", "2", "--steps", "1"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_training", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile imports what it traces
    spec.loader.exec_module(module)
    return module


def test_a_llama_takes_the_same_step_by_each(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "found.json"
    rows = script.main(["llama", *TINY, *SHORT, "--json", str(path)])
    assert [row["implementation"] for row in rows] == ["flashcore", "sdpa", "eager"]
    assert [row.get("failed") for row in rows] == [None] * 3
    # One model, trained on: each goes on where the one before has stopped.
    losses = [loss for row in rows for loss in row["losses"]]
    assert losses == sorted(losses, reverse=True)
    assert len(rows[0]["rounds_seconds"]) == 2
    document = json.loads(path.read_text())
    assert document["results"] == rows
    assert document["model"] == "llama"
    assert "transformers" in document["versions"]
    assert document["seqlen"] == 40


def test_a_gpt_takes_the_same_step_by_each(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU has neither; what is asked for is looked at on a GPU.
    math = torch.nn.attention.SDPBackend.MATH
    monkeypatch.setattr(script, "BACKENDS", dict.fromkeys(script.BACKENDS, math))
    rows = script.main(["gpt", *TINY, *SHORT, "--no-compile"])
    assert [row["implementation"] for row in rows] == ["flashcore", "sdpa-cudnn", "sdpa-flash"]
    assert [row.get("failed") for row in rows] == [None] * 3
    for row in rows[1:]:
        assert row["losses"] == pytest.approx(rows[0]["losses"], abs=2e-3)


def test_the_models_have_the_sizes_that_they_are_called_by(script: ModuleType) -> None:
    transformers = pytest.importorskip("transformers")
    layers, width, heads, heads_kv, vocabulary, _, seqlen = script.SIZES["llama"]
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads_kv,
            )
        )
        assert script.num_parameters(llama) == pytest.approx(1.1e9, rel=0.02)
        layers, width, heads, _, vocabulary, _, seqlen = script.SIZES["gpt"]
        example = script.load_example("train_gpt")
        gpt = example.GPT(example.Shape(vocabulary, seqlen, width, layers, heads))
        gpt.head.weight = gpt.letters.weight
        assert script.num_parameters(gpt) == pytest.approx(124e6, rel=0.01)


def test_one_that_fails_does_not_end_the_run(script: ModuleType) -> None:
    def broken() -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    options = script.options_of(["gpt", *TINY, *SHORT])
    options.device = "cpu"
    rows = script.measure({"flashcore": lambda: torch.zeros(()), "sdpa-cudnn": broken}, options)
    assert "tokens_per_second" in rows[0]
    assert rows[1]["failed"] == "OutOfMemoryError: out of memory"


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["llama", "gpt"])
def test_every_implementation_runs_on_the_gpu(script: ModuleType, model: str) -> None:
    if model == "llama":
        pytest.importorskip("transformers")
    rows = script.main([model, *TINY, *SHORT, "--width", "256", "--seqlen", "128"])
    assert [row.get("failed") for row in rows] == [None] * 3
    assert all(row["peak_gib"] > 0 for row in rows)
