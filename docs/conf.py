"""Configure Sphinx: the pages as they are, plus the reference made from docstrings. `make docs`
builds it.

The source folder is the repository, not docs/, so that a relative link from any page to any file
means the same here and where the Markdown is read in place. For the same reason no page has a table
of contents in it: `adapt_page` appends one while building.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))  # the docstrings of this checkout

from flashcore import __version__  # noqa: E402

project = "flashcore"
release = version = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "sphinx_copybutton"]
root_doc = "docs/index"
# Any other file that a page links to is copied beside it.
include_patterns = ["*.md", "docs/*.md", "benchmarks/**.md", "src/flashcore/data/README.md"]
exclude_patterns = [".*", "build", "dist", "tests"]

html_theme = "furo"
html_title = f"flashcore {release}"
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3

# Docstrings: Google style by napoleon; `name` in them is code, as in Markdown.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # "out: [batch, ...]" under Returns names the result, not its type
napoleon_custom_sections = ["Numerics", "Source"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90

# Names of other projects: their pages are not fetched, so that a build needs no network. Every name
# of flashcore itself must resolve.
nitpick_ignore_regex = [("py:.*", r"(?!flashcore\b).*")]

# Pages by section, from docs/; a title of its own where the page's would mislead.
SECTIONS = {
    "Use": [
        "Start <../README>",
        "install",
        "examples",
        "migration",
        "drop-ins",
        "varlen",
        "reference",
        "cli",
    ],
    "Understand": ["numerics", "performance", "debugging", "simulator", "architecture"],
    "Project": [
        "../CHANGELOG",
        "../CONTRIBUTING",
        "../benchmarks/README",
        "../benchmarks/results/h200",
        "../benchmarks/results/h200-gradients",
        "../benchmarks/results/h200-host",
        "../src/flashcore/data/README",
    ],
}
# A page that no section names is in the second one.
_named = {"index", *(page for pages in SECTIONS.values() for page in pages)}
SECTIONS["Understand"] += sorted({path.stem for path in (ROOT / "docs").glob("*.md")} - _named)


def adapt_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the site's table of contents to the start page; give tables of results a title."""
    if docname == root_doc:
        for section, pages in SECTIONS.items():
            lines = ["", "```{toctree}", ":hidden:", f":caption: {section}", "", *pages, "```", ""]
            source[0] += "\n".join(lines)
    if docname.startswith("benchmarks/results/"):
        title = f"# Results: {Path(docname).name}\n\n"
        source[0] = title + source[0].replace("### ", "## ")


def add_start(app: Sphinx, error: Exception | None) -> None:
    """Leave an index.html at the top that leads to the start page."""
    if error is None and app.builder.name == "html":
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("source-read", adapt_page)
    app.connect("build-finished", add_start)
