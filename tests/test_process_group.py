"""Groups of ranks: what they add up, who is in them, what happens when a rank does not come."""

import contextlib
import copy
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers import REPOSITORY, assert_close, clean_environment, random_array, random_batch
from mpi4py import MPI
from reference import BatchNorm

from cupy_syncbn import (
    MPIProcessGroup,
    ProcessGroup,
    SingleProcessGroup,
    SyncBatchNorm,
    default_group,
    new_group,
    split_group,
    sync_batch_norm,
)
from cupy_syncbn.errors import CollectiveTimeoutError


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


@pytest.mark.serial
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
