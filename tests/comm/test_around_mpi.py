"""Before MPI starts, after it ends, and past the number of communicators that it has: errors that say so.

MPI's libraries end a process that calls them too early or too late. Each use of a group must raise an error
before, with a remedy that works.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path

import pytest

from support.launcher import clean_environment, launch, other_python, run, vendor_of

pytestmark = [pytest.mark.launch, pytest.mark.mpi_skip]

USES = {
    "default_group": "default_group()",
    "new_group": "new_group()",
    "new_group_of_one": "new_group([0])",
    "split_group": "split_group(1)",
    "group_of_world": "MPIProcessGroup(MPI.COMM_WORLD)",
    "group_of_self": "MPIProcessGroup(MPI.COMM_SELF)",
    "local_rank": "local_rank(MPI.COMM_WORLD)",
    "bind_device": "bind_device(MPI.COMM_WORLD)",
    "nccl": "NCCLProcessGroup()",
    "layer": "SyncBatchNorm(3)(x)",
    "layer_on_world": "SyncBatchNorm(3, process_group=MPI.COMM_WORLD)(x)",
    "model": "DistributedDataParallel(SyncBatchNorm(3), MPI.COMM_WORLD)",
    "function": "sync_batch_norm(x, process_group=MPI.COMM_WORLD)",
}
"""What needs MPI, and looks at it first."""

OF_GROUPS = {
    f"{use.split('(')[0].split('.')[-1]}_{group}": use.format(group)
    for group in ("world", "used", "unused", "made")
    for use in (
        "{}.allreduce(np.ones(3))",
        "{}.allreduce_checked(np.zeros(5))",
        "{}.broadcast(np.ones(3))",
        "{}.has_same_ranks(used)",
        "SyncBatchNorm(3, process_group={})(x)",
    )
}
"""What groups do that were made before MPI ended."""

HARMLESS = {
    "free_world": "world.free()",
    "free_made": "made.free()",
    "free_unused": "unused.free()",
    "twice": "made.free()",
    "evaluation": "layer.eval()(x)",
    "single": "SyncBatchNorm(3, process_group=SingleProcessGroup())(x)",
    "size": "used.size",
}

START = """
import json, os, sys
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
import numpy as np
from cupy_syncbn import *

x = np.ones((4, 3), "f4")
lines = []

def attempt(uses):
    for name, use in json.loads(uses).items():
        try:
            eval(use)
            lines.append([name, None, ""])
        except Exception as error:
            lines.append([name, type(error).__name__, str(error)])
"""

BEFORE = """
attempt(sys.argv[1])
MPI.Init_thread()
assert default_group().size == MPI.COMM_WORLD.size
if default_group().size > 1:
    assert new_group().allreduce(np.ones(1))[0] == MPI.COMM_WORLD.size
SyncBatchNorm(3)(x)
MPI.Finalize()  # as mpi4py does neither
"""

AFTER = """
MPI.Init_thread()
world, used, unused, made = (
    default_group(), MPIProcessGroup(MPI.COMM_WORLD.Dup()), MPIProcessGroup(MPI.COMM_WORLD.Dup()), new_group()
)
layer = SyncBatchNorm(3, process_group=made)
layer.backward(layer(x))
used.broadcast(np.ones(3))
world.allreduce(np.ones(3))
new_group().free()
MPI.Finalize()
attempt(sys.argv[1])
"""

# Into a file for each rank: a launcher may mix up long lines.
END = """
from pathlib import Path
Path(sys.argv[2], str(os.getpid())).write_text(json.dumps(lines))
"""


@functools.cache
def attempts(program, uses, ranks, library):
    """Return the error and the message of each use, by name, on each rank that prints whole lines."""
    python = sys.executable if library == "this" else other_python()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-W", "error", "-c", START + program + END, uses, folder]
        if ranks:
            told, status, output = launch(python, ranks, arguments, 60)
        else:
            told, (status, output) = python, run([python, *arguments], clean_environment(), 60)
        assert status == 0, f"{told}\n{output}"
        found = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    assert len(found) == max(ranks, 1), output
    return [{name: (kind, message) for name, kind, message in lines} for lines in found]


@pytest.mark.parametrize(("ranks", "library"), [(0, "this"), (2, "this"), (2, "other")])
@pytest.mark.parametrize("use", USES)
def test_before_mpi_starts(use, ranks, library):
    """Also without a launcher, where mpi4py.MPI is imported."""
    for found in attempts(BEFORE, json.dumps(USES), ranks, library):
        kind, message = found[use]
        assert kind == "RuntimeError", message
        assert "MPI is not initialized" in message
        assert "call MPI.Init()" in message


@pytest.mark.parametrize("library", ["this", "other"])
@pytest.mark.parametrize("use", USES | OF_GROUPS)
def test_after_mpi_has_ended(use, library):
    for found in attempts(AFTER, json.dumps(USES | OF_GROUPS | HARMLESS), 3, library):
        kind, message = found[use]
        if use == "default_group":  # known, and not used
            assert kind is None
            continue
        assert kind == "RuntimeError", message
        assert "MPI is finalized" in message


@pytest.mark.parametrize("library", ["this", "other"])
@pytest.mark.parametrize("use", HARMLESS)
def test_what_needs_no_mpi_works_after_its_end(use, library):
    for found in attempts(AFTER, json.dumps(USES | OF_GROUPS | HARMLESS), 3, library):
        assert found[use] == (None, "")


# On all ranks at once: what runs out first on one of them, runs out for all.
LIMIT = """
import sys
import tempfile
from pathlib import Path
import numpy as np
from mpi4py import MPI
from cupy_syncbn import *

def refused(call):
    try:
        call()
    except RuntimeError as error:
        assert not isinstance(error, CollectiveTimeoutError), error
        text = str(error)
        assert "MPI could not make a communicator" in text and "group.free()" in text, text
        return True
    return False

world = MPI.COMM_WORLD
x = np.ones((4, 3), "f4")
default_group().allreduce(np.ones(1))
unused = world.Dup()
filled = []
try:
    while True:
        filled.append(world.Dup())
except MPI.Exception:
    pass
group = MPIProcessGroup(unused, timeout=30)
calls = [
    new_group,
    lambda: split_group(1),
    lambda: SyncBatchNorm(3, process_group=group)(x),
    lambda: new_group([0], timeout=20),
    lambda: group.allreduce(np.ones(1)),
    lambda: MPIProcessGroup(unused).broadcast(np.ones(1)),
    lambda: new_group(comm=unused),
]
# Open MPI (5.0.11) tells only the members of a group, and lets the others wait for them until the timeout.
# Its MPI_Comm_idup crashes when it fails again.
is_mpich = MPI.get_vendor()[0] == "MPICH"
for call in calls if is_mpich else calls[:3]:
    assert refused(call)
assert default_group().allreduce(np.ones(1))[0] == world.size  # as if nothing had been
for comm in filled[:2]:
    comm.Free()
groups = [new_group()]
groups[0].allreduce(np.ones(1))
assert refused(new_group)
assert not is_mpich or refused(lambda: group.allreduce(np.ones(1)))
with groups.pop():  # the remedy
    pass
with new_group() as again:
    assert again.allreduce(np.ones(1))[0] == world.size
assert group.allreduce(np.ones(1))[0] == world.size
print("came to the end", flush=True)
"""


def past_the_limit(python, ranks, deadline):
    told, status, output = launch(python, ranks, ["-W", "error", "-m", "mpi4py", "-c", LIMIT], deadline)
    assert output.count("came to the end") == ranks, f"{told}\n{output}"
    # Open MPI's MPI_Finalize (5.0.11) frees what it must not, if there were so many.
    assert status == 0 or vendor_of(python) == "Open MPI", f"{told}\n{output}"


def of_vendor(vendor):
    pythons = [sys.executable] if vendor_of(sys.executable) == vendor else [other_python()]
    if vendor_of(pythons[0]) != vendor:
        pytest.skip(f"there is no {vendor}")
    return pythons[0]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_past_the_limit_of_mpich(ranks):
    past_the_limit(of_vendor("MPICH"), ranks, 60)


@pytest.mark.long
def test_past_the_limit_of_open_mpi():
    """It has 32 times as many."""
    past_the_limit(of_vendor("Open MPI"), 2, 400)
