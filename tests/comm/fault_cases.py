"""The faults of test_faults.py. Each rank runs this file, and writes what came of them to a file of its own.

    fault_cases.py FOLDER         all cases after which the ranks go on, one after the other
    fault_cases.py FOLDER NAME    one that ends the ranks

The last rank is the faulty one, unless a case says otherwise. What ranks should raise is in test_faults.py.
"""

import _thread
import contextlib
import copy
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
from mpi4py import MPI

from cupy_syncbn import (
    DistributedDataParallel,
    MPIProcessGroup,
    Sequential,
    SyncBatchNorm,
    new_group,
    split_group,
    sync_batch_norm,
)
from cupy_syncbn.backends.cpu import operations as cpu_operations
from cupy_syncbn.comm.checked_sum import LONGEST
from support.compare import assert_identical, assert_unchanged, snapshot

WORLD = MPI.COMM_WORLD
C = 4

PATIENCE = 10.0
"""Timeout where no rank is late."""
TIMEOUT = 0.5
"""Where one is, or does not come."""
SHORT = 0.2
"""Where those that come need not be in time."""
FATAL_TIMEOUT = 1.5
"""Where the launcher may take a moment to notice that a rank has ended."""


class Trial:
    """One case on this rank: a communicator and layers of its own, and what came of it."""

    def __init__(self, file, name):
        self.file, self.name = file, name
        self.comm = WORLD.Dup()
        self.group = MPIProcessGroup(self.comm, timeout=PATIENCE)
        self.rank, self.size = WORLD.rank, WORLD.size
        self.role = "faulty" if self.rank == self.size - 1 else "other"
        self.rng = np.random.default_rng(self.rank)
        self.subjects = []  # (layer, its twin, its batch)
        self.owes_backward = False

    @property
    def faulty(self):
        return self.role == "faulty"

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
    request = WORLD.Ibarrier()
    while not request.Test():
        time.sleep(1e-3)


def start_anew():
    """Train in a new group."""
    layer = SyncBatchNorm(C, process_group=MPIProcessGroup(WORLD.Dup(), timeout=PATIENCE))
    x = np.full((2, C), WORLD.rank, "f4")
    layer.backward(layer(x))
    np.testing.assert_allclose(layer.running_mean, 0.1 * (WORLD.size - 1) / 2, rtol=1e-6)


def outcome(call):
    """Return what a call raises, as text."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


CASES = {}
FATAL = {}


def case(goes_on=True, ranks=2):
    """Register a case for at least so many ranks, after which the same layers train on, or only new ones."""

    def register(run):
        CASES[run.__name__] = run, goes_on, ranks
        return run

    return register


def fatal(run):
    FATAL[run.__name__] = run
    return run


# Something wrong with what one rank brings


def bad_input(make):
    def run(t):
        layer, x = t.trained()
        t.attempt(lambda: layer(make(x) if t.faulty else x))

    return run


def bad_gradient(make):
    def run(t):
        layer, x = t.trained()
        t.forward()
        t.attempt(lambda: layer.backward(make(x) if t.faulty else x))

    return run


CASES |= {
    "channels": (bad_input(lambda x: x[:, :3]), True, 2),
    "dtype": (bad_input(lambda x: x.astype("f8")), True, 2),
    "no_array": (bad_input(lambda x: x.tolist()), True, 2),
    "one_dimension": (bad_input(lambda x: x[:, 0, 0]), True, 2),
    "gradient_shape": (bad_gradient(lambda dy: dy[:1]), True, 2),
    "gradient_dtype": (bad_gradient(lambda dy: dy.astype("f2")), True, 2),
}


@case()
def first_call(t):
    layer = SyncBatchNorm(C, process_group=t.group, name="stem")
    x = t.watch(layer)
    t.attempt(lambda: layer(x[:, :3] if t.faulty else x))


@case()
def two_ranks(t):
    layer, x = t.trained()
    t.role = "faulty" if t.rank in (0, t.size - 1) else "other"
    t.attempt(lambda: layer(x[:, :3] if t.faulty else x))


@case()
def weight_is_a_list(t):
    x = t.rng.normal(size=(3, C)).astype("f4")
    weight = np.ones(C, "f4")
    t.attempt(lambda: sync_batch_norm(x, weight.tolist() if t.faulty else weight, process_group=t.group))


@case()
def momentum(t):
    layer, x = t.trained()
    if t.faulty:
        layer.momentum = 2
    t.attempt(lambda: layer(x))
    layer.momentum = 0.1


@case(goes_on=False)
def bad_input_and_the_others_absent(t):
    layer, x = t.trained()
    t.group.timeout = SHORT
    t.attempt(lambda: layer(x[:, :3]) if t.faulty else None)


@case(ranks=4)
def bad_input_in_one_of_two_groups(t):
    half = split_group(t.size // 2, comm=t.comm, timeout=PATIENCE)
    if t.rank < t.size // 2:
        t.role = "spared"
    layer, x = t.trained(process_group=half)
    t.attempt(lambda: layer(x[:, :3] if t.faulty else x))
    if t.role == "spared":
        t.subjects[0][1](x)
        t.owes_backward = True


# Out of memory, and other errors inside


def broken(t, operation, error=MemoryError):
    """Let an operation of the backend fail on the faulty rank."""
    if not t.faulty:
        return contextlib.nullcontext()
    return mock.patch.object(cpu_operations, operation, side_effect=error("none left"))


@case()
def memory_in_statistics(t):
    layer, x = t.trained()
    with broken(t, "statistics"):
        t.attempt(lambda: layer(x))


@case()
def memory_between_two_exchanges(t):
    layer, x = t.trained(dtype="float64")
    with broken(t, "centered_squares"):
        t.attempt(lambda: layer(x))


@case()
def memory_in_reduce_gradients(t):
    layer, x = t.trained()
    t.forward()
    with broken(t, "reduce_gradients"):
        t.attempt(lambda: layer.backward(x))


@case(goes_on=False)
def memory_in_normalize(t):
    """After the exchange nobody hears of it, but the layer's ranks part at the next."""
    layer, x = t.trained()
    with broken(t, "normalize"):
        t.attempt(lambda: layer(x))
    t.attempt(lambda: layer(x))
    t.attempt(lambda: layer(x))


@case(goes_on=False)
def memory_in_input_gradient(t):
    layer, x = t.trained(grad_reduction="mean")
    t.forward()
    with broken(t, "input_gradient"):
        t.attempt(lambda: layer.backward(x))
    t.attempt(lambda: layer(x))


@case(goes_on=False)
def memory_in_averaging(t):
    layer, x = t.trained()
    model = DistributedDataParallel(layer, t.group)
    t.group.timeout = TIMEOUT
    if t.faulty:
        model._average = mock.Mock(side_effect=MemoryError("none left"))
    t.attempt(model.reduce_gradients)
    t.attempt(lambda: layer(x))


@case(goes_on=False)
def interrupted_in_statistics(t):
    layer, x = t.trained()
    t.group.timeout = SHORT
    with broken(t, "statistics", KeyboardInterrupt):
        t.attempt(lambda: layer(x))


@case(goes_on=False)
def interrupted_in_an_exchange(t):
    """The first rank, which the others wait for, comes when the last has gone."""
    layer, x = t.trained()
    t.group.timeout = PATIENCE if t.faulty else TIMEOUT
    if t.rank == 0:
        t.role = "absent"

    def step():
        if t.faulty:
            threading.Timer(0.2, _thread.interrupt_main).start()
        layer(x)

    t.attempt(lambda: None if t.role == "absent" else step())
    t.group.timeout = TIMEOUT
    t.attempt(lambda: [layer(x) for _ in range(3)])


# Ranks in different calls


@case()
def num_features(t):
    layer = SyncBatchNorm(C + t.faulty, process_group=t.group, name="stem")
    x = t.watch(layer)
    t.attempt(lambda: layer(x))
    t.subjects.clear()  # they can never meet


@case()
def layer_dtype(t):
    layer = SyncBatchNorm(C, process_group=t.group, name="stem", dtype="float64" if t.faulty else "float32")
    x = t.watch(layer)
    t.attempt(lambda: layer(x))
    t.subjects.clear()


def skipped_layer(other_features):
    def run(t):
        stem, x = t.trained()
        head, x_head = t.trained(other_features, "head")
        t.attempt(lambda: head(x_head) if t.faulty else stem(x))

    return run


CASES |= {
    "skipped_layer_of_equal_size": (skipped_layer(C), True, 2),
    "skipped_layer_of_other_size": (skipped_layer(7), True, 2),
    "skipped_layer_of_large_size": (skipped_layer(30000), True, 2),  # of another protocol of MPI
    "skipped_layer_of_larger_size": (skipped_layer(40000), True, 2),  # of more than one message
}


@case()
def skipped_backward(t):
    """So do a forward called twice, and an error between forward and backward that is caught."""
    layer, x = t.trained()
    t.forward()
    t.attempt(lambda: layer(x) if t.faulty else layer.backward(x))


@case()
def skipped_forward(t):
    layer, x = t.trained()
    t.attempt(lambda: layer.backward(x) if t.faulty else layer(x))


@case()
def skipped_forward_in_eval(t):
    """Nothing is exchanged in evaluation, but by the backward if it reduces gradients."""
    layer, x = t.trained(grad_reduction="sum")
    layer.eval()
    if not t.faulty:
        layer(x)
    t.attempt(lambda: layer.backward(x))
    layer.train()


@case()
def swapped_layers(t):
    stem, x = t.trained()
    head, _ = t.trained(name="head")
    t.attempt(lambda: (head if t.faulty else stem)(x))


@case(goes_on=False)
def swapped_layers_without_names(t):
    """They have the same tag: nothing tells these ranks that they add up different things."""
    a, x = t.trained(name=None)
    b, _ = t.trained(name=None)
    t.attempt(lambda: [layer(x) for layer in ((b, a) if t.faulty else (a, b))])


@case(goes_on=False)
def skipped_layer_without_name(t):
    """Layers without names pass for each other until their numbers of calls differ."""
    a, x = t.trained(name=None)
    b, _ = t.trained(name=None)
    t.attempt(lambda: [layer(x) for layer in ((b, a, b, a) if t.faulty else (a, a, b, b))])


@case()
def one_layer_in_eval(t):
    stem, x = t.trained()
    head, _ = t.trained(name="head")
    stem.train(not t.faulty)
    t.attempt(lambda: head(stem(x)))
    stem.train()


@case(goes_on=False)
def all_layers_in_eval(t):
    layer, x = t.trained()
    t.group.timeout = SHORT
    layer.train(not t.faulty)
    t.attempt(lambda: layer(x))


@case()
def gradients_reduced_during_a_backward(t):
    layer, x = t.trained()
    model = DistributedDataParallel(layer, t.group)
    t.forward()
    t.attempt(lambda: model.reduce_gradients() if t.faulty else model.backward(x))


@case()
def different_groups(t):
    t.attempt(lambda: new_group([t.size - 1] if t.faulty else [0, t.size - 1], comm=t.comm, timeout=PATIENCE))


@case()
def different_modules(t):
    layer = SyncBatchNorm(C + t.faulty, process_group=t.group)
    t.watch(layer)
    t.attempt(lambda: DistributedDataParallel(layer, t.group))
    t.subjects.clear()


@case()
def different_buckets(t):
    layer, _ = t.trained()
    t.attempt(lambda: DistributedDataParallel(layer, t.group, bucket_cap_mb=1e-6 if t.faulty else 25))


@case()
def gradient_of_integers(t):
    layer, _ = t.trained()
    model = DistributedDataParallel(layer, t.group)
    good = layer.bias.grad
    if t.faulty:
        layer.bias.grad = np.zeros(C, int)
    t.attempt(model.reduce_gradients)
    layer.bias.grad = good


@case()
def no_member(t):
    """A rank that is not in the group is told so, and disturbs nobody."""
    group = new_group(range(t.size - 1), comm=t.comm, timeout=PATIENCE)
    layer = SyncBatchNorm(C, process_group=group)
    x = t.watch(layer)
    t.attempt(lambda: [layer(x) for _ in range(2)])
    t.subjects.clear()


# A rank that does not come


def absent(call, **arguments):
    def run(t):
        layer, x = t.trained(**arguments)
        t.group.timeout = SHORT
        t.attempt(lambda: None if t.faulty else call(t, layer, x))
        # The others need not wait once more. The rank itself may: its messages are answered no more.
        t.attempt(lambda: None if t.faulty else layer(x))

    return run


CASES |= {
    "absent_in_forward": (absent(lambda t, layer, x: layer(x)), False, 2),
    "absent_in_construction": (absent(lambda t, layer, x: DistributedDataParallel(layer, t.group)), False, 2),
    "absent_in_reduce_gradients": (
        absent(lambda t, layer, x: model_of(layer, t.group).reduce_gradients()),
        False,
        2,
    ),
    "absent_in_broadcast": (
        absent(lambda t, layer, x: t.group.broadcast(np.zeros(3), root=t.size - 1)),
        False,
        2,
    ),
}


def model_of(layer, group):
    """Return the model without its construction, which is collective."""
    model = DistributedDataParallel.__new__(DistributedDataParallel)
    vars(model).update(module=layer, _group=group, bucket_cap_mb=25, _reductions=0)
    return model


@case(goes_on=False)
def absent_in_backward(t):
    layer, x = t.trained()
    t.forward()
    t.group.timeout = SHORT
    t.attempt(lambda: None if t.faulty else layer.backward(x))


@case(goes_on=False)
def absent_in_first_call(t):
    layer = SyncBatchNorm(C, process_group=t.group, name="stem")
    x = t.watch(layer)
    t.group.timeout = SHORT
    t.attempt(lambda: None if t.faulty else layer(x))


@case(goes_on=False)
def absent_in_new_group(t):
    t.group.timeout = SHORT
    t.attempt(lambda: None if t.faulty else new_group(comm=t.comm, timeout=SHORT))


@case(goes_on=False)
def absent_in_split_group(t):
    t.group.timeout = SHORT
    t.attempt(lambda: None if t.faulty else split_group(t.size, comm=t.comm, timeout=SHORT))


@case(goes_on=False)
def leaves_early(t):
    layer, x = t.trained()
    t.group.timeout = TIMEOUT
    t.attempt(lambda: [layer.backward(layer(x)) for _ in range(2 if t.faulty else 3)])


@case(goes_on=False, ranks=4)
def absent_and_another_late(t):
    """Those that wait for the late rank first do not wait another timeout for the absent one."""
    layer, x = t.trained()
    t.group.timeout = 2 * TIMEOUT

    def step():
        if t.rank == 1:
            time.sleep(0.8 * t.group.timeout)
        layer(x)

    if t.rank == 1:
        t.role = "late"
    t.attempt(lambda: None if t.faulty else step())


@case(goes_on=False, ranks=4)
def absent_in_one_of_two_groups(t):
    t.group = split_group(t.size // 2, comm=t.comm, timeout=PATIENCE)
    if t.rank < t.size // 2:
        t.role = "spared"
    layer, x = t.trained()
    t.group.timeout = TIMEOUT
    t.attempt(lambda: None if t.faulty else [layer.backward(layer(x)) for _ in range(20)])


# What is legal


@case()
def vectors_of_all_lengths(t):
    def add_up():
        for length in 3, 4, 1000, LONGEST - 1, LONGEST, LONGEST + 1, 3 * LONGEST:
            vector = np.arange(length) * (t.rank + 1.0)
            t.group.allreduce_checked(vector)
            np.testing.assert_array_equal(vector, np.arange(length) * (t.size * (t.size + 1) / 2))

    t.attempt(add_up)


@case()
def late(t):
    layer, x = t.trained()

    def step():
        if t.faulty:
            time.sleep(0.3)
        return layer.backward(layer(x))

    t.attempt(step)
    twin = t.subjects[0][1]
    twin.backward(twin(x))


@case(goes_on=False)
def no_samples(t):
    layer, x = t.trained()
    t.attempt(lambda: layer.backward(layer(x[:0] if t.faulty else x)))


@case(goes_on=False)
def not_a_number(t):
    layer, x = t.trained()
    t.attempt(lambda: layer.backward(layer(x * np.nan if t.faulty else x)))


@case(goes_on=False)
def any_legal_training(t):
    """Accumulated gradients, repeated layers, evaluation in between: what all ranks do, all draw alike."""
    common = np.random.default_rng(5)
    net = Sequential(
        SyncBatchNorm(C, process_group=t.group, name="a"),
        SyncBatchNorm(C, process_group=t.group, name="b", grad_reduction="mean"),
        SyncBatchNorm(C, process_group=t.group, grad_reduction="sum"),
    )
    double = SyncBatchNorm(C, process_group=t.group, dtype="f8", name="double")
    model = DistributedDataParallel(Sequential(net, double), t.group)
    layers = [*net.layers, double]

    def batch(layer):
        n = t.rng.choice([0, 1, 2, 5])
        return t.rng.normal(size=(n, C, *[2] * t.rng.integers(3))).astype(layer.dtype)

    def train():
        for _ in range(200):
            for layer in (layers[i] for i in common.integers(len(layers), size=common.integers(1, 4))):
                for _ in range(common.integers(1, 4)):
                    layer(batch(layer))
                for _ in range(t.rng.integers(0, 3)):
                    layer.eval()(batch(layer))
                    layer.train()
                if common.random() < 0.7:
                    x = batch(layer)
                    layer.backward(np.ones_like(layer(x)))
            if common.random() < 0.3:
                model.reduce_gradients()
            if common.random() < 0.3:
                model.zero_grad()
            if common.random() < 0.1:
                t.comm.allreduce(1)
        states = t.comm.allgather({name: array.tobytes() for name, array in model.state_dict().items()})
        assert all(state == states[0] for state in states)

    t.attempt(train)


# What ends a rank


def run_to_the_end(t, fault, where):
    """Train until something ends this rank, as a user's program would."""
    layer, x = t.trained()
    t.group.timeout = FATAL_TIMEOUT

    def batches():
        yield x
        if t.faulty and where == "loader":
            fault()
        while True:
            yield x

    def train():
        for number, batch in enumerate(batches()):
            if t.faulty and number == 2 and where == "before":
                fault()
            y = layer(batch)
            if t.faulty and number == 2 and where == "between":
                fault()
            layer.backward(y)

    error = t.attempt(train)
    raise error


def user_error():
    raise LookupError("no such file")


@fatal
def error_before_forward(t):
    run_to_the_end(t, user_error, "before")


@fatal
def error_before_backward(t):
    run_to_the_end(t, user_error, "between")


@fatal
def error_in_loader(t):
    run_to_the_end(t, user_error, "loader")


@fatal
def ends(t):
    run_to_the_end(t, lambda: os._exit(0), "before")


@fatal
def sleeps(t):
    run_to_the_end(t, lambda: time.sleep(3600), "between")


@fatal
def killed(t):
    run_to_the_end(t, lambda: os.kill(os.getpid(), signal.SIGKILL), "before")


@fatal
def killed_in_an_exchange(t):
    """The first rank comes late, so that the others wait in an exchange."""
    if t.rank == 0:
        t.role = "late"
    layer, x = t.trained()
    t.group.timeout = FATAL_TIMEOUT
    if t.faulty:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def train():
        if t.rank == 0:
            time.sleep(0.6)
        for _ in range(3):
            layer.backward(layer(x))

    raise t.attempt(train)


def main(folder, name=None):
    with Path(folder, f"{WORLD.rank}.jsonl").open("w") as file:
        if name is not None:
            FATAL[name](Trial(file, name))
            return
        for name, (run, goes_on, ranks) in CASES.items():
            if ranks <= WORLD.size:
                t = Trial(file, name)
                run(t)
                meet()
                t.report(goes_on=outcome(t.go_on) if goes_on else None, new_group=outcome(start_anew))


if __name__ == "__main__":
    main(*sys.argv[1:])
