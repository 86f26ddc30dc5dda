"""What one rank does wrong, and what every rank must raise then: a case is its deed beside its outcome.

    fault_cases.py FOLDER         all cases after which the ranks go on, one after the other
    fault_cases.py FOLDER pairs   of these, the ones for two ranks alone
    fault_cases.py FOLDER NAME    one that ends the ranks

Each rank runs this file, and writes what came of it to a file of its own, which test_faults.py compares with
the attempts told here. The last rank is the faulty one, unless a case says otherwise.
"""

import _thread
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import EllipsisType
from typing import NamedTuple
from unittest import mock

import numpy as np
from trial import (
    FATAL_TIMEOUT,
    LARGE,
    PATIENCE,
    REST,
    SHORT,
    TIMEOUT,
    C,
    Trial,
    meet,
    outcome,
    start_anew,
    world_of_ranks,
)

from cupy_syncbn import (
    DistributedDataParallel,
    Sequential,
    SyncBatchNorm,
    new_group,
    no_backward,
    split_group,
    sync_batch_norm,
)
from cupy_syncbn.backends import backend_of
from cupy_syncbn.comm.checked_sum import LONGEST
from cupy_syncbn.nn import data_parallel
from support.nodes import pretend

# ---- What a case is, and what it should come to ----


class Error(NamedTuple):
    """What a rank raises; in the pattern, {last} is the number of the last rank."""

    kind: str
    pattern: str = ""


class Attempt(NamedTuple):
    """What the ranks raise in one call, or None, by their role; where they raise, nothing has changed."""

    faulty: Error | EllipsisType | None
    """... is what may be."""
    other: Error | None
    spared: Error | None = None
    absent: Error | None = None
    late: Error | None = None
    after_changes: bool = False
    """Whether earlier steps of the same attempt have changed something."""


def remote(call):
    return Error("RemoteRankError", rf"^rank {{last}} failed before {call}: see the error there$")


def mismatch(call):
    return Error("RankMismatchError", f"is in {call}, while ranks? .* (is|are) in ")


def timeout(call):
    return Error("CollectiveTimeoutError", f"{call}.*waited .* for .* a rank ended, is stuck")


def missing(call):
    """Return a timeout that blames the last rank, and no other."""
    return Error("CollectiveTimeoutError", rf"{call}.*waited .* for rank {{last}}: a rank ended, is stuck")


GIVEN_UP = Error("CollectiveTimeoutError", "an earlier exchange on this communicator was given up")
NO_MEMORY = Error("MemoryError", "none left")
STEM = r"stem \(4 channels\)"
FORWARD = f"forward 2 of {STEM}"
BACKWARD = f"backward 2 of {STEM}"


class Case(NamedTuple):
    """What the ranks do, and what they raise in each attempt of it."""

    run: Callable
    attempts: tuple[Attempt, ...]
    goes_on: bool
    """Whether the same layers train on afterwards, or only new ones."""
    ranks: range
    """How many it takes."""
    prompt: bool
    """Whether errors have to come at once."""

    @property
    def is_for_two_alone(self):
        return self.ranks == range(2, 3)


class Ending(NamedTuple):
    """What the ranks raise before the launcher or mpi4py's runner ends them."""

    faulty: Error | None
    other: Error | EllipsisType | None
    """... is what may be, as it depends on the launcher."""
    runner: bool
    """Whether they were started by `python -m mpi4py`."""
    ranks: int = 2
    """4, to save time, where two ranks would show the same."""


CASES = {}
FATAL = {}


def case(*attempts, goes_on=True, ranks=2, most=99, prompt=True, name=None):
    """Register a case of what the ranks survive, by the name of its function or another."""

    def register(run):
        CASES[name or run.__name__] = Case(run, attempts, goes_on, range(ranks, most + 1), prompt)
        return run

    return register


def fatal(*endings):
    """Register a case of what ends the ranks."""

    def register(run):
        FATAL[run.__name__] = run, endings
        return run

    return register


# Something wrong with what one rank brings


def bad_input(name, make, error):
    """Register a case in which the faulty rank's forward is given what `make` makes of the batch."""

    @case(Attempt(error, remote(FORWARD)), name=name)
    def run(t):
        layer, x = t.trained()
        t.attempt(lambda: layer(make(x) if t.faulty else x))


def bad_gradient(name, make, error):
    """Register a case in which the faulty rank's backward is given what `make` makes of the gradient."""

    @case(Attempt(error, remote(BACKWARD)), name=name)
    def run(t):
        layer, x = t.trained()
        t.forward()
        t.attempt(lambda: layer.backward(make(x) if t.faulty else x))


bad_input("channels", lambda x: x[:, :3], Error("ValueError", "expected 4 channels"))
bad_input("dtype", lambda x: x.astype("f8"), Error("TypeError", "float64"))
bad_input("no_array", lambda x: x.tolist(), Error("TypeError", "list"))
bad_input("one_dimension", lambda x: x[:, 0, 0], Error("ValueError", "1D input"))
bad_gradient("gradient_shape", lambda dy: dy[:1], Error("ValueError", "output's size"))
bad_gradient("gradient_dtype", lambda dy: dy.astype("f2"), Error("TypeError", "float16"))


@case(Attempt(Error("ValueError", "expected 4 channels"), remote(f"forward 0 of {STEM}")))
def first_call(t):
    layer = SyncBatchNorm(C, process_group=t.group, name="stem")
    x = t.watch(layer)
    t.attempt(lambda: layer(x[:, :3] if t.faulty else x))


@case(Attempt(Error("ValueError", "channels"), Error("RemoteRankError", "^ranks 0, {last} failed")))
def two_ranks(t):
    layer, x = t.trained()
    t.role = "faulty" if t.rank in (0, t.size - 1) else "other"
    t.attempt(lambda: layer(x[:, :3] if t.faulty else x))


@case(Attempt(Error("TypeError", "list"), remote("forward 0 of sync_batch_norm .*")))
def weight_is_a_list(t):
    x = t.rng.normal(size=(3, C)).astype("f4")
    weight = np.ones(C, "f4")
    t.attempt(lambda: sync_batch_norm(x, weight.tolist() if t.faulty else weight, process_group=t.group))


@case(Attempt(Error("ValueError", "momentum"), remote(FORWARD)))
def momentum(t):
    layer, x = t.trained()
    if t.faulty:
        layer.momentum = 2
    t.attempt(lambda: layer(x))
    layer.momentum = 0.1


@case(
    Attempt(Error("ValueError", "expected 4 channels.*\nThe other ranks did not hear.*waited"), None),
    goes_on=False,
)
def bad_input_and_the_others_absent(t):
    """The rank has its own error, though nobody hears of it."""
    layer, x = t.trained()
    t.group.timeout = SHORT
    t.attempt(lambda: layer(x[:, :3]) if t.faulty else None)


@case(Attempt(Error("ValueError", "4 channels"), Error("RemoteRankError", "^rank 1 failed")), ranks=4)
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


def fail_once(t, owner, name, call):
    """Make a call in which a method fails on the faulty rank, the first time."""
    if not t.faulty:
        return call()
    method, failures = getattr(owner, name), [MemoryError("none left")]

    def fails(*arguments):
        if failures:
            raise failures.pop()
        return method(*arguments)

    with mock.patch.object(owner, name, fails):
        return call()


def broken(t, operation, error=MemoryError):
    """Let an operation of the backend fail on the faulty rank."""
    if not t.faulty:
        return contextlib.nullcontext()
    return mock.patch.object(backend_of(np.empty(0)), operation, side_effect=error("none left"))


@case(Attempt(NO_MEMORY, remote(FORWARD)))
def memory_in_statistics(t):
    layer, x = t.trained()
    with broken(t, "statistics"):
        t.attempt(lambda: layer(x))


@case(Attempt(NO_MEMORY, remote(FORWARD)))
def memory_between_two_exchanges(t):
    layer, x = t.trained(dtype="float64")
    with broken(t, "centered_squares"):
        t.attempt(lambda: layer(x))


@case(Attempt(NO_MEMORY, remote(BACKWARD)))
def memory_in_reduce_gradients(t):
    layer, x = t.trained()
    t.forward()
    with broken(t, "reduce_gradients"):
        t.attempt(lambda: layer.backward(x))


IN_THE_MIDDLE = Error("RemoteRankError", "^rank {last} failed in the middle: see the error there")


def no_memory_for_messages(name, call):
    """Register a case in which the faulty rank has no memory for the first messages of its communicator."""

    @case(Attempt(NO_MEMORY, IN_THE_MIDDLE), goes_on=False, name=name)
    def run(t):
        layer = SyncBatchNorm(C, process_group=t.group, name="stem")
        x = t.watch(layer)
        empty = np.empty

        def empty_unless_long(shape, *arguments, **keywords):
            if shape == LONGEST:
                raise MemoryError("none left")
            return empty(shape, *arguments, **keywords)

        with mock.patch.object(np, "empty", empty_unless_long if t.faulty else empty):
            t.attempt(lambda: call(t, layer, x))


no_memory_for_messages("first_forward_without_memory", lambda t, layer, x: layer(x))
no_memory_for_messages(
    "construction_without_memory", lambda t, layer, x: DistributedDataParallel(layer, t.group)
)
no_memory_for_messages("new_group_without_memory", lambda t, layer, x: new_group(comm=t.comm))


@case(
    Attempt(NO_MEMORY, None),
    Attempt(mismatch(FORWARD), mismatch(f"forward 3 of {STEM}")),
    Attempt(mismatch(FORWARD), mismatch(f"forward 3 of {STEM}")),
    goes_on=False,
)
def memory_in_normalize(t):
    """After its last sum a rank cannot tell the others, which go on: from the next sum on all know."""
    layer, x = t.trained()
    with broken(t, "normalize"):
        t.attempt(lambda: layer(x))
    t.attempt(lambda: layer(x))
    t.attempt(lambda: layer(x))


@case(
    Attempt(NO_MEMORY, None),
    Attempt(mismatch(f"forward 3 of {STEM}"), mismatch(f"forward 4 of {STEM}")),
    goes_on=False,
)
def memory_in_input_gradient(t):
    layer, x = t.trained(grad_reduction="mean")
    t.forward()
    with broken(t, "input_gradient"):
        t.attempt(lambda: layer.backward(x))
    t.attempt(lambda: layer(x))


GRADIENTS = "gradients 0 of DistributedDataParallel .*"


@case(Attempt(NO_MEMORY, remote(GRADIENTS)))
def memory_for_the_means(t):
    layer, _ = t.trained()
    model = DistributedDataParallel(layer, t.group)
    t.attempt(lambda: fail_once(t, data_parallel._Means, "__init__", model.reduce_gradients))


@case(Attempt(NO_MEMORY, IN_THE_MIDDLE), Attempt(GIVEN_UP, GIVEN_UP), goes_on=False)
def memory_before_a_bucket(t):
    layer, _ = t.trained()
    model = DistributedDataParallel(layer, t.group, bucket_cap_mb=1e-6)
    t.attempt(lambda: fail_once(t, type(t.group), "allreduce_owned", model.reduce_gradients))
    t.attempt(model.reduce_gradients)


@case(
    Attempt(NO_MEMORY, None),
    Attempt(mismatch(GRADIENTS), mismatch("gradients 1 of DistributedDataParallel .*")),
    goes_on=False,
)
def memory_behind_the_buckets(t):
    """The others have their means."""
    layer, _ = t.trained()
    model = DistributedDataParallel(layer, t.group, bucket_cap_mb=1e-6)
    t.attempt(lambda: fail_once(t, data_parallel._Means, "writes", model.reduce_gradients))
    t.attempt(model.reduce_gradients)


@case(Attempt(NO_MEMORY, IN_THE_MIDDLE), goes_on=False)
def memory_in_a_broadcast(t):
    layer, _ = t.trained()
    layer.weight.data += t.rank
    t.attempt(
        lambda: fail_once(
            t, type(t.group), "broadcast_owned", lambda: DistributedDataParallel(layer, t.group)
        )
    )


@case(Attempt(NO_MEMORY, remote("construction 0 of DistributedDataParallel")))
def memory_before_construction(t):
    layer, _ = t.trained()
    layer.weight.data += t.rank
    t.attempt(
        lambda: fail_once(
            t, DistributedDataParallel, "_description", lambda: DistributedDataParallel(layer, t.group)
        )
    )
    layer.weight.data[...] = t.subjects[-1][1].weight.data


@case(Attempt(NO_MEMORY, remote("construction 0 of DistributedDataParallel")))
def memory_behind_the_broadcasts(t):
    """The root of a broadcast has not waited for anybody: it hears of it all the same."""
    layer, _ = t.trained()
    layer.weight.data += t.rank
    t.attempt(
        lambda: fail_once(t, type(t.group), "next_model", lambda: DistributedDataParallel(layer, t.group))
    )
    layer.weight.data[...] = t.subjects[-1][1].weight.data


@case(Attempt(Error("KeyboardInterrupt"), timeout(FORWARD)), goes_on=False)
def interrupted_in_statistics(t):
    layer, x = t.trained()
    t.group.timeout = SHORT
    with broken(t, "statistics", KeyboardInterrupt):
        t.attempt(lambda: layer(x))


@case(
    Attempt(Error("KeyboardInterrupt"), IN_THE_MIDDLE),
    # The messages of the first attempt may be enough for one step.
    Attempt(GIVEN_UP, GIVEN_UP, absent=IN_THE_MIDDLE, after_changes=True),
    goes_on=False,
)
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


@case(Attempt(mismatch(r"the first call of stem \(5.*"), mismatch(r"the first call of stem \(4.*")))
def num_features(t):
    layer = SyncBatchNorm(C + t.faulty, process_group=t.group, name="stem")
    x = t.watch(layer)
    t.attempt(lambda: layer(x))
    t.subjects.clear()  # they can never meet


@case(
    Attempt(
        mismatch("the first call of .* with float64 .*"), mismatch("the first call of .* with float32 .*")
    )
)
def layer_dtype(t):
    layer = SyncBatchNorm(C, process_group=t.group, name="stem", dtype="float64" if t.faulty else "float32")
    x = t.watch(layer)
    t.attempt(lambda: layer(x))
    t.subjects.clear()


def skipped_layer(name, other_features, other):
    """Register a case in which the faulty rank goes to a second layer at once."""

    @case(Attempt(mismatch(f"forward 2 of {other}"), mismatch(FORWARD)), name=name)
    def run(t):
        stem, x = t.trained()
        head, x_head = t.trained(other_features, "head")
        t.attempt(lambda: head(x_head) if t.faulty else stem(x))


skipped_layer("skipped_layer_of_equal_size", C, r"head \(4.*")
skipped_layer("skipped_layer_of_other_size", 7, r"head \(7.*")
skipped_layer("skipped_layer_of_large_size", 30000, r"head \(30000.*")  # of another protocol of MPI
skipped_layer("skipped_layer_of_larger_size", 40000, r"head \(40000.*")  # of more than one message


@case(Attempt(mismatch(f"forward 3 of {STEM}"), mismatch(BACKWARD)))
def skipped_backward(t):
    """So do a forward called twice, and an error between forward and backward that is caught."""
    layer, x = t.trained()
    t.forward()
    t.attempt(lambda: layer(x) if t.faulty else layer.backward(x))


@case(Attempt(Error("RuntimeError", "call the forward"), remote(FORWARD)))
def skipped_forward(t):
    layer, x = t.trained()
    t.attempt(lambda: layer.backward(x) if t.faulty else layer(x))


@case(Attempt(Error("RuntimeError", "call the forward"), remote(BACKWARD)))
def skipped_forward_in_eval(t):
    """Nothing is exchanged in evaluation, but by the backward if it reduces gradients."""
    layer, x = t.trained(grad_reduction="sum")
    layer.eval()
    if not t.faulty:
        layer(x)
    t.attempt(lambda: layer.backward(x))
    layer.train()


def different_settings(name, **settings):
    """Register a case in which the faulty rank's layer has other settings."""

    @case(Attempt(*2 * [mismatch("the first call of stem .* with float32 parameters, .*")]), name=name)
    def run(t):
        layer = SyncBatchNorm(C, process_group=t.group, name="stem", **(settings if t.faulty else {}))
        x = t.watch(layer)
        t.attempt(lambda: layer(x))
        t.subjects.clear()


different_settings("eps_differs", eps=1e-3)
different_settings("momentum_differs", momentum=None)
different_settings("affine_differs", affine=False)
different_settings("tracking_differs", track_running_stats=False)
different_settings("activation_differs", activation=("leaky_relu", 0.1))
different_settings("reduction_differs", grad_reduction="mean")
different_settings("axis_of_channels_differs", channels_last=True)


def swapped(name, first, second, make):
    """Register a case in which the faulty rank calls two trained layers in the other order."""

    @case(Attempt(mismatch(f"forward . of {second}"), mismatch(f"forward . of {first}")), name=name)
    def run(t):
        layers, x = make(t)
        t.attempt(lambda: layers[t.faulty](x))


def layers_of(first, second):
    def make(t):
        layer, x = t.trained(name=first)
        return (layer, t.trained(name=second)[0]), x

    return make


def models(t):
    """Return two layers, each the only one of a model of its own."""
    layer, x = t.trained(name=None)
    other, _ = t.trained(name=None)
    for each in layer, other:
        DistributedDataParallel(Sequential(each), t.group)
    for subject, twin, batch in t.subjects:
        for each in 2 * [subject, twin]:
            each.zero_grad()
            each.backward(each(batch))
    return (layer, other), x


# Their names had equal tags of 12 bits.
swapped(
    "swapped_layers_of_unlucky_names", r"layer6\.11\.bn2 .*", r"layer3\.805\.bn3 .*",
    layers_of("layer6.11.bn2", "layer3.805.bn3"),
)  # fmt: skip
swapped("swapped_models", r"0 \(4 channels\)", r"0 \(4 channels\) of model 1", models)


@case(Attempt(mismatch("forward 2 of head .*"), mismatch(FORWARD)))
def swapped_layers(t):
    stem, x = t.trained()
    head, _ = t.trained(name="head")
    t.attempt(lambda: (head if t.faulty else stem)(x))


@case(Attempt(None, None), goes_on=False)
def swapped_layers_without_names(t):
    """Nothing tells layers of one size apart that have no names, before their numbers of calls do."""
    a, x = t.trained(name=None)
    b, _ = t.trained(name=None)
    t.attempt(lambda: [layer(x) for layer in ((b, a) if t.faulty else (a, b))])


@case(
    Attempt(
        mismatch("forward 2 of SyncBatchNorm .*"),
        mismatch("forward 3 of SyncBatchNorm .*"),
        after_changes=True,
    ),
    goes_on=False,
)
def skipped_layer_without_name(t):
    """Layers without names pass for each other until their numbers of calls differ."""
    a, x = t.trained(name=None)
    b, _ = t.trained(name=None)
    t.attempt(lambda: [layer(x) for layer in ((b, a, b, a) if t.faulty else (a, a, b, b))])


@case(Attempt(mismatch("forward 2 of head .*"), mismatch(FORWARD)))
def one_layer_in_eval(t):
    stem, x = t.trained()
    head, _ = t.trained(name="head")
    stem.train(not t.faulty)
    t.attempt(lambda: head(stem(x)))
    stem.train()


@case(Attempt(None, timeout(FORWARD)), goes_on=False)
def all_layers_in_eval(t):
    layer, x = t.trained()
    t.group.timeout = SHORT
    layer.train(not t.faulty)
    t.attempt(lambda: layer(x))


@case(Attempt(mismatch("gradients 0 of DistributedDataParallel .*"), mismatch(f"backward 0 of {STEM}")))
def gradients_reduced_during_a_backward(t):
    layer, x = t.trained()
    model = DistributedDataParallel(layer, t.group)
    t.forward()
    t.attempt(lambda: model.reduce_gradients() if t.faulty else model.backward(x))


@case(Attempt(*2 * [Error("RankMismatchError", r"is in new_group\(.*, while ranks? ")]))
def different_groups(t):
    t.attempt(lambda: new_group([t.size - 1] if t.faulty else [0, t.size - 1], comm=t.comm, timeout=PATIENCE))


@case(
    Attempt(
        Error("RankMismatchError", r"weight: shape \(5,\), .* here, weight: shape \(4,\), .* there"),
        Error("RankMismatchError", "^rank {last} has another module than rank 0"),
    )
)
def different_modules(t):
    layer = SyncBatchNorm(C + t.faulty, process_group=t.group)
    t.watch(layer)
    t.attempt(lambda: DistributedDataParallel(layer, t.group))
    t.subjects.clear()


@case(
    Attempt(
        Error("RankMismatchError", "bucket_cap_mb: 1e-06 here, bucket_cap_mb: 25.0 there"),
        Error("RankMismatchError", "^rank {last} has another module than rank 0"),
    )
)
def different_buckets(t):
    layer, _ = t.trained()
    t.attempt(lambda: DistributedDataParallel(layer, t.group, bucket_cap_mb=1e-6 if t.faulty else 25))


@case(
    Attempt(
        Error("TypeError", r"bias\.grad in floating point"),
        remote("gradients 0 of DistributedDataParallel .*"),
    )
)
def gradient_of_integers(t):
    layer, _ = t.trained()
    model = DistributedDataParallel(layer, t.group)
    good = layer.bias.grad
    if t.faulty:
        layer.bias.grad = np.zeros(C, int)
    t.attempt(model.reduce_gradients)
    layer.bias.grad = good


@case(Attempt(Error("RuntimeError", "not a member of the group"), None))
def no_member(t):
    """A rank that is not in the group is told so, and disturbs nobody."""
    group = new_group(range(t.size - 1), comm=t.comm, timeout=PATIENCE)
    layer = SyncBatchNorm(C, process_group=group)
    x = t.watch(layer)
    t.attempt(lambda: [layer(x) for _ in range(2)])
    t.subjects.clear()


# A rank that does not come


def absent(name, call, error):
    """Register a case in which the faulty rank does not come to a call of the others."""

    @case(Attempt(None, error), Attempt(None, GIVEN_UP), goes_on=False, name=name)
    def run(t):
        layer, x = t.trained()
        t.group.timeout = SHORT
        t.attempt(lambda: None if t.faulty else call(t, layer, x))
        # The others need not wait once more. The rank itself may: its messages are answered no more.
        t.attempt(lambda: None if t.faulty else layer(x))


def model_of(layer, group):
    """Return the model without its construction, which is collective."""
    model = DistributedDataParallel.__new__(DistributedDataParallel)
    vars(model).update(module=layer, _group=group, bucket_cap_mb=25, _reductions=0)
    return model


absent("absent_in_forward", lambda t, layer, x: layer(x), missing(FORWARD))
absent(
    "absent_in_construction",
    lambda t, layer, x: DistributedDataParallel(layer, t.group),
    missing("construction 0"),
)
absent(
    "absent_in_reduce_gradients",
    lambda t, layer, x: model_of(layer, t.group).reduce_gradients(),
    missing("gradients 0"),
)
absent(
    "absent_in_broadcast", lambda t, layer, x: t.group.broadcast(np.zeros(3), root=t.size - 1), missing("")
)


@case(Attempt(None, missing(BACKWARD)), goes_on=False)
def absent_in_backward(t):
    layer, x = t.trained()
    t.forward()
    t.group.timeout = SHORT
    t.attempt(lambda: None if t.faulty else layer.backward(x))


@case(Attempt(None, timeout("the first call of stem")), goes_on=False)
def absent_in_first_call(t):
    layer = SyncBatchNorm(C, process_group=t.group, name="stem")
    x = t.watch(layer)
    t.group.timeout = SHORT
    t.attempt(lambda: None if t.faulty else layer(x))


@case(Attempt(None, timeout("")), goes_on=False)
def absent_in_new_group(t):
    t.group.timeout = SHORT
    t.attempt(lambda: None if t.faulty else new_group(comm=t.comm, timeout=SHORT))


@case(Attempt(None, timeout("")), goes_on=False)
def absent_in_split_group(t):
    t.group.timeout = SHORT
    t.attempt(lambda: None if t.faulty else split_group(t.size, comm=t.comm, timeout=SHORT))


@case(Attempt(None, timeout(f"forward 6 of {STEM}"), after_changes=True), goes_on=False)
def leaves_early(t):
    layer, x = t.trained()
    t.group.timeout = TIMEOUT
    t.attempt(lambda: [layer.backward(layer(x)) for _ in range(2 if t.faulty else 3)])


@case(Attempt(None, missing(FORWARD), late=missing(FORWARD)), goes_on=False, ranks=4)
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


@case(Attempt(None, timeout(FORWARD)), goes_on=False, ranks=4)
def absent_in_one_of_two_groups(t):
    t.group = split_group(t.size // 2, comm=t.comm, timeout=PATIENCE)
    if t.rank < t.size // 2:
        t.role = "spared"
    layer, x = t.trained()
    t.group.timeout = TIMEOUT
    t.attempt(lambda: None if t.faulty else [layer.backward(layer(x)) for _ in range(20)])


@case(
    Attempt(None, Error("CollectiveTimeoutError", f"{FORWARD}.* for ranks 1, {{last}}: a rank ended")),
    goes_on=False,
    ranks=4,
)
def two_are_absent(t):
    layer, x = t.trained()
    t.group.timeout = SHORT
    t.role = "faulty" if t.rank in (1, t.size - 1) else "other"
    t.attempt(lambda: None if t.faulty else layer(x))


IN_VAIN = Error("CollectiveTimeoutError", "they were in different calls, or one came too late")


@case(Attempt(IN_VAIN, IN_VAIN), goes_on=False)
def different_kinds_of_calls(t):
    """A broadcast of MPI never meets a sum of ours: all wait, and none is blamed."""
    layer, x = t.trained()
    t.group.timeout = SHORT
    t.attempt(lambda: t.group.broadcast(np.zeros(3), root=0) if t.faulty else layer(x))


@case(Attempt(None, missing(FORWARD)), Attempt(None, None), goes_on=False)
def new_communicator_after_a_timeout(t):
    """The error says how to go on, and so it goes."""
    layer, x = t.trained()
    t.group.timeout = SHORT
    t.attempt(lambda: None if t.faulty else layer(x))

    def follow():
        fresh = new_group(comm=world_of_ranks().Dup(), timeout=PATIENCE)
        layer.process_group = fresh
        layer.backward(layer(x))

    t.attempt(follow)


# A rank that comes when the others have given up


RESTED = Error("LookupError", "rested")
LATE_CALLS = {
    "forward": lambda t, layer, x: layer(x),
    "first_call": lambda t, layer, x: t.untrained(layer)(x),
    "backward": lambda t, layer, x: layer.backward(x),
    "construction": lambda t, layer, x: DistributedDataParallel(Sequential(layer, t.large), t.group),
    "reduce_gradients": lambda t, layer, x: t.model.reduce_gradients(),
    "broadcast": lambda t, layer, x: t.group.broadcast(t.large.weight.data),
    "allreduce": lambda t, layer, x: t.group.allreduce(t.large.weight.data),
}


@case(*[Attempt(..., timeout("")) for _ in LATE_CALLS], Attempt(RESTED, RESTED), goes_on=False, most=2)
def comes_late(t):
    """Whatever the late rank's messages meet, nothing of the others' changes any more."""
    for name, call in LATE_CALLS.items():
        t.renew_group()
        layer, x = t.trained()
        t.large = SyncBatchNorm(LARGE, process_group=t.group)
        t.watch(t.large)
        t.large.weight.data += t.rank
        if name == "reduce_gradients":
            t.model = DistributedDataParallel(Sequential(layer, t.large), t.group)
        layer.weight.grad = np.full(C, 1.0 + t.rank, "f4")
        t.large.weight.grad = np.full(LARGE, 1.0 + t.rank, "f4")
        if name == "backward":
            layer(x)
        t.group.timeout = SHORT

        given_up = Path(t.file.name).with_name(f"{name}.given_up")

        def late(call=call, layer=layer, x=x, given_up=given_up):
            # No fixed time: on a busy machine the other counts less. No message: MPI is to see all at once.
            while t.faulty and not given_up.exists():
                time.sleep(SHORT / 20)
            try:
                call(t, layer, x)
            finally:
                if not t.faulty:
                    given_up.touch()

        t.attempt(late)
    t.attempt(lambda: rest(t))


def rest(t):
    """Let MPI do what it still may, and do nothing."""
    end = time.monotonic() + REST
    while time.monotonic() < end:
        t.comm.Iprobe()
        time.sleep(1e-3)
    raise LookupError("rested")


# A process that is stopped, and goes on


def stop(seconds):
    """Stop this process soon, and let it go on after some seconds."""
    script = f"sleep 0.1; kill -STOP {os.getpid()}; sleep {seconds}; kill -CONT {os.getpid()}"
    return subprocess.Popen(["sh", "-c", script])


def stopped(name, who, direction="forward", num_features=C):
    """Register a case in which ranks are stopped for longer than the timeout while one waits for another.

    The other has what it waits for, and goes on, though its own message may not be taken within the timeout.
    """

    @case(Attempt(None, None), most=2, prompt=False, name=name)
    def run(t):
        layer, x = t.trained(num_features)
        twin = t.subjects[0][1]
        if direction == "backward":
            t.forward()
        t.group.timeout = 1.6

        def step():
            stopping = stop(2.0) if who(t) else None
            time.sleep(0.3 if t.faulty else 0)
            getattr(layer, direction)(x)
            if stopping is not None:
                stopping.wait()

        t.attempt(step)
        t.group.timeout = PATIENCE
        getattr(twin, direction)(x)
        t.owes_backward = direction == "forward"


stopped("waiting_rank_is_stopped", lambda t: not t.faulty)
stopped("waiting_rank_is_stopped_in_a_backward", lambda t: not t.faulty, "backward", num_features=9)
stopped("all_ranks_are_stopped", lambda t: True)


# What is legal


@case(Attempt(None, None))
def vectors_of_all_lengths(t):
    def add_up():
        for length in 5, 6, 1000, LONGEST - 1, LONGEST, LONGEST + 1, 3 * LONGEST:
            vector = np.arange(length) * (t.rank + 1.0)
            t.group.allreduce_checked(vector)
            np.testing.assert_array_equal(vector, np.arange(length) * (t.size * (t.size + 1) / 2))

    t.attempt(add_up)


@case(Attempt(None, None))
def late(t):
    layer, x = t.trained()

    def step():
        if t.faulty:
            time.sleep(0.3)
        return layer.backward(layer(x))

    t.attempt(step)
    twin = t.subjects[0][1]
    twin.backward(twin(x))


@case(Attempt(None, None), goes_on=False)
def no_samples(t):
    layer, x = t.trained()
    t.attempt(lambda: layer.backward(layer(x[:0] if t.faulty else x)))


@case(Attempt(None, None), goes_on=False)
def not_a_number(t):
    layer, x = t.trained()
    t.attempt(lambda: layer.backward(layer(x * np.nan if t.faulty else x)))


@case(Attempt(None, None), goes_on=False, prompt=False)
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
                with no_backward(layer):
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

USER_ERROR = Error("LookupError", "no such file")


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


@fatal(
    Ending(USER_ERROR, None, runner=True, ranks=4),
    Ending(USER_ERROR, timeout("forward 6 of stem"), runner=False),
)
def error_before_forward(t):
    run_to_the_end(t, user_error, "before")


@fatal(
    Ending(USER_ERROR, None, runner=True, ranks=4),
    Ending(USER_ERROR, timeout("backward 6 of stem"), runner=False),
)
def error_before_backward(t):
    run_to_the_end(t, user_error, "between")


@fatal(
    Ending(USER_ERROR, None, runner=True, ranks=4),
    Ending(USER_ERROR, timeout("forward 4 of stem"), runner=False, ranks=4),
)
def error_in_loader(t):
    run_to_the_end(t, user_error, "loader")


@fatal(Ending(None, ..., runner=True))
def ends(t):
    run_to_the_end(t, lambda: os._exit(0), "before")


@fatal(Ending(None, timeout("backward 6 of stem"), runner=True))
def sleeps(t):
    run_to_the_end(t, lambda: time.sleep(3600), "between")


@fatal(Ending(None, ..., runner=True))
def killed(t):
    run_to_the_end(t, lambda: os.kill(os.getpid(), signal.SIGKILL), "before")


@fatal(Ending(None, ..., runner=True))
def killed_in_an_exchange(t):
    """The first rank comes late, so that the others wait in an exchange."""
    if t.rank == 0:
        t.role = "late"
    layer, x = t.trained()
    t.group.timeout = FATAL_TIMEOUT
    if t.faulty:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def train():
        if t.rank == 0:
            time.sleep(0.5)
        for _ in range(3):
            layer.backward(layer(x))

    raise t.attempt(train)


def main(folder, chosen=None):
    world = world_of_ranks()
    pretend()
    with Path(folder, f"{world.rank}.jsonl").open("w") as file:
        if chosen in FATAL:
            run, _ = FATAL[chosen]
            run(Trial(file, chosen))
            return
        for name, case in CASES.items():
            if world.size in case.ranks and (chosen is None or case.is_for_two_alone):
                t = Trial(file, name)
                case.run(t)
                meet()
                goes_on = outcome(t.go_on) if case.goes_on else None
                t.report(goes_on=goes_on, new_group=outcome(start_anew))


if __name__ == "__main__":
    main(*sys.argv[1:])
