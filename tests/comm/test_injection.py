"""Whatever fails on one rank, wherever: all others hear of it at once, and nothing is half done.

injection.py plants an error at the lines of a call, one after the other; here its reports are judged.
"""

import functools
import json
import tempfile
from pathlib import Path

import injection
import pytest

from support.launcher import launch, other_python
from support.nodes import NODES

pytestmark = [pytest.mark.launch, pytest.mark.mpi_skip]

PROMPT = 1.0
"""Seconds in which the other rank hears of an error."""

# Where an error is neither told nor leaves the call undone: by function, with the reason.
EXCEPTIONS = {
    "Module.__call__": "the call has not begun",
    "BatchNormBase.forward": "the line of the `with`, before its context is entered, and the return",
    "BatchNormBase.backward": "the same two lines",
    "DistributedDataParallel.__init__": "the line of the `with`",
    "DistributedDataParallel.reduce_gradients": "the line of the `with`",
    "Collective.__exit__": "all has been done",
}
MOST_EXCEPTIONS = 10
"""Lines."""


@functools.cache
def reports(error, steps, library="this"):
    """Return the reports of both ranks, by pairs."""
    python = other_python() if library == "other" else injection.sys.executable
    variables = {NODES: "01"} if library == "lanes" else {}
    deadline = 120 if (error, steps) == ("MemoryError", "sample") else 900
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", "mpi4py", injection.__file__, folder, error, steps]
        command, status, output = launch(python, 2, arguments, deadline, **variables)
        assert status == 0, f"{command} ended with {status}\n{output[-4000:]}"
        lines = [Path(folder, f"{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    found = [tuple(map(json.loads, pair)) for pair in zip(*lines, strict=True)]
    assert len(found) > 100
    return found


def is_told(other, faulty):
    """The other rank has heard of it, and no rank has changed anything."""
    return (
        (faulty["error"], faulty["changed"]) == ("MemoryError", [])
        and (other["error"], other["changed"]) == ("RemoteRankError", [])
        and other["seconds"] < PROMPT
    )


def is_found_out(other, faulty):
    """The other rank was done already: it hears of it in its next call."""
    return (
        (faulty["error"], faulty["changed"], other["error"]) == ("MemoryError", [], None)
        and other["next"]["error"] in ("RemoteRankError", "RankMismatchError")
        and other["next"]["seconds"] < PROMPT
    )


def judge_memory_errors(found):
    exceptions = {}
    for other, faulty in found:
        if not is_told(other, faulty) and not is_found_out(other, faulty):
            exceptions[faulty["where"]] = (other, faulty)
    print(f"{len(found)} lines; neither told nor found out:", *exceptions, sep="\n    ")
    unexplained = {where: pair for where, pair in exceptions.items() if where.split()[-1] not in EXCEPTIONS}
    assert not unexplained
    assert len(exceptions) <= MOST_EXCEPTIONS


@pytest.mark.parametrize("library", ["this", pytest.param("lanes", marks=pytest.mark.long)])
def test_memory_error_at_some_lines(library):
    judge_memory_errors(reports("MemoryError", "sample", library))


@pytest.mark.long
@pytest.mark.parametrize("library", ["this", "other", "lanes"])
def test_memory_error_at_every_line(library):
    judge_memory_errors([pair for call in injection.SAMPLE for pair in reports("MemoryError", call, library)])


# What belongs together.
PAIRS = [
    ("0.running_mean", "0.running_var", "0.num_batches_tracked"),
    ("1.running_mean", "1.running_var", "1.num_batches_tracked"),
    ("0.weight.grad", "0.bias.grad"),
]


def judge_interrupts(found):
    """No rank waits for ever, and of what belongs together all has changed, or nothing."""
    for other, faulty in found:
        assert faulty["error"] == "KeyboardInterrupt", faulty
        for report in other, faulty:
            assert report["seconds"] < 2 * injection.TIMEOUT + 2, (other, faulty)
            assert report["next"]["seconds"] < 2 * injection.TIMEOUT + 2, (other, faulty)
        for names in PAIRS:
            assert len({name in faulty["changed"] for name in names}) == 1, (other, faulty)


@pytest.mark.long
@pytest.mark.parametrize("library", ["this", "other", "lanes"])
def test_interrupt_at_some_lines(library):
    judge_interrupts(reports("KeyboardInterrupt", "sample", library))
