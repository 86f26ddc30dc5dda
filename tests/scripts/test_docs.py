"""The pages of scripts/docs; tests/test_readme.py runs what they show, and .ci/run builds them."""

import re
import runpy

import pytest

import cupy_syncbn
from support.launcher import REPOSITORY
from test_api import INTERNAL

pytestmark = pytest.mark.mpi_skip

DOCS = REPOSITORY / "scripts" / "docs"


def test_every_public_name_has_a_page():
    text = (DOCS / "api.rst").read_text()
    lists = re.findall(
        r"(?m)^\.\. autosummary::\n   :toctree: api\n   :nosignatures:\n\n((?:   \w+\n)+)", text
    )
    assert sorted(" ".join(lists).split()) == sorted(cupy_syncbn.__all__)


def test_every_page_is_in_the_contents():
    (contents,) = re.findall(r"(?s)```{toctree}\n:maxdepth: 1\n\n(.*?)```", (DOCS / "index.md").read_text())
    pages = {path.stem for path in DOCS.iterdir() if path.suffix in (".md", ".rst")} - {"index"}
    assert sorted(contents.split()) == sorted(pages)


def test_internal_methods_have_no_page():
    left_out = runpy.run_path(str(DOCS / "conf.py"))["INTERNAL"]
    assert left_out == {name.partition(".")[2] for name in INTERNAL}
