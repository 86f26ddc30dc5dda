"""Healthy ranks exchange for long: no false error, and memory that stays what it is."""

import re
import sys
from pathlib import Path

import pytest

from support.launcher import launch, other_python
from support.nodes import NODES

pytestmark = [pytest.mark.launch, pytest.mark.mpi_skip]

PROGRAM = str(Path(__file__).with_name("soak.py"))


@pytest.mark.parametrize("library", ["this", "other", "lanes"])
@pytest.mark.parametrize("calls", [1000, pytest.param(20_000, marks=pytest.mark.long)])
def test_healthy_calls(calls, library):
    python = other_python() if library == "other" else sys.executable
    arguments = ["-W", "error", "-m", "mpi4py", PROGRAM, str(calls)]
    variables = {NODES: "001"} if library == "lanes" else {}
    command, status, output = launch(python, 3, arguments, 500, **variables)
    assert status == 0, f"{command} ended with {status}\n{output[-4000:]}"
    memory = [float(number) for number in re.findall(r"memory ([\d.]+)", output)]
    assert len(memory) == 10
    assert max(memory[2:]) < memory[1] + 8, memory  # MiB
