"""Every script in examples/ runs and does what its first line says, at sizes for a test."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

TINY = ["--width", "32", "--layers", "2", "--heads", "2", "--context", "32", "--batch", "8"]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # a dataclass looks its module up while it is made
    spec.loader.exec_module(module)
    return module


def test_every_example_is_described_and_tested() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f'load("{script.stem}")' in here, "needs a test below"
        assert f"examples/{script.name}" in page


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gpt_learns(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    losses = load("train_gpt").main(["--steps", "60", "--device", device, *TINY])
    assert len(losses) == 60
    # Knowing how often each letter comes already takes 4.6 nats to about 3.2.
    assert losses[0] > 4.4
    assert sum(losses[-5:]) / 5 < 3.5
    printed = capsys.readouterr().out
    assert "loss on text not seen" in printed
    sampled = printed.partition("sample, after the bar: ")[2].rstrip("\n")
    assert len(sampled) == 32 + 1


def test_gpt_gives_the_same_with_a_cache_as_without() -> None:
    gpt = load("train_gpt")
    torch.manual_seed(0)
    model = gpt.GPT(gpt.Shape(vocabulary=20, context=24, width=32, layers=2, heads=2)).eval()
    ids = torch.randint(20, (2, 24))
    with torch.no_grad():
        whole, _ = model(ids)
        first, caches = model(ids[:, :20])
        second, caches = model(ids[:, 20:23], caches)
        third, _ = model(ids[:, 23:], caches)
    torch.testing.assert_close(torch.cat([first, second, third], dim=1), whole, rtol=0, atol=1e-5)


def test_tour_prints_what_queries_see(capsys: pytest.CaptureFixture[str]) -> None:
    load("options_tour").main([])
    blocks = {
        block.splitlines()[0].split(":")[0]: [line.strip() for line in block.splitlines()[1:]]
        for block in capsys.readouterr().out.strip().split("\n\n")
    }
    assert blocks["causal=True"] == ["xxxxx...", "xxxxxx..", "xxxxxxx.", "xxxxxxxx"]
    assert blocks['causal="upper_left"'] == ["x.......", "xx......", "xxx.....", "xxxx...."]
    assert blocks["window=(2, 0), causal=True"][0] == "..xxx..."
    free, capped = blocks["scores 0, 2.8, 5.7 ... 19.8"]
    assert float(free.split()[-1]) > 0.9 > 0.3 > float(capped.split()[-1])
    assert "attn_fwd_sm90" in "\n".join(blocks["flashcore.explain, for an sm_90 GPU"])


def test_tour_shows_attention_and_not_a_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    tour = load("options_tour")

    def uncaused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((*q.shape[:3], v.shape[3]), 1 / k.shape[2])

    monkeypatch.setattr(tour.flashcore, "attention", uncaused)
    assert tour.picture(tour.weights(2, 8, causal=True)) == ["xxxxxxxx"] * 2
