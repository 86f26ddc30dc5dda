"""Environment variables that are wrong, on all ranks or on one: an error on every rank, and no wait."""

import json
import sys
import time

import pytest

from cupy_syncbn import new_group, split_group
from cupy_syncbn.comm.groups import as_group
from support.launcher import launch, other_python

PROGRAM = """
import json, os, sys, time
from pathlib import Path
variable, value, odd, path = sys.argv[1:]
import mpi4py.MPI
comm = mpi4py.MPI.COMM_WORLD
if odd == "all" or comm.rank == int(odd):
    os.environ[variable] = value
import numpy as np
sys.modules["cupy"] = None
import cupy_syncbn as sb

x = np.random.default_rng(comm.rank).normal(size=(4, 3)).astype("f4")
layer = sb.SyncBatchNorm(3, device="cpu")
on_communicator = sb.SyncBatchNorm(3, process_group=comm.Dup(), device="cpu")
uses = {
    "layer": lambda: layer(x),
    "functions": lambda: sb.sync_batch_norm(x),
    "communicator": lambda: on_communicator(x),
    "wrapper": lambda: sb.DistributedDataParallel(sb.Sequential(layer)),
    "recalibrate": lambda: sb.recalibrate(layer, [x, x]),
    "local_rank": lambda: [sb.local_rank(), layer(x)],
    "again": lambda: layer(x),
    "new_group": lambda: sb.new_group(),
    "split_group": lambda: sb.split_group(1),
}
if odd != "all":
    del uses["new_group"], uses["split_group"]  # they compare what the ranks ask for
state = {name: array.copy() for name, array in layer.state_dict().items()}
said = {}
for use, call in uses.items():
    start = time.monotonic()
    try:
        call()
        said[use] = "", "", 0
    except Exception as error:
        said[use] = type(error).__name__, str(error), time.monotonic() - start
assert all((array == state[name]).all() for name, array in layer.state_dict().items())
Path(path, f"{comm.rank}.json").write_text(json.dumps(said))
"""


def outcomes(tmp_path, wrong, odd, ranks, library="this"):
    """Return what each rank says of its calls, by their names."""
    variable, value, *_ = WRONG[wrong]
    (tmp_path / "program.py").write_text(PROGRAM)
    python = sys.executable if library == "this" else other_python()
    arguments = ["-m", "mpi4py", str(tmp_path / "program.py"), variable, value, str(odd), str(tmp_path)]
    told, status, output = launch(python, ranks, arguments, 60)
    assert status == 0, f"{told}\n{output}"
    everyones = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    assert all(seconds < 10 for said in everyones for *_, seconds in said.values()), everyones
    return everyones


UNKNOWN = "expected CUPY_SYNCBN_TRANSPORT to be one of 'auto', 'mpi', 'cuda-aware-mpi', 'nccl' (got 'ncl')"
WRONG = {
    "unknown": ("CUPY_SYNCBN_TRANSPORT", "ncl", "ValueError", UNKNOWN),
    "nccl": ("CUPY_SYNCBN_TRANSPORT", "nccl", "RuntimeError", "CuPy is not installed: pip install"),
    "aware": ("CUPY_SYNCBN_TRANSPORT", "cuda-aware-mpi", "RuntimeError", "CuPy is not installed: pip"),
    "timeout": ("CUPY_SYNCBN_TIMEOUT", "soon", "ValueError", "CUPY_SYNCBN_TIMEOUT to be seconds"),
}


@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("wrong", "library"), [*((wrong, "this") for wrong in WRONG), ("unknown", "other"), ("nccl", "other")]
)
def test_wrong_on_one_rank(tmp_path, wrong, library):
    """The others hear of it in each call."""
    *_, error, words = WRONG[wrong]
    odd = len(wrong) % 3
    for rank, said in enumerate(outcomes(tmp_path, wrong, odd, 3, library)):
        for use, (kind, message, _) in said.items():
            assert kind == (error if rank == odd else "RemoteRankError"), (rank, use, message)
            assert (words if rank == odd else f"rank {odd} failed") in message, (rank, use)


@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_on_all_ranks(tmp_path, wrong):
    *_, error, words = WRONG[wrong]
    for said in outcomes(tmp_path, wrong, "all", 2):
        for use, (kind, message, _) in said.items():
            assert kind == error, (use, message)
            assert words in message, use


@pytest.mark.parametrize("transport", ["nccl", "cuda-aware-mpi"])
def test_group_by_a_transport_that_is_not_there(world, monkeypatch, transport):
    """It is an error when the group is made, on all its ranks, whichever of them lacks something."""
    last = world.size - 1
    if world.rank == last:
        monkeypatch.setitem(sys.modules, "cupy", None)
    match = f"transport '{transport}': rank {last} cannot .* CuPy is not installed: pip install .*'auto'"
    for make in new_group, lambda **keywords: split_group(world.size, **keywords):
        start = time.monotonic()
        if world.size == 1 or "cupy" in sys.modules:
            with pytest.raises(RuntimeError, match=match if world.size == 1 else "transport"):
                make(transport=transport)
        else:
            with pytest.raises(RuntimeError, match=f"transport '{transport}': rank 0 cannot"):
                make(transport=transport)
        assert time.monotonic() - start < 5
    assert new_group().size == world.size


def test_ranks_outside_of_a_group_need_no_transport(world, cupy, nccl, monkeypatch):
    if world.rank == world.size - 1 and world.size > 1:
        monkeypatch.setitem(sys.modules, "cupy", None)
    for transport in "nccl", "cuda-aware-mpi":
        group = new_group([0], transport=transport)
        if world.rank == 0:
            buffer = cupy.ones(3)
            assert group.allreduce(buffer).tolist() == [1, 1, 1]


def test_group_of_a_communicator_of_one(world, monkeypatch):
    """There is nothing to carry, but an unknown name is an error all the same."""
    from mpi4py import MPI

    part = MPI.COMM_SELF.Dup()
    monkeypatch.setenv("CUPY_SYNCBN_TRANSPORT", "pigeon")
    with pytest.raises(ValueError, match=r"CUPY_SYNCBN_TRANSPORT to be one of .*got 'pigeon'"):
        as_group(part)
    monkeypatch.setenv("CUPY_SYNCBN_TRANSPORT", "nccl")
    assert as_group(part).size == 1
    part.Free()
