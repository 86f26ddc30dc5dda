"""Settings of Sphinx for the pages in this folder; `bash scripts/docs/build.sh` makes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # the package of this clone, installed or not

import cupy_syncbn  # noqa: E402

project = "cupy_syncbn"
version = release = cupy_syncbn.__version__
project_copyright = "the cupy_syncbn authors"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_parser",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "autolink"  # a name in backticks is a link where it is a public name
# An argument may have the name of a module or an attribute, of which there is no page.
nitpick_ignore_regex = [("py:obj", "[a-z_]+|numpy.asarray")]
autodoc_typehints = "none"  # the docstrings name the types
autosummary_generate = True
numpydoc_show_class_members = False  # the template for classes has them all
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

toc_object_entries_show_parents = "hide"
html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_title = f"cupy_syncbn {release}"
html_show_sourcelink = False
html_sidebars = {page.stem: [] for page in Path(__file__).parent.glob("*.md")}  # no pages below these
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "navbar_align": "left",
    "footer_start": ["copyright"],
    "footer_end": [],
}

# Members of ProcessGroup and its kinds that only the package itself uses: tests/test_api.py has the methods.
INTERNAL = {
    "abandon", "allreduce_checked", "allreduce_into", "allreduce_owned", "broadcast_into", "broadcast_object",
    "broadcast_owned", "defer", "gather_numbers", "gather_objects", "is_given_up", "mailbox", "messages",
    "next_model", "tell_fault",
}  # fmt: skip


def is_internal(app: Any, what: str, name: str, value: object, skip: bool, options: Any) -> bool | None:
    """Leave INTERNAL out of the pages; None leaves the decision to Sphinx."""
    return True if name in INTERNAL else None


def setup(app: Any) -> None:
    """Register what decides on members; Sphinx calls this."""
    app.connect("autodoc-skip-member", is_internal)
