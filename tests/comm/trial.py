"""What a rank needs to try a case of fault_cases.py: layers to lose, and a report of what came of it."""

import copy
import json
import os
import time

import numpy as np

from cupy_syncbn import MPIProcessGroup, SyncBatchNorm
from support.compare import assert_identical, assert_unchanged, snapshot

C = 4

PATIENCE = 10.0
"""Timeout where no rank is late."""
TIMEOUT = 0.5
"""Where one is, or does not come."""
SHORT = 0.2
"""Where those that come need not be in time."""
REST = float(os.environ.get("CUPY_SYNCBN_TEST_REST", "1"))
"""How long nothing may change after an error."""
LARGE = 100_000
"""Channels whose messages are of another protocol of MPI."""
FATAL_TIMEOUT = 1.5
"""Where the launcher may take a moment to notice that a rank has ended."""


def world_of_ranks():
    """Return MPI.COMM_WORLD, which starts MPI: to read the table of cases does not."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


class Trial:
    """One case on this rank: a communicator and layers of its own, and what came of it."""

    def __init__(self, file, name):
        self.file, self.name = file, name
        self.comm = world_of_ranks().Dup()
        self.group = MPIProcessGroup(self.comm, timeout=PATIENCE)
        self.rank, self.size = self.comm.rank, self.comm.size
        self.role = "faulty" if self.rank == self.size - 1 else "other"
        self.rng = np.random.default_rng(self.rank)
        self.subjects = []  # (layer, its twin, its batch)
        self.owes_backward = False

    @property
    def faulty(self):
        return self.role == "faulty"

    def renew_group(self):
        """Go on with a communicator of its own."""
        self.comm = world_of_ranks().Dup()
        self.group = MPIProcessGroup(self.comm, timeout=PATIENCE)

    def untrained(self, layer):
        """Return a layer that has not been called, whose state is that of a trained one."""
        fresh = copy.copy(layer)
        fresh.process_group = self.group
        return fresh

    def report(self, **line):
        """Write a line of JSON at once: what follows may hang or be killed."""
        self.file.write(json.dumps({"case": self.name, "role": self.role} | line) + "\n")
        self.file.flush()

    def watch(self, layer):
        """Return a batch for a layer, whose state is compared before and after each attempt."""
        x = self.rng.normal(size=(3 + self.rank, layer.num_features, 2)).astype(layer.dtype)
        twin = copy.deepcopy(layer)
        self.subjects.append((layer, twin, x))
        return x

    def trained(self, num_features=C, name="stem", **arguments):
        """Return a layer that has state and gradients to lose, and a batch."""
        layer = SyncBatchNorm(num_features, name=name, **({"process_group": self.group} | arguments))
        x = self.watch(layer)
        for each in self.subjects[-1][:2]:
            each.backward(each(x))
        return layer, x

    def layers(self):
        return [layer for layer, _, _ in self.subjects]

    def forward(self):
        """Call the forwards, of the twins too, so that the backwards are next."""
        for layer, twin, x in self.subjects:
            layer(x), twin(x)
        self.owes_backward = True

    def attempt(self, call):
        """Call something at the same time on all ranks, and write down what came of it."""
        meet()
        before = [snapshot(layer) for layer in self.layers()]
        self.report(starts=time.time(), timeout=self.group.timeout)
        start, error = time.monotonic(), None
        try:
            call()
        except (Exception, KeyboardInterrupt) as caught:
            error = caught
        seconds = time.monotonic() - start
        self.report(
            error=None if error is None else type(error).__name__,
            message="\n".join([str(error), *getattr(error, "__notes__", [])]),
            seconds=seconds,
            timeout=self.group.timeout,
            changed=any(
                differ(layer, state) for (layer, _, _), state in zip(self.subjects, before, strict=True)
            ),
        )
        return error

    def go_on(self):
        """Train on, as the twins do, to which nothing happened."""
        for layer, twin, x in self.subjects:
            if self.owes_backward:
                assert_identical(layer.backward(x), twin.backward(x))
            assert_identical(layer(x), twin(x))
            assert_identical(layer.backward(x), twin.backward(x))
            assert_unchanged(layer, snapshot(twin))


def differ(layer, state):
    try:
        assert_unchanged(layer, state)
    except AssertionError:
        return True
    return False


def meet():
    """Wait for all ranks, without keeping the core from those that are late."""
    request = world_of_ranks().Ibarrier()
    while not request.Test():
        time.sleep(1e-3)


def start_anew():
    """Train in a new group."""
    world = world_of_ranks()
    layer = SyncBatchNorm(C, process_group=MPIProcessGroup(world.Dup(), timeout=PATIENCE))
    x = np.full((2, C), world.rank, "f4")
    layer.backward(layer(x))
    np.testing.assert_allclose(layer.running_mean, 0.1 * (world.size - 1) / 2, rtol=1e-6)


def outcome(call):
    """Return what a call raises, as text."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"
