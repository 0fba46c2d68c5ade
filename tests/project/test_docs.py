"""The pages keep their word: the reference is complete, and every Python snippet runs."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import flashcore

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PUBLIC_PACKAGES = ("compat", "integrations")  # of flashcore; each of their modules is public


def public_names() -> list[str]:
    """Return dotted names of all that is meant to be used: flashcore's, and the public
    packages'."""
    modules = ["flashcore"]
    for package in PUBLIC_PACKAGES:
        folder = Path(flashcore.__path__[0]) / package
        found = pkgutil.walk_packages([str(folder)], f"flashcore.{package}.")
        modules += [module.name for module in found]
    names = []
    for module in modules:
        # From the source and not by import: a module may need a package that is not here.
        source = ROOT.joinpath("src", *module.split("."))
        file = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
        text = re.search(r"^__all__ = \[(.*?)\]", file.read_text(encoding="utf-8"), re.M | re.S)
        assert text, f"{file} has no __all__"
        names += [f"{module}.{name}" for name in re.findall(r'"(\w+)"', text.group(1))]
    return names


def reference_names() -> list[str]:
    """Return dotted names that docs/reference.md takes a docstring of."""
    module, names = "", []
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    directive = r"^\.\. (currentmodule|auto(?:function|class|exception|data)):: (\S+)"
    for kind, name in re.findall(directive, text, re.MULTILINE):
        if kind == "currentmodule":
            module = name
        else:
            names.append(name if name.startswith("flashcore.") else f"{module}.{name}")
    return names


def test_every_public_name_is_in_the_reference() -> None:
    wanted = set(public_names()) - {"flashcore.__version__"}  # a string; it has no docstring
    assert len(wanted) >= len(flashcore.__all__) - 1
    assert sorted(wanted - set(reference_names())) == []


def test_every_name_in_the_reference_has_a_docstring() -> None:
    names = reference_names()
    assert len(set(names)) == len(names)
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


@pytest.mark.parametrize(
    "page", [page for page in PAGES if SNIPPET.search(page.read_text())], ids=lambda page: page.stem
)
def test_snippets_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after the other in one namespace, as a reader would paste them."""
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: False
    )  # everywhere the same: on the CPU
    torch.manual_seed(0)
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    for block in SNIPPET.finditer(text):
        lines_before = text[: block.start(1)].count("\n")
        code = compile("\n" * lines_before + block.group(1), str(page), "exec")  # the page's lines
        exec(code, names)


def test_no_snippet_is_hidden_from_the_tests() -> None:
    """Python is fenced as ```python: neither indented, nor under another spelling."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^```(py|py3|python3|pycon|Python)\b(?!thon)", text, re.M), page
        assert not re.search(r"^    (import|from) \w+|^    \w+ = \w+\.\w+\(", text, re.M), page
