"""Ranks that are on several nodes, as they believe: sums by doubling and by lanes; see lanes.py."""

import sys
from pathlib import Path

import pytest

from support.launcher import launch, other_python
from support.nodes import ALL

pytestmark = [pytest.mark.launch, pytest.mark.mpi_skip]

PROGRAM = str(Path(__file__).with_name("lanes.py"))
NODES = {"2 + 2": "0011", "3 + 1": "0001", "2 + 2 + 3": "0011222", "round robin": "0101"}


def run(library, *arguments):
    python = sys.executable if library == "this" else other_python()
    nodes, *_ = arguments
    command, status, output = launch(python, len(nodes), ["-m", "mpi4py", PROGRAM, *arguments], 200)
    assert status == 0, f"{command} ended with {status}\n{output[-4000:]}"
    return output


def counts(nodes):
    """Return what is printed: one or two wrong ranks, in ten ways each."""
    ranks = len(nodes)
    return f"14 right, {10 * (ranks + ranks * (ranks - 1) // 2)} wrong"


@pytest.mark.parametrize(
    ("nodes", "library"),
    [
        pytest.param(
            nodes,
            library,
            id=f"{name}-{library}",
            marks=[pytest.mark.long] * (library == "other" and name != "2 + 2"),
        )
        for name, nodes in NODES.items()
        for library in ("this", "other")
    ],
)
def test_sums_by_lanes(nodes, library):
    """Right ones with the same bits everywhere; and all ranks know of one or two wrong ones."""
    assert counts(nodes) in run(library, nodes, str(ALL))


@pytest.mark.parametrize(
    ("nodes", "halvings"),
    [("0011", "0"), ("0011222", "1"), pytest.param("0011222", "0", marks=pytest.mark.long)],
)
def test_sums_by_doubling_and_by_one_halving(nodes, halvings):
    assert counts(nodes) in run("this", nodes, halvings)


@pytest.mark.long
@pytest.mark.parametrize("nodes", [NODES[each] for each in ("3 + 1", "round robin")])
def test_sums_by_doubling_wherever_ranks_are(nodes):
    assert counts(nodes) in run("other", nodes, "0")


@pytest.mark.long
@pytest.mark.parametrize("nodes", ["001", "00122", "001122"])
def test_sums_of_other_numbers_of_ranks(nodes):
    for halvings in "0", str(ALL):
        assert counts(nodes) in run("this", nodes, halvings)


@pytest.mark.parametrize(
    ("library", "nodes"),
    [
        ("this", "0001"),
        *(pytest.param(*each, marks=pytest.mark.long) for each in (("this", "0011222"), ("other", "0101"))),
    ],
)
def test_a_rank_that_is_lost_in_the_middle(library, nodes):
    """Those that wait for it say so, as many as need more from it."""
    output = run(library, nodes, str(ALL), "lost")
    *_, counted = (line for line in output.splitlines() if "lost" in line)
    assert int(counted.split()[-2]) >= 2 * len(nodes) - 2
