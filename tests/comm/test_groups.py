"""Groups of ranks: what they add up, who is in them, what happens when a rank does not come."""

import contextlib
import copy
import os
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

from cupy_syncbn import (
    MPIProcessGroup,
    ProcessGroup,
    RankMismatchError,
    RemoteRankError,
    SingleProcessGroup,
    SyncBatchNorm,
    default_group,
    new_group,
    split_group,
    sync_batch_norm,
)
from cupy_syncbn.comm.errors import CollectiveTimeoutError
from support.arrays import random_array, random_batch
from support.compare import assert_close
from support.launcher import REPOSITORY, clean_environment, launch, other_python
from support.reference import BatchNorm


def assert_group_of(group, members, world):
    """Check rank, size and the two operations of a group of these ranks of the world, in their order."""
    assert isinstance(group, ProcessGroup)
    assert (group.rank, group.size) == (members.index(world.rank), len(members))
    buffer = np.array([1.0, world.rank, 0.5])
    group.allreduce(buffer)
    np.testing.assert_array_equal(buffer, [len(members), sum(members), 0.5 * len(members)])
    for root in range(len(members)):
        buffer = np.full(3, world.rank)
        group.broadcast(buffer, root=root)
        np.testing.assert_array_equal(buffer, [members[root]] * 3)


def test_single(world):
    group = SingleProcessGroup()
    assert (group.rank, group.size) == (0, 1)
    buffer = np.arange(3.0)
    group.allreduce(buffer)
    group.broadcast(buffer, root=0)
    np.testing.assert_array_equal(buffer, [0, 1, 2])


def test_default_group_is_the_world(world):
    assert_group_of(default_group(), list(range(world.size)), world)


def test_communicator(world):
    assert_group_of(MPIProcessGroup(world.comm), list(range(world.size)), world)
    backwards = world.comm.Split(0, -world.rank)
    assert_group_of(MPIProcessGroup(backwards), list(range(world.size))[::-1], world)
    assert_group_of(MPIProcessGroup(MPI.COMM_SELF), [world.rank], world)


def test_new_group(world):
    everyone = list(range(world.size))
    assert_group_of(new_group(), everyone, world)
    for members in everyone, everyone[::-1], everyone[-1:], everyone[::2]:
        group = new_group(members)
        if world.rank in members:
            assert_group_of(group, members, world)


@pytest.mark.parametrize("use", ["allreduce", "layer", "function"])
def test_use_by_a_process_that_is_no_member(world, rng, use):
    group = new_group([world.size - 1])
    x = random_array(rng, (4, 3))

    def call():
        if use == "allreduce":
            group.allreduce(np.zeros(3))
        elif use == "layer":
            SyncBatchNorm(3, process_group=group)(x)
        else:
            sync_batch_norm(x, process_group=group)

    if world.rank == world.size - 1:
        call()
    else:
        with pytest.raises(RuntimeError, match="member"):
            call()


def test_new_group_wants_distinct_ranks_of_the_world(world):
    for ranks in [world.size], [-1], [0, 0], []:
        with pytest.raises(ValueError, match="rank"):
            new_group(ranks)
    with pytest.raises(ValueError, match="pigeon"):
        new_group(transport="pigeon")
    for timeout in 0, -1:
        with pytest.raises(ValueError, match="timeout"):
            new_group(timeout=timeout)


@pytest.mark.mpi(min_size=2)
def test_ranks_that_ask_for_different_groups(world):
    """Without a comparison each would get a group, of ranks that others do not mean."""
    odd, last = world.rank == world.size - 1, world.size - 1
    for ask in (
        lambda: new_group([0] if odd else [0, last]),
        lambda: split_group(1 if odd else world.size),
        lambda: new_group(transport="mpi" if odd else "auto"),
    ):
        with pytest.raises(RankMismatchError, match=f"rank {world.rank} is in .*, while rank"):
            ask()
    with pytest.raises(TypeError if odd else RemoteRankError, match="integers" if odd else f"rank {last} "):
        new_group(3 if odd else None)
    with pytest.raises(TypeError if odd else RemoteRankError, match="str" if odd else f"rank {last} "):
        split_group("2" if odd else 1)
    with pytest.raises(ZeroDivisionError if odd else RemoteRankError):
        new_group(0 // (0 if odd else 1) for _ in "1")
    assert new_group().size == world.size


def test_freed_communicator(world, rng):
    """Its duplicate is freed with it, as MPI has only so many; layers on it say so."""
    x = random_array(rng, (4, 3))
    for _ in range(3):
        comm = world.comm.Dup()
        group = MPIProcessGroup(comm)
        unused = MPIProcessGroup(comm.Dup())
        layer = SyncBatchNorm(3, process_group=group)
        layer(x)
        group.allreduce(np.ones(3))
        comm.Free()
        unused._comm.Free()
        assert group._private_comm.comm == MPI.COMM_NULL
        for each in group, unused:
            with pytest.raises(RuntimeError, match="was freed"):
                each.allreduce(np.ones(3))
        with pytest.raises(RuntimeError, match="was freed"):
            group.has_same_ranks(unused)
        if world.size > 1:
            with pytest.raises(RuntimeError, match="was freed"):
                layer(x)


def test_buffers_that_cannot_be_sent(world):
    group = MPIProcessGroup(world.comm)
    with pytest.raises(ValueError, match="contiguous"):
        group.broadcast(np.ones((3, 4)).T)
    for call in group.allreduce, group.broadcast:
        with pytest.raises(TypeError, match="list"):
            call([1.0])
    with pytest.raises(ValueError, match="1024"):
        group.gather_objects("x" * 2000)


def test_two_threads(world):
    """A thread that comes while another exchanges is told so; what that does is not disturbed."""
    group = MPIProcessGroup(world.comm.Dup())
    vector, seen = np.full(5, 1.0), []

    def call():
        with pytest.raises(RuntimeError) as caught:
            group.allreduce(vector)
        seen.append(str(caught.value))

    with group._taken():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert "two threads" in seen[0]
    group.allreduce(vector)
    assert vector[0] == world.size


class SlowToDuplicate(MPI.Intracomm):
    """A communicator during whose duplication other threads run."""

    def Idup(self, info=None):  # noqa: N802, mpi4py's name
        duplications.append(self)
        result = super().Idup()
        time.sleep(0.2)
        return result


duplications = []


@pytest.mark.mpi_skip
def test_two_threads_that_come_first():
    """One duplicates the communicator; another one more would free what the first has."""
    duplications.clear()
    group, outcomes = MPIProcessGroup(SlowToDuplicate(MPI.COMM_SELF.Dup())), []

    def call():
        try:
            outcomes.append(group.allreduce(np.ones(1))[0])
        except RuntimeError as error:
            outcomes.append(str(error)[:11])

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(duplications) == 1
    assert 1.0 in outcomes
    assert set(outcomes) <= {1.0, "two threads"}


@pytest.mark.mpi_skip
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it takes fork")
def test_process_forked_before_mpi_is_started():
    """It may be a rank itself."""
    code = """
import os
import numpy as np
import cupy_syncbn
if os.fork() == 0:
    from mpi4py import MPI
    group = cupy_syncbn.MPIProcessGroup(MPI.COMM_WORLD)
    os._exit(int(group.allreduce(np.ones(1))[0]) - 1)
assert os.wait()[1] == 0
"""
    command = [sys.executable, "-W", "error", "-c", code]
    subprocess.run(command, check=True, timeout=60, env=clean_environment(PYTHONPATH=str(REPOSITORY)))


def test_split_group(world):
    for group_size in range(1, world.size + 1):
        if world.size % group_size:
            with pytest.raises(ValueError, match="divide"):
                split_group(group_size)
            continue
        first = world.rank // group_size * group_size
        assert_group_of(split_group(group_size), list(range(first, first + group_size)), world)
    with pytest.raises(ValueError, match="group_size"):
        split_group(0)


def test_timeout_default(world, monkeypatch):
    monkeypatch.setenv("CUPY_SYNCBN_TIMEOUT", "12.5")
    assert MPIProcessGroup(world.comm).timeout == 12.5
    assert MPIProcessGroup(world.comm, timeout=3).timeout == 3
    monkeypatch.setenv("CUPY_SYNCBN_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="soon"):
        MPIProcessGroup(world.comm)
    monkeypatch.delenv("CUPY_SYNCBN_TIMEOUT")
    assert MPIProcessGroup(world.comm).timeout == 600


def test_wrong_kinds(world):
    for wrong in "world", 3, [0]:
        with pytest.raises(TypeError, match="process_group"):
            SyncBatchNorm(3, process_group=wrong)
        with pytest.raises(TypeError, match="comm"):
            MPIProcessGroup(wrong)
    with pytest.raises(ValueError, match="COMM_NULL"):
        MPIProcessGroup(MPI.COMM_NULL)


@pytest.mark.parametrize("kind", ["comm", "new_group", "split_group"])
def test_layers_in_groups(world, rng, kind):
    """Two halves of the world (or the world, where its size is odd) train independently."""
    halves = 2 if world.size % 2 == 0 else 1
    group_size = world.size // halves
    half = world.rank // group_size
    if kind == "comm":
        group = world.comm.Split(half, world.rank)
    elif kind == "split_group":
        group = split_group(group_size)
    else:
        everyones = [new_group(range(i * group_size, (i + 1) * group_size)) for i in range(halves)]
        group = everyones[half]
    batches = [random_batch(rng, (12, 3, 4)) for _ in range(halves)]
    dy = random_array(rng, (12, 3, 4))
    n = 12 // group_size
    part = slice(n * (world.rank % group_size), n * (world.rank % group_size + 1))
    x, dy = batches[half][: n * group_size], dy[: n * group_size]
    layer, reference = SyncBatchNorm(3, process_group=group), BatchNorm(3)
    assert_close(layer(x[part]), reference(x), part)
    assert_close(layer.backward(dy[part]), reference.backward(dy), part)
    assert_close(layer.running_var, reference.running_var)


def test_group_of_one_needs_two_values(rng, world):
    layer = SyncBatchNorm(3, process_group=split_group(1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(random_array(rng, (1, 3)))


def test_messages_meet_none_of_the_users(world):
    """A receive that the user has posted for anyone and anything stays open."""
    comm = world.comm.Dup()
    buffer = np.zeros(1)
    request = comm.Irecv(buffer, source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)
    group = MPIProcessGroup(comm)
    for _ in range(3):
        group.allreduce(np.zeros(1000))
    assert not request.Test()
    world.comm.Barrier()
    comm.Send(np.ones(1), dest=(world.rank + 1) % world.size)
    request.Wait()
    assert buffer[0] == 1


@pytest.mark.parametrize("dtype", ["int64", "float16", "float32", ml_dtypes.bfloat16])
def test_broadcast_of_any_dtype(world, dtype):
    buffer = np.full((2, 3), world.rank + 1, dtype)
    default_group().broadcast(buffer, root=world.size - 1)
    assert (buffer == world.size).all()


def test_large_message(world):
    buffer = np.full(1_000_000, world.rank + 1.0)
    default_group().allreduce(buffer)
    assert (buffer == world.size * (world.size + 1) / 2).all()


def test_copies_of_a_group_are_the_group(world):
    for group in SingleProcessGroup(), MPIProcessGroup(world.comm), new_group([0]):
        assert copy.deepcopy(group) is group
        assert copy.copy(group) is group


def test_rank_that_does_not_come(world):
    group = MPIProcessGroup(world.comm.Dup(), timeout=0.2)
    group.allreduce(np.zeros(3))
    buffer = np.ones(3)
    if world.size > 1 and world.rank > 0:
        for _ in range(2):  # the group cannot be used any more
            with pytest.raises(CollectiveTimeoutError):
                group.allreduce(buffer)
    # The rank comes late, so that MPI can end the exchange.
    world.comm.Barrier()
    if world.rank == 0:
        try:
            group.allreduce(buffer)
        except CollectiveTimeoutError:
            assert world.size > 1
        else:
            assert buffer[0] == world.size


def test_rank_that_never_comes_to_the_first_exchange(world):
    """The communicator's duplicate is made then, which must not wait for ever either."""
    group = MPIProcessGroup(world.comm.Dup(), timeout=0.2)
    if world.size > 1 and world.rank > 0:
        for _ in range(2):
            with pytest.raises(CollectiveTimeoutError):
                group.allreduce(np.zeros(3))
    world.comm.Barrier()
    if world.rank == 0:
        with contextlib.suppress(CollectiveTimeoutError):
            group.allreduce(np.zeros(3))
    world.comm.Barrier()


def test_layer_names_itself_when_a_rank_does_not_come(world, rng):
    comm = world.comm.Dup()
    layer = SyncBatchNorm(3, process_group=MPIProcessGroup(comm, timeout=0.2), name="stem")
    x = random_array(rng, (4, 3))
    layer(x)
    if world.rank > 0:
        with pytest.raises(CollectiveTimeoutError, match="stem"):
            layer(x)
    world.comm.Barrier()
    if world.rank == 0:
        try:
            layer(x)
        except CollectiveTimeoutError:
            assert world.size > 1


FORKED = """
import os
import numpy as np
from mpi4py import MPI
from cupy_syncbn import MPIProcessGroup

used, unused = (MPIProcessGroup(MPI.COMM_WORLD.Dup()) for _ in "12")
used.allreduce(np.ones(3))
child = os.fork()
if child == 0:
    refused = 0
    for group in used, unused:
        try:
            group.allreduce(np.ones(3))
        except RuntimeError as error:
            refused += "forked" in str(error) and group.size == 2
    os._exit(refused != 2)
assert os.waitpid(child, 0)[1] == 0
assert used.allreduce(np.ones(3))[0] == 2
"""


@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it takes fork")
@pytest.mark.parametrize("library", ["this", "other"])
def test_forked_process(tmp_path, library):
    """It is refused, at once, and the rank goes on."""
    (tmp_path / "program.py").write_text(FORKED)
    python = sys.executable if library == "this" else other_python()
    told, status, output = launch(python, 2, ["-m", "mpi4py", str(tmp_path / "program.py")], 60)
    assert status == 0, f"{told}\n{output}"


WORKERS = """
import multiprocessing, sys
import numpy as np
from cupy_syncbn import SyncBatchNorm, default_group
rank = default_group().rank  # on import, as in the README's example: the workers do it too

def load(number):
    assert default_group().size == 1
    return np.full((4, 3), number, "f4")

if __name__ == "__main__":
    layer = SyncBatchNorm(3, momentum=None)
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        for number in range(3):
            layer(pool.apply_async(load, (10 * rank + number,)).get(timeout=30))
    assert default_group().size == 2
    np.testing.assert_allclose(layer.running_mean, 6, rtol=1e-6)
"""


@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize("library", ["this", "other"])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_of_multiprocessing(tmp_path, method, library):
    """They have the variables of their rank, and MPI's end if they start it crashes the job."""
    (tmp_path / "program.py").write_text(WORKERS)
    python = sys.executable if library == "this" else other_python()
    told, status, output = launch(python, 2, ["-m", "mpi4py", str(tmp_path / "program.py"), method], 60)
    assert status == 0, f"{told}\n{output}"


@pytest.mark.mpi_skip
@pytest.mark.parametrize("imports_mpi", [True, False])
def test_world_without_a_launcher(imports_mpi):
    """MPI is the world once mpi4py.MPI is imported; until then it is left alone."""
    code = f"""
import sys
if {imports_mpi}:
    from mpi4py import MPI
import numpy as np
from cupy_syncbn import SyncBatchNorm, default_group
layer = SyncBatchNorm(3)
layer.backward(layer(np.arange(12, dtype="f4").reshape(4, 3)))
group = default_group()
assert (group.rank, group.size) == (0, 1)
assert ("mpi4py.MPI" in sys.modules) == {imports_mpi}
"""
    command = [sys.executable, "-W", "error", "-c", code]
    subprocess.run(command, check=True, timeout=60, env=clean_environment(PYTHONPATH=str(REPOSITORY)))
