"""new_group and split_group: what they compare, a rank that is lost in the middle, groups that are freed."""

import contextlib
import functools
import json
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

from cupy_syncbn import (
    CollectiveTimeoutError,
    MPIProcessGroup,
    RankMismatchError,
    RemoteRankError,
    SingleProcessGroup,
    SyncBatchNorm,
    default_group,
    new_group,
    split_group,
)
from cupy_syncbn.comm.groups import as_group
from support.arrays import random_array
from support.launcher import REPOSITORY, clean_environment, launch, other_python, run

# What the ranks compare


def recorded(monkeypatch, call):
    """Return the lengths of the vectors that a call sums, and how often it gathers objects."""
    lengths, gathered = [], []
    sum_of, gather = MPIProcessGroup.allreduce_checked, MPIProcessGroup.gather_objects
    with monkeypatch.context() as patch:
        patch.setattr(
            MPIProcessGroup, "allreduce_checked", lambda s, v: (lengths.append(v.nbytes), sum_of(s, v))[1]
        )
        patch.setattr(MPIProcessGroup, "gather_objects", lambda s, v: (gathered.append(v), gather(s, v))[1])
        call()
    return lengths, len(gathered)


@pytest.mark.mpi(min_size=2)
def test_ranks_that_agree_sum_some_bytes(world, monkeypatch):
    everyone = list(range(world.size))
    for call in (
        new_group,
        lambda: new_group(everyone[::-1]),
        lambda: new_group([0], transport="mpi"),
        lambda: new_group(everyone, timeout=30 + world.rank),
        lambda: split_group(1),
        lambda: split_group(world.size),
    ):
        (nbytes,), gathered = recorded(monkeypatch, call)
        assert nbytes < 256
        assert gathered == 0


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("own", "others", "words"),
    [
        (lambda n: new_group([0, 1]), lambda n: new_group([1, 0]), ("[0, 1]", "[1, 0]")),
        (lambda n: new_group(), lambda n: split_group(n), ("new_group", "split_group")),
        (lambda n: split_group(1), lambda n: new_group([0]), ("split_group(1", "new_group([0]")),
        (lambda n: new_group(transport="mpi"), lambda n: new_group(transport="nccl"), ("'mpi'", "'nccl'")),
        (
            lambda n: split_group(n, transport="mpi"),
            lambda n: split_group(n, transport="auto"),
            ("'mpi'", "'auto'"),
        ),
    ],
)
def test_ranks_that_ask_for_something_else(world, monkeypatch, own, others, words):
    odd = world.rank == world.size - 1
    with pytest.raises(RankMismatchError) as caught:
        (own if odd else others)(world.size)
    told, of_others = str(caught.value).split("while rank")
    assert words[0 if odd else 1] in told
    assert words[1 if odd else 0] in of_others
    assert new_group().size == world.size  # the ranks are in step


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda n: new_group(timeout=-1), ValueError),
        (lambda n: new_group(transport="pigeon"), ValueError),
        (lambda n: new_group([0, 0]), ValueError),
        (lambda n: new_group(["0"]), TypeError),
        (lambda n: split_group(n + 1), ValueError),
        (lambda n: split_group(1, timeout=0), ValueError),
        (lambda n: new_group(iter_that_fails()), MemoryError),
    ],
)
def test_one_rank_fails(world, wrong, error):
    """The others hear of it at once: also where its timeout is what is wrong."""
    start = time.monotonic()
    if world.rank == world.size - 1:
        with pytest.raises(error):
            wrong(world.size)
    else:
        with pytest.raises(RemoteRankError, match=f"rank {world.size - 1} failed before new_group"):
            new_group()
    assert time.monotonic() - start < 5
    assert new_group([0]) is not None


def iter_that_fails():
    yield 0
    raise MemoryError


@pytest.mark.mpi(min_size=2)
def test_rank_in_another_call(world, rng):
    """It is in a layer of the same communicator: all know at once."""
    comm = world.comm.Dup()
    layer = SyncBatchNorm(3, process_group=MPIProcessGroup(comm, timeout=30))
    x = random_array(rng, (4, 3))
    layer(x)
    with pytest.raises(RankMismatchError, match=r"while ranks? .* (is|are) in "):
        layer(x) if world.rank == 0 else new_group(comm=comm, timeout=30)
    assert new_group(comm=comm).size == world.size


@pytest.mark.mpi(min_size=2)
def test_requests_that_differ_far_behind(world):
    """In what an error no longer shows, they are compared as well."""
    everyone = list(range(world.size))
    long = [*everyone, *everyone] * 40  # wrong on all ranks alike, but for the end
    with pytest.raises(ValueError, match="distinct"):
        new_group(long)
    with pytest.raises((ValueError, RemoteRankError)):
        new_group(long if world.rank else everyone)


# Groups that are freed


def assert_freed(group):
    for use in (
        lambda: group.allreduce(np.ones(3)),
        lambda: group.allreduce_checked(np.zeros(5)),
        lambda: group.broadcast(np.ones(3)),
        lambda: group.has_same_ranks(group),
        lambda: group.gather_objects(1),
    ):
        with pytest.raises(RuntimeError, match="group was freed"):
            use()


MAKE = {
    "all": new_group,
    "backwards": lambda: new_group(range(default_group().size)[::-1]),
    "some": lambda: new_group(range((default_group().size + 1) // 2)),
    "halves": lambda: split_group(default_group().size // (1 + (default_group().size % 2 == 0))),
    "alone": lambda: split_group(1),
    "comm": lambda: MPIProcessGroup(MPI.COMM_WORLD.Dup()),
    "self": lambda: MPIProcessGroup(MPI.COMM_SELF.Dup()),
}


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("make", MAKE)
def test_freed_group(world, rng, make, used):
    x = random_array(rng, (4, 3))
    group = MAKE[make]()
    if not isinstance(group, MPIProcessGroup):  # not a member
        group.free()
        return
    comm, layer = group._comm, SyncBatchNorm(3, process_group=group)
    if used:
        layer.backward(layer(x))
        group.allreduce(np.ones(3))
        private = group._private_comm.comm
    for _ in range(2):
        group.free()
        assert_freed(group)
    assert (comm == MPI.COMM_NULL) == (make not in ("comm", "self"))
    assert not used or private == MPI.COMM_NULL
    if group.size > 1:
        with pytest.raises(RuntimeError, match="group was freed"):
            layer(x)
    if comm != MPI.COMM_NULL:  # the caller's own: a new group on it works
        assert MPIProcessGroup(comm).allreduce(np.ones(1))[0] == group.size
        comm.Free()


@pytest.mark.parametrize("fails", [False, True])
def test_with(world, fails):
    """The group is freed at the end, also where that is an error."""
    try:
        with new_group() as group:
            assert group.allreduce(np.ones(1))[0] == world.size
            if fails:
                raise LookupError
    except LookupError:
        assert fails
    assert_freed(group)
    with new_group([world.size - 1]) as part:
        if world.rank == world.size - 1:
            assert part.allreduce(np.ones(1))[0] == 1


def test_groups_that_stay(world):
    """Of the world and of one process: layers without an argument share them."""
    for group in (
        SingleProcessGroup(),
        default_group(),
        as_group(MPI.COMM_WORLD),
        MPIProcessGroup(MPI.COMM_WORLD),
    ):
        with group:
            pass
        group.free()
        assert group.allreduce(np.ones(1))[0] == group.size
    assert default_group().allreduce(np.ones(1))[0] == world.size


def test_groups_that_share_a_duplicate(world):
    """It is freed with the last of them; the communicator is the caller's."""
    comm = world.comm.Dup()
    first, second, unused = (MPIProcessGroup(comm) for _ in range(3))
    for group in first, second:
        group.allreduce(np.ones(1))
    private = first._private_comm
    for freed, left in (first, second), (unused, second):
        freed.free()
        assert_freed(freed)
        assert left.allreduce(np.ones(1))[0] == world.size
    second.free()
    assert private.comm == MPI.COMM_NULL
    assert comm.size == world.size
    comm.Free()


def test_freed_group_of_a_communicator(world):
    """A layer on the communicator gets another."""
    comm = world.comm.Dup()
    group = as_group(comm)
    group.free()
    again = as_group(comm)
    assert again.allreduce(np.ones(1))[0] == world.size
    comm.Free()
    again.free()


def test_free_in_another_thread(world):
    """Not while a group is used."""
    group = new_group()
    group.allreduce(np.ones(1))
    with group._taken(), ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="two threads"):
        pool.submit(group.free).result()
    assert group.allreduce(np.ones(1))[0] == world.size
    group.free()


@pytest.mark.mpi(min_size=2)
def test_freed_after_it_was_given_up(world):
    """MPI keeps it, as it may still use it; each use says so that it is freed."""
    group = new_group(timeout=0.3)
    group.allreduce(np.ones(1))
    if world.rank:
        with pytest.raises(CollectiveTimeoutError):
            group.allreduce(np.ones(1))
        comm = group._comm
        group.free()
        assert comm != MPI.COMM_NULL
        assert_freed(group)
    world.comm.Barrier()
    if not world.rank:
        with contextlib.suppress(CollectiveTimeoutError):  # the messages for it may be there
            group.allreduce(np.ones(1))
        group.free()
        group.free()
        assert_freed(group)
    assert new_group().size == world.size


FORKED = """
import os
import numpy as np
from mpi4py import MPI
from cupy_syncbn import MPIProcessGroup, new_group

groups = [new_group(), new_group(), MPIProcessGroup(MPI.COMM_WORLD.Dup())]
for group in groups[1:]:
    group.allreduce(np.ones(1))
child = os.fork()
refused = 0
if child == 0:
    for group in groups:
        with group:
            pass
        try:
            group.allreduce(np.ones(1))
        except RuntimeError as error:
            refused += "was freed" in str(error)
    os._exit(refused != 3)
assert os.waitpid(child, 0)[1] == 0
for group in groups:
    assert group.allreduce(np.ones(1))[0] == 1
    group.free()
"""


@pytest.mark.mpi_skip
def test_group_freed_by_a_forked_process():
    """What is freed there is not its rank's."""
    command = [sys.executable, "-W", "error", "-c", FORKED]
    status, output = run(command, clean_environment(PYTHONPATH=str(REPOSITORY)), 60)
    assert status == 0, output


LOOP = """
import sys
import numpy as np
from cupy_syncbn import SyncBatchNorm, default_group, new_group, split_group
world = default_group()
layer, x = SyncBatchNorm(3), np.ones((4, 3), "f4")
for number in range(int(sys.argv[1])):
    with (new_group() if number % 2 else split_group(world.size)) as group:
        if number % 3:
            assert group.allreduce(np.ones(1))[0] == world.size
        elif number % 5 == 0:
            layer.process_group = group
            layer.backward(layer(x))
"""


def loop(tmp_path, library, number, deadline):
    (tmp_path / "program.py").write_text(LOOP)
    python = sys.executable if library == "this" else other_python()
    arguments = ["-W", "error", "-m", "mpi4py", str(tmp_path / "program.py"), str(number)]
    told, status, output = launch(python, 2, arguments, deadline)
    assert status == 0, f"{told}\n{output}"


@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize("library", ["this", "other"])
def test_making_and_freeing(tmp_path, library):
    loop(tmp_path, library, 300, 60)


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize("library", ["this", "other"])
def test_making_and_freeing_more_than_there_are(tmp_path, library):
    """Of MPICH's 2048 communicators."""
    loop(tmp_path, library, 5000, 500)


FEWER_THREADS = """
import sys, threading
import mpi4py
mpi4py.rc.thread_level = sys.argv[1]
from mpi4py import MPI
import numpy as np
from cupy_syncbn import new_group, split_group

if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
    threading.Thread = None
for make in new_group, lambda: new_group([1, 0]), lambda: split_group(2), lambda: split_group(1):
    with make() as group:
        assert group.allreduce(np.ones(1))[0] == group.size
"""


@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize(("level", "library"), [("single", "this"), ("serialized", "other")])
def test_mpi_that_takes_calls_of_one_thread(tmp_path, level, library):
    """There no other thread calls it."""
    (tmp_path / "program.py").write_text(FEWER_THREADS)
    python = sys.executable if library == "this" else other_python()
    told, status, output = launch(python, 2, ["-m", "mpi4py", str(tmp_path / "program.py"), level], 60)
    assert status == 0, f"{told}\n{output}"


# A rank that is lost in the middle


class Lost(NamedTuple):
    """A case of lost_in_split.py: the last of some ranks is lost."""

    call: str
    moment: str
    loss: str
    ending: str
    ranks: int

    def __str__(self):
        return "-".join(map(str, self))


TIMEOUT = 1.0
MARGIN = 2.0
LAUNCHER_MARGIN = 5.0
DEADLINE = 60

# The first list on this library, with the other's part of it; all of both lists on both by -m long.
CASES = [
    Lost("all", "before", "asleep", "uncaught", 2),
    Lost("split", "inside", "killed", "caught", 3),
    Lost("backwards", "before", "stopped", "finalize", 3),
    Lost("some", "before", "late", "caught", 4),
    Lost("split", "before", "raises", "uncaught", 5),
]
MORE = [
    Lost("some", "before", "asleep", "caught", 4),
    Lost("backwards", "inside", "stopped", "uncaught", 2),
    Lost("all", "inside", "stopped", "caught", 5),
    Lost("split", "before", "killed", "uncaught", 2),
    Lost("some", "before", "killed", "finalize", 5),
    Lost("all", "inside", "killed", "uncaught", 4),
    Lost("backwards", "before", "ended", "caught", 3),
    Lost("split", "before", "late", "caught", 5),
    Lost("all", "before", "late", "finalize", 2),
    Lost("all", "before", "asleep", "interrupt", 3),
    Lost("split", "inside", "stopped", "interrupt", 2),
]
FEW = CASES[:3]

# A process between the launcher and the rank, so that no launcher notices that the rank has ended.
WRAPPER = """
import subprocess, sys, time
status = subprocess.run([sys.executable, *sys.argv[1:]], close_fds=False).returncode
time.sleep(1000 if status in (-9, 7) else 0)
sys.exit(status)
"""


class Outcome(NamedTuple):
    told: str
    status: int | None
    ended: float
    reports: list[dict]
    """By rank."""


def lose(case, library):
    python = sys.executable if library == "this" else other_python()
    program = Path(__file__).with_name("lost_in_split.py")
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", "mpi4py", str(program), folder, case.call, case.moment, case.loss, case.ending]
        wrapper = ["-c", WRAPPER] if case.loss in ("killed", "ended") else []
        command, status, output = launch(python, case.ranks, [*wrapper, *arguments], DEADLINE)
        ended = time.time()
        reports = []
        for rank in range(case.ranks):
            lines = Path(folder, f"{rank}.jsonl").read_text().splitlines()
            reports.append({key: value for line in lines for key, value in json.loads(line).items()})
    return Outcome(f"{command}\nended with {status}\n{output[-5000:]}", status, ended, reports)


@functools.cache
def lose_all(cases, library):
    """Launch some at once, as they mostly wait."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(cases, pool.map(lose, cases, [library] * len(cases)), strict=True))


def assert_others_raise_and_all_end(run, case):
    last = case.ranks - 1
    assert run.status is not None, run.told
    assert all("starts" in report for report in run.reports), run.told
    assert "lost" in run.reports[last], run.told
    start = run.reports[0]["starts"]
    assert run.ended < start + TIMEOUT + MARGIN + LAUNCHER_MARGIN, run.told
    if case.loss == "late":  # it hears that the others have gone
        assert "when another rank had given up waiting" in run.reports[last]["message"], run.told
    for report in run.reports[:last]:
        if case.loss == "raises":  # the runner ends all ranks, before they notice
            continue
        if case.ending == "interrupt":  # and it ends those whose error is a moment later
            assert report.get("error", "KeyboardInterrupt") == "KeyboardInterrupt", run.told
            assert report.get("seconds", 0) < MARGIN, run.told
            continue
        assert report["error"] == "CollectiveTimeoutError", run.told
        assert report["seconds"] < TIMEOUT + MARGIN, run.told
        name = "split_group(1" if case.call == "split" else "new_group(["
        assert report["message"].startswith(name), run.told
        # Less than the timeout if it came when others were waiting.
        waited = rf"waited (1|0(\.\d)?) s for rank {last} in MPI_Comm_split"
        assert re.search(waited, report["message"]), run.told
        assert "was given up" in report["again"]
        assert ("end" in report) == (case.loss == "late" or case.ending == "caught"), run.told
        assert report.get("goes_on") == (case.ranks if case.loss == "late" else None), run.told
    assert (run.status == 0) == (case.loss == "late"), run.told


@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rank_lost_in_a_split(case):
    assert_others_raise_and_all_end(lose_all(tuple(CASES), "this")[case], case)


@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize("case", FEW, ids=str)
def test_rank_lost_in_a_split_of_the_other_library(case):
    assert_others_raise_and_all_end(lose_all(tuple(FEW), "other")[case], case)


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize("library", ["this", "other"])
@pytest.mark.parametrize("case", CASES[3:] + MORE, ids=str)
def test_rank_lost_in_a_split_otherwise(case, library):
    assert_others_raise_and_all_end(lose_all(tuple(CASES[3:] + MORE), library)[case], case)
