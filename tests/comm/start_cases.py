"""What ranks do as they start: each case is a function, and `start_cases.py NAME` runs it on each rank.

The rank's number is taken from the launcher, as a case may be about what happens before MPI is started.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1")))
LAST = SIZE - 1

CHILD = """
import sys
import numpy as np
from cupy_syncbn import SyncBatchNorm, default_group
SyncBatchNorm(3)(np.ones((4, 3), "f4"))
sys.stdout.write(f"child {sys.argv[1]} of {default_group().size} {'mpi4py.MPI' in sys.modules}\\n")
"""


def say(text):
    """Print a line at once, into which the launcher puts nothing."""
    os.write(1, f"{text}\n".encode())


def error_of(call):
    """Return the text of the RuntimeError that a call raises."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    raise AssertionError(f"{call} raised nothing")


def wait_at_rest():
    """Meet the other ranks, and leave the cores to what one of them has started."""
    from mpi4py import MPI

    request = MPI.COMM_WORLD.Ibarrier()
    while not request.Test():
        time.sleep(0.02)


def train():
    """Make a step on all ranks."""
    from cupy_syncbn import DistributedDataParallel, SyncBatchNorm, default_group

    model = DistributedDataParallel(SyncBatchNorm(3))
    model.backward(model(np.ones((4, 3), "f4")))
    model.reduce_gradients()
    total = default_group().allreduce(np.ones(1))[0]
    say(f"trained as {default_group().rank} of {total:g}")


# ---- A rank fails before its first layer; the others are at it ----
def missing_file():
    import cupy_syncbn  # noqa: F401

    if RANK == LAST:
        np.load("no/such/file.npy")
    train()


def wrong_option():
    import argparse

    import cupy_syncbn  # noqa: F401

    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int)
    parser.parse_args(["--epochs", "many" if RANK == LAST else "3"])
    train()


def exits_with_a_text():
    import cupy_syncbn  # noqa: F401

    if RANK == 0:
        sys.exit("no licence on this node")
    train()


def missing_module():
    import cupy_syncbn  # noqa: F401

    if RANK == LAST:
        import module_of_another_node  # noqa: F401
    train()


def wrong_layer():
    from cupy_syncbn import SyncBatchNorm

    SyncBatchNorm(8, activation="relu" if RANK != LAST else "sine")
    train()


def interrupted():
    import cupy_syncbn  # noqa: F401

    if RANK == 0:
        raise KeyboardInterrupt("of rank 0")
    train()


def leaves_early():
    import cupy_syncbn  # noqa: F401

    if RANK == LAST:
        sys.exit(0)
    train()


# ---- A rank never starts MPI ----
def never_imports():
    if RANK == 0:
        sys.exit(0)
    train()


def hangs_before_the_import():
    if RANK == LAST:
        time.sleep(30)
    train()


def own_timers_are_kept():
    import faulthandler
    import signal

    faulthandler.dump_traceback_later(20)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 100, 7)
    if RANK == 0:
        sys.exit(0)
    train()


# ---- What the program set in mpi4py.rc ----
def rc_initialize():
    import mpi4py

    mpi4py.rc.initialize = False
    import cupy_syncbn

    for use in (
        cupy_syncbn.default_group,
        cupy_syncbn.local_rank,
        lambda: cupy_syncbn.SyncBatchNorm(3)(np.ones((4, 3), "f4")),
        lambda: cupy_syncbn.SyncBatchNorm(3, process_group=sys.modules["mpi4py.MPI"].COMM_WORLD),
    ):
        assert "call MPI.Init() or MPI.Init_thread() before" in error_of(use)
    from mpi4py import MPI

    MPI.Init_thread()
    train()
    MPI.Finalize()


def rc_thread_level():
    import mpi4py

    mpi4py.rc.thread_level = "funneled"
    import cupy_syncbn  # noqa: F401

    assert "cupy" not in sys.modules
    mpi = sys.modules["mpi4py.MPI"]  # started by the import above
    assert mpi.Query_thread() == mpi.THREAD_FUNNELED
    train()


def mpi_first():
    from mpi4py import MPI

    import cupy_syncbn

    assert cupy_syncbn.default_group().size == MPI.COMM_WORLD.size == SIZE
    subprocess.run([sys.executable, "-c", CHILD, "mpi_first"], check=True, timeout=30)
    train()


def after_finalize():
    from mpi4py import MPI

    import cupy_syncbn

    MPI.Finalize()
    assert error_of(cupy_syncbn.default_group).startswith("MPI is finalized")


# ---- Children ----
def in_child(name):
    from cupy_syncbn import SyncBatchNorm, default_group

    SyncBatchNorm(3)(np.ones((4, 3), "f4"))
    say(f"child {name} of {default_group().size} {'mpi4py.MPI' in sys.modules}")


def children():
    import cupy_syncbn

    group = cupy_syncbn.default_group()
    if group.rank == LAST:
        start_children()
    wait_at_rest()
    assert group.allreduce(np.ones(1))[0] == SIZE
    train()


def start_children():
    import multiprocessing

    import cupy_syncbn

    python = [sys.executable, "-c", CHILD]
    grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}, 'grandchild'])"
    script = f'cd / && {sys.executable} -c "$PROGRAM" shell'
    environment = dict(os.environ, PROGRAM=CHILD)
    children = [
        subprocess.Popen([*python, "subprocess"]),
        subprocess.Popen([*python, "open_files"], close_fds=False),
        subprocess.Popen([*python, "environment"], env=environment),
        subprocess.Popen(["sh", "-c", script], env=environment),
        subprocess.Popen([sys.executable, "-c", grandchild]),
    ]
    pid = os.posix_spawn(sys.executable, [*python, "posix_spawn"], os.environ)
    os.environ["PROGRAM"] = CHILD
    assert os.system(f'exec {sys.executable} -c "$PROGRAM" system') == 0
    assert os.waitpid(pid, 0)[1] == 0
    assert [child.wait(30) for child in children] == [0] * len(children)
    for method in "spawn", "forkserver":
        process = multiprocessing.get_context(method).Process(target=in_child, args=(method,))
        process.start()
        process.join(30)
        assert process.exitcode == 0
    pid = os.fork()
    if pid == 0:  # it has the rank's memory, and an exchange is refused
        text = error_of(lambda: cupy_syncbn.SyncBatchNorm(3)(np.ones((4, 3), "f4")))
        os._exit("forked from a rank" not in text)
    assert os.waitpid(pid, 0)[1] == 0


# ---- Ranks as ever ----
def trains():
    train()


def executes_itself():
    from mpi4py import MPI

    import cupy_syncbn

    assert cupy_syncbn.default_group().size == SIZE
    MPI.Finalize()  # not every MPI could be started again without
    os.execv(sys.executable, [sys.executable, "-m", "mpi4py", __file__, "trains"])


def executes_itself_before():
    if "AGAIN" not in os.environ:
        os.environ["AGAIN"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    train()


def inner_launch():
    """Ranks of the same number, within a rank."""
    import cupy_syncbn

    launcher = [word for word in sys.argv[2:] if word]
    group = cupy_syncbn.default_group()
    if group.rank == 0:
        command = [*launcher, "-n", str(SIZE), sys.executable, "-m", "mpi4py", __file__, "trains"]
        inner = subprocess.run(command, capture_output=True, text=True, timeout=30)
        for rank in range(SIZE):
            assert f"trained as {rank} of {SIZE}" in inner.stdout, inner
    wait_at_rest()
    train()


def spawns():
    from mpi4py import MPI

    import cupy_syncbn

    group = cupy_syncbn.default_group()
    arguments = [__file__, "spawned"]
    others = MPI.COMM_WORLD.Spawn(sys.executable, arguments, maxprocs=3)
    assert others.bcast(None, root=0) == 3
    others.Disconnect()
    assert group.size == SIZE
    train()


def spawned():
    import warnings

    warnings.simplefilter("error")
    from mpi4py import MPI

    import cupy_syncbn

    total = cupy_syncbn.default_group().allreduce(np.ones(1))[0]
    parent = MPI.Comm.Get_parent()
    parent.bcast(int(total), root=MPI.ROOT if MPI.COMM_WORLD.rank == 0 else MPI.PROC_NULL)
    parent.Disconnect()


# ---- Ranks that do not find each other ----
def alone():
    import warnings

    import cupy_syncbn

    caught = []
    warnings.showwarning = lambda message, *_: caught.append(str(message))
    warnings.simplefilter("always")
    uses = {
        "group": cupy_syncbn.default_group,
        "layer": lambda: cupy_syncbn.SyncBatchNorm(3)(np.ones((4, 3), "f4")),
        "world": lambda: cupy_syncbn.SyncBatchNorm(3, process_group=sys.modules["mpi4py.MPI"].COMM_WORLD),
        "parallel": lambda: cupy_syncbn.DistributedDataParallel(cupy_syncbn.SyncBatchNorm(3)),
        "local_rank": cupy_syncbn.local_rank,
        "none": lambda: cupy_syncbn.SyncBatchNorm(3, process_group=cupy_syncbn.SingleProcessGroup())(
            np.ones((4, 3), "f4")
        ),
    }
    for name in sys.argv[2].split(","):
        uses[name]()
    say(f"warnings {len(caught)} {'mpi4py.MPI' in sys.modules}: {caught}")


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    globals()[sys.argv[1]]()
