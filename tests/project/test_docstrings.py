"""Docstrings begin with a sentence: somebody who reads only the first line knows what is done."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sources import parsed

ROOT = Path(__file__).resolve().parents[2]

# Ruff's D401 finds "Returns"; these begin a clause without a verb, or one that hangs in the air.
HANGING = frozenset(
    re.findall(
        r"\w+",
        "what whether which who whose where when why how that those these such of and or nor as by"
        " from in on to with within without for than likewise",
    )
)
NO_VERB = HANGING | frozenset(
    re.findall(
        r"\w+",
        "a an the one two three each every all both neither some its it their our no not true false"
        " none nothing everything see",
    )
)
# The name of a test says what holds; its docstring may say why in any sentence that is whole.
HANGING_REASON = frozenset(
    re.findall(r"\w+", "which whose whether those such of and or nor as likewise")
)
VERBS = (
    r"is|are|holds?|says?|describes?|has|have|runs?|takes?|compares?|shows?|goes|checks?|makes?"
    r"|does|gives|keep|must|knows?|plants?|puts?|selects?|did|could|cannot|took|stays?"
)


def failing(kind: str, docstring: str) -> bool:
    """Return whether the beginning of a docstring is no sentence."""
    if kind == "test":  # says why the test exists, after a name that says what holds
        return first_word(docstring) in HANGING_REASON
    if kind == "function":
        word = first_word(docstring)
        plural = word.endswith("s") and not word.endswith("ss")
        return not word or word in NO_VERB or plural
    if first_word(docstring) in HANGING:
        return True
    # A noun needs a verb, before any clause that begins with "that" or "which".
    if re.match(r"(An?|The|One|Each|Every|All)\b", docstring):
        clause = re.split(r"\b(?:that|which|who|whose|where|what)\b|[.:;]", docstring)[0]
        return not re.search(rf"\b({VERBS})\b", clause)
    return False


def first_word(docstring: str) -> str:
    """Return the first word in lower case, "" where there is something else, such as a shape."""
    found = re.match(r"([A-Za-z]+)[\s,:.;]", docstring + " ")
    return found.group(1).lower() if found else ""


def docstrings() -> list[tuple[str, str, str]]:
    """Return place, kind and text of each docstring of the files that git keeps."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = []
    for file in done.stdout.splitlines():
        if not (ROOT / file).is_file():
            continue
        tree = parsed(ROOT / file)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef):
                kind = "noun"
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                kind = "test" if node.name.startswith("test_") else "function"
            else:
                continue
            if text := ast.get_docstring(node):
                line = getattr(node, "lineno", 1)
                found.append((f"{file}:{line}", kind, " ".join(text.split())))
    return found


def test_docstrings_begin_with_a_sentence() -> None:
    wrong = [f"{place}: {text[:70]}" for place, kind, text in docstrings() if failing(kind, text)]
    assert wrong == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("function", "What a kernel reads."),
        ("function", "Whether a call fits."),
        ("function", "The plan of a problem."),
        ("function", "Columns of a tile."),
        ("function", "[batch, heads], True where hidden."),
        ("function", "Likewise of the keys."),
        ("noun", "A plan that is printed."),
        ("noun", "How a mask is read."),
        ("noun", "The search: sizes first."),
        ("test", "Which needs lse."),
    ],
)
def test_what_is_no_sentence_is_found(kind: str, text: str) -> None:
    assert failing(kind, text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("function", "Return what a kernel reads."),
        ("function", "Pass a turn on."),
        ("noun", "A plan holds what is printed."),
        ("noun", "Apply the error rule: how far off a result may be."),
        ("test", "Small integers are exact in every step."),
    ],
)
def test_sentences_pass(kind: str, text: str) -> None:
    assert not failing(kind, text)
