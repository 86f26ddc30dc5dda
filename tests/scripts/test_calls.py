"""The package's own Python calls of a step: few, and fewer still before the first arithmetic.

A count is no time: it is the same on every machine.
"""

import importlib

import numpy as np
import pytest

from cupy_syncbn.backends import backend_of
from cupy_syncbn.backends.cpu import loading
from support.launcher import REPOSITORY

# Of a later forward and backward: in all, and before the first arithmetic. On two ranks a sum adds some.
# The operations of NumPy are functions of our own, those of the core are not.
ON_CORE = loading.choice().isa != "numpy"
MOST = {"cpu, forward": (30 if ON_CORE else 65, 25), "cpu, backward": (25 if ON_CORE else 50, 25)}


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "benchmarks"))
    module = importlib.import_module("calls")
    monkeypatch.setattr(module, "REPEATS", 2)
    return module


def test_calls_are_few(calls, world):
    rows = {name: list(map(int, numbers[:-1])) for name, *numbers in calls.counted("cpu", False)}
    assert rows.keys() == MOST.keys()
    for name, (first, first_before, _, later, before, frames) in rows.items():
        assert 0 < later < first
        assert 0 < before < first_before
        assert 1 < frames < 12
        most, most_before = MOST[name]
        assert before <= most_before
        if world.size < 3:  # with more, a sum has several messages
            assert later <= most


def test_a_count_is_of_calls(calls, tmp_path):
    """Of functions in the folder, comprehensions among them, and no others."""
    source = """
def statistics(): return [i for i in "ab"]
def f(): return g(), statistics()
def g(): return sum((1,))
"""
    space = {}
    exec(compile(source, str(tmp_path / "module.py"), "exec"), space)
    found = calls.count(str(tmp_path), lambda: (np.mean([1.0]), space["f"]()))
    assert found.calls in (3, 4)  # Python 3.12 has comprehensions inline
    assert (found.before, found.frames) == (2, found.calls - 1)


@pytest.mark.mpi_skip
def test_arithmetic_is_left_out(calls, monkeypatch):
    operations = backend_of(np.empty(0))
    for name in calls.OPERATIONS:
        if hasattr(operations, name):
            monkeypatch.setattr(operations, name, getattr(operations, name))  # restored afterwards
    step = calls.without_arithmetic()
    for name in "statistics", "normalize", "reduce_gradients", "input_gradient":
        assert getattr(operations, name).__name__ == "<lambda>"
    step()


@pytest.mark.mpi_skip
def test_two_checkouts_take_turns(calls, monkeypatch):
    monkeypatch.setattr(calls, "TURNS", 2)
    part, ours, theirs, ratio = calls.compared(f"zero_grad of {calls.LAYERS} layers", REPOSITORY)
    assert part.startswith("zero_grad")
    assert min(map(float, (ours, theirs, ratio))) > 0
