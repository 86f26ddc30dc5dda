"""Plans: a kind of input is checked once, and what can change from call to call is looked at in each."""

import gc
import weakref

import numpy as np
import pytest

from cupy_syncbn import (
    RemoteRankError,
    SingleProcessGroup,
    SyncBatchNorm,
    plan,
    sync_batch_norm,
    sync_batch_norm_backward,
)
from support.arrays import random_batch
from support.compare import assert_close, assert_identical
from support.reference import BatchNorm

C = 5
SHAPE = (6, C, 3)


@pytest.fixture
def checked(monkeypatch):
    """Return the list of the kinds of input that are checked from here on, by their shapes."""
    found, usual = [], plan._checked

    def record(x, *rest):
        found.append(x.shape)
        return usual(x, *rest)

    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(plan, "_checked", record)
    return found


def alone(**settings):
    return SyncBatchNorm(C, process_group=SingleProcessGroup(), **settings)


def step(layer, reference, x):
    """Compare a forward and a backward of a layer with the reference."""
    assert_close(layer(x), reference.forward(x))
    dy = np.cos(3 * x)
    assert_close(layer.backward(dy), reference.backward(dy))
    layer.zero_grad()
    assert_close(layer.running_var, reference.running_var)


def test_a_kind_of_input_is_checked_once(rng, checked):
    layer, reference = alone(activation="relu"), BatchNorm(C, activation="relu")
    for _ in range(3):
        step(layer, reference, random_batch(rng, SHAPE))
    assert checked == [SHAPE]
    step(layer, reference, random_batch(rng, (2, *SHAPE[1:])))
    assert checked == [SHAPE, (2, *SHAPE[1:])]
    other = alone(activation="relu")
    other(random_batch(rng, SHAPE))  # of the same kind
    assert len(checked) == 2


def test_settings_may_change(rng, checked):
    """Each is read in each call: a plan is that of its settings."""
    layer, reference = alone(), BatchNorm(C)
    step(layer, reference, random_batch(rng, SHAPE))
    for name, value in ("eps", 0.1), ("momentum", 0.5), ("activation", "relu"), ("momentum", None):
        setattr(layer, name, value)
        setattr(reference, name, value)
        step(layer, reference, random_batch(rng, SHAPE))
    layer.channels_last = True
    x = random_batch(rng, SHAPE)
    y = layer(x.transpose(0, 2, 1))
    assert_close(y.transpose(0, 2, 1), reference.forward(x))
    layer.training = reference.training = False
    assert_close(layer(x.transpose(0, 2, 1)).transpose(0, 2, 1), reference.forward(x))
    layer.track_running_stats, layer.training, layer.channels_last = False, True, False
    before = layer.running_mean.copy()
    layer(x)
    assert_identical(layer.running_mean, before)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("eps", -1.0, ValueError), ("momentum", 2.0, ValueError), ("activation", "gelu", ValueError),
     ("activation", ["relu", {}], ValueError), ("dtype", np.dtype("float64"), TypeError)],
)  # fmt: skip
def test_a_setting_that_becomes_wrong(rng, checked, name, value, error):
    layer, x = alone(), random_batch(rng, SHAPE)
    layer(x)
    right = getattr(layer, name)
    for _ in range(2):
        setattr(layer, name, value)
        with pytest.raises(error):
            layer(x)
        setattr(layer, name, right)
        layer(x)


def test_a_setting_without_a_hash(rng, checked):
    """It is checked in each call."""
    layer, reference = alone(activation=["leaky_relu", 0.3]), BatchNorm(C, activation=("leaky_relu", 0.3))
    for calls in 1, 2:
        step(layer, reference, random_batch(rng, SHAPE))
        assert len(checked) == calls


@pytest.mark.parametrize(
    ("replace", "error"),
    [
        (lambda layer: setattr(layer.weight, "data", np.ones(C + 1, "f4")), ValueError),
        (lambda layer: setattr(layer.weight, "data", np.ones(C)), TypeError),
        (lambda layer: setattr(layer.bias, "data", [0.0] * C), TypeError),
        (lambda layer: layer.register_buffer("running_mean", np.zeros((C, 1), "f4")), ValueError),
        (lambda layer: setattr(layer, "running_var", None), ValueError),
        (lambda layer: layer.register_buffer("num_batches_tracked", np.zeros((), "f4")), ValueError),
        (lambda layer: layer.running_mean.setflags(write=False), ValueError),
        (lambda layer: layer.running_var.setflags(write=False), ValueError),
        (lambda layer: layer.num_batches_tracked.setflags(write=False), ValueError),
    ],
)
def test_an_array_that_becomes_wrong(rng, checked, replace, error):
    layer, x = alone(), random_batch(rng, SHAPE)
    layer.backward(layer(x))
    replace(layer)
    with pytest.raises(error):
        layer(x)


def test_another_array_of_the_same_kind(rng, checked):
    layer, reference = alone(), BatchNorm(C)
    step(layer, reference, random_batch(rng, SHAPE))
    layer.weight.data = np.arange(C, dtype="f4")
    reference.weight = np.arange(C, dtype=float)
    layer.running_var = np.full(C, 7, "f4")
    reference.running_var = np.full(C, 7.0)
    step(layer, reference, random_batch(rng, SHAPE))
    assert checked == [SHAPE]


def test_an_overlapping_result(rng, checked):
    layer, memory = alone(), np.empty((2, *SHAPE), "f4")
    memory[0] = random_batch(rng, SHAPE)
    layer(memory[0], out=memory[1])
    with pytest.raises(ValueError, match="share no memory"):
        layer(memory[0], out=memory[0])
    assert checked == [SHAPE]


def test_gradients_are_checked_by_kind(rng, checked):
    x = random_batch(rng, SHAPE)
    for _ in range(2):
        y, saved = sync_batch_norm(x, process_group=SingleProcessGroup())
        right = sync_batch_norm_backward(y, saved).x
        assert_identical(sync_batch_norm_backward(np.asfortranarray(y), saved).x, right)
        for wrong, error in ((y[1:], ValueError), (y.astype("f8"), TypeError), ([1.0], TypeError)):
            with pytest.raises(error):
                sync_batch_norm_backward(wrong, saved)
        for reduction in "median", ["sum"]:
            with pytest.raises((ValueError, TypeError)):
                sync_batch_norm_backward(y, saved, grad_reduction=reduction)
    assert checked == [SHAPE]


def test_another_group(world, rng, checked):
    """The plan of a process alone is not that of several, where one value per channel is enough."""
    x = random_batch(rng, (1, C))
    layer = alone()
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(x)
    if world.size > 1:
        layer.process_group = None
        layer(x)
        layer.process_group = SingleProcessGroup()
        with pytest.raises(ValueError, match="more than 1 value"):
            layer(x)


def test_ranks_hear_of_what_a_plan_does_not_know(world, rng):
    """After a call in which all was right, one rank's running statistics become read-only."""
    layer, x = SyncBatchNorm(C), random_batch(rng, SHAPE)
    layer(x)
    last = world.rank == world.size - 1
    if last:
        layer.running_mean.setflags(write=False)
    with pytest.raises(ValueError if last else RemoteRankError):
        layer(x)


def test_plans_are_bounded(rng, checked, monkeypatch):
    monkeypatch.setattr(plan, "MOST_PLANS", 3)
    monkeypatch.setattr(plan, "MOST_GRADIENTS", 2)
    layer, reference = alone(), BatchNorm(C)
    for n in (2, 3, 4, 5, 2, 3, 4, 5):
        x = random_batch(rng, (n, *SHAPE[1:]))
        step(layer, reference, x)
        assert len(plan._plans) <= 3
    for axes in (0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0):
        layer(x)
        dy = np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))
        layer.backward(dy)
        assert all(len(each.gradients) <= 2 for each in plan._plans.values())


def test_plans_keep_no_array_alive(rng, checked):
    layer, x = alone(), random_batch(rng, SHAPE)
    layer.backward(layer(x))
    arrays = [weakref.ref(array) for array in (x, layer.weight.data, layer.running_mean)]
    del layer, x
    gc.collect()
    assert len(plan._plans) == 1
    assert [array() for array in arrays] == [None] * 3


def test_another_device(world, rng, cupy, monkeypatch, checked):
    """The current device may change between two calls."""
    if "StandIn" not in type(cupy).__name__:
        pytest.skip("there is no emulator, whose current device a test may choose")
    layer = alone(device="cuda")
    x = cupy.asarray(random_batch(rng, SHAPE))
    y = layer(x)
    with monkeypatch.context() as patch:
        patch.setattr(cupy.cuda.runtime, "getDevice", lambda: 1)
        for call in lambda: layer.backward(y), lambda: layer(x):
            with pytest.raises(ValueError, match="current device"):
                call()
    layer.backward(y)
    layer(x)
    assert checked == [SHAPE] * 2


def test_gradient_on_another_device(rng, emulator, cupy):
    """The record lies on the forward's: the kernels would read it from the other one."""
    emulator.devices.count = 2
    cupy.cuda.Device(0).use()
    layer = alone(device="cuda")
    x = cupy.asarray(random_batch(rng, SHAPE))
    y = layer(x)
    with cupy.cuda.Device(1):
        dy = cupy.asarray(random_batch(rng, SHAPE))
        with pytest.raises(ValueError, match="device of its forward, 0 "):
            layer.backward(dy)
    layer.backward(y)  # nothing was lost
    layer.backward(layer(x))
