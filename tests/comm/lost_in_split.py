"""A program that loses a rank in the middle of new_group or split_group, between or in two steps of it.

``lost_in_split.py FOLDER CALL MOMENT LOSS ENDING``: each rank writes to FOLDER what it saw.
"""

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path

from mpi4py import MPI

from cupy_syncbn import CollectiveTimeoutError, new_group, split_group
from cupy_syncbn.comm import new_group as module
from cupy_syncbn.comm.split import Split

TIMEOUT = 1.0
folder, call, moment, loss, ending = sys.argv[1:]
world = MPI.COMM_WORLD
lost = world.size - 1
file = Path(folder, f"{world.rank}.jsonl")


def report(**line):
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def be_lost():
    report(lost=time.time())
    if loss == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif loss == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif loss == "ended":
        os._exit(7)
    elif loss == "raises":
        raise LookupError("planted")
    time.sleep({"late": 2 * TIMEOUT, "asleep": 1000}[loss])


class Lost(Split):
    """The split of the rank that is lost: just before, or when it waits in it for rank 0, which is late."""

    def __init__(self, *arguments):
        if moment == "before":
            be_lost()
        super().__init__(*arguments)

    def wait(self, timeout):
        if moment == "inside":
            time.sleep(0.3)
            assert self._thread.is_alive()
            be_lost()
        return super().wait(timeout)


class Late(Split):
    """The split of rank 0, if another must wait for it."""

    def __init__(self, *arguments):
        time.sleep(0.6)
        super().__init__(*arguments)


if world.rank == lost:
    module.Split = Lost
elif moment == "inside" and world.rank == 0:
    module.Split = Late

CALLS = {
    "all": lambda comm: new_group(timeout=TIMEOUT, comm=comm),
    "some": lambda comm: new_group(range(lost), timeout=TIMEOUT, comm=comm),  # the lost one is no member
    "backwards": lambda comm: new_group(range(lost, -1, -1), timeout=TIMEOUT, comm=comm),
    "split": lambda comm: split_group(1, timeout=TIMEOUT, comm=comm),
}

atexit.register(report, atexit=True)
comm = world.Dup()
world.Barrier()
if ending == "interrupt" and world.rank != lost:  # Ctrl-C
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
start = time.monotonic()
report(starts=time.time())
try:
    CALLS[call](comm)
    report(error=None)
except KeyboardInterrupt:
    report(error="KeyboardInterrupt", seconds=time.monotonic() - start)
    raise
except CollectiveTimeoutError as error:
    report(error="CollectiveTimeoutError", message=str(error), seconds=time.monotonic() - start)
    for again in CALLS["all"], CALLS["split"]:  # at once, as the ranks are out of step
        try:
            again(comm)
        except CollectiveTimeoutError as error:
            report(again=str(error), seconds=time.monotonic() - start)
    if ending == "uncaught":
        raise
if loss == "late":  # all ranks live: the group that the message names
    module.Split = Split
    request = world.Ibarrier()
    while not request.Test():
        time.sleep(0.01)
    with new_group(comm=comm.Dup(), timeout=10) as group:
        report(goes_on=group.size)
if ending == "finalize":
    MPI.Finalize()
report(end=time.time())
