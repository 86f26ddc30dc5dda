"""The scripts that draw the figures of the pages."""

import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from support.launcher import REPOSITORY, clean_environment, finish

pytestmark = pytest.mark.mpi_skip

FIGURES = REPOSITORY / "scripts" / "figures"


@pytest.mark.parametrize("script", sorted(FIGURES.glob("*.py")), ids=lambda path: path.stem)
def test_figure_is_drawn(script, tmp_path):
    """It has the parts and the words of the committed one: fonts may differ by the release of matplotlib."""
    pytest.importorskip("matplotlib")
    done = finish([sys.executable, str(script), str(tmp_path)], 120, env=clean_environment())
    assert done.returncode == 0, done.stderr
    drawn, committed = (folder / f"{script.stem}.svg" for folder in (tmp_path, FIGURES))
    counts = [
        sum(
            element.tag.endswith("}g") and element.get("id", "").startswith(("patch", "text"))
            for element in tree
        )
        for tree in (ElementTree.parse(path).iter() for path in (drawn, committed))
    ]
    assert counts[0] == counts[1] > 20
    words = [re.findall(r"<!-- (.*?) -->", path.read_text()) for path in (drawn, committed)]
    assert words[0] == words[1] != []
