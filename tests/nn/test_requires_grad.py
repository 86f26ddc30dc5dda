"""Frozen parameters: no gradient is computed, reduced or averaged for them, and ranks compare which."""

import copy
import pickle

import numpy as np
import pytest

from cupy_syncbn import (
    BatchNorm1d,
    BatchNorm2d,
    DistributedDataParallel,
    Parameter,
    RankMismatchError,
    Sequential,
    SyncBatchNorm,
    convert_sync_batchnorm,
    functional,
)
from support.arrays import on_host, random_array, random_batch
from support.compare import assert_close, assert_identical

C, SHAPE = 4, (12, 4, 3, 2)


@pytest.fixture
def asked(monkeypatch):
    """Return the list of the types of gradients that backends are asked for."""
    found, usual = [], functional.ParameterSums

    def sums(vector, scale, *types):
        found.append(types)
        return usual(vector, scale, *types)

    monkeypatch.setattr(functional, "ParameterSums", sums)
    return found


@pytest.mark.parametrize("grad_reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("training", [True, False])
def test_no_gradient_is_computed(world, rng, device, xp, asked, grad_reduction, frozen, training):
    layers = [SyncBatchNorm(C, device=device, grad_reduction=grad_reduction).train(training) for _ in "12"]
    part = world.part(SHAPE[0])
    x, dy = (xp.asarray(random_array(rng, SHAPE)[part]) for _ in "12")
    for name in frozen:
        getattr(layers[1], name).requires_grad = False
    results = [(on_host(layer(x)), on_host(layer.backward(dy))) for layer in layers]
    for one, other in zip(*results, strict=True):
        assert_identical(one, other)
    for name in "weight", "bias":
        free, held = (getattr(layer, name) for layer in layers)
        assert free.grad is not None
        if name in frozen:
            assert held.grad is None
        else:
            assert_identical(on_host(held.grad), on_host(free.grad))
    assert asked[0] == (np.float32, np.float32)
    assert asked[1] == tuple(None if name in frozen else np.float32 for name in ("weight", "bias"))


def test_a_gradient_that_is_there_stays(rng):
    layer, x = BatchNorm2d(C), random_batch(rng, SHAPE)
    layer.backward(layer(x))
    before = layer.weight.grad.copy()
    assert layer.requires_grad_(False) is layer
    layer.backward(layer(x))
    assert_identical(layer.weight.grad, before)
    layer.requires_grad_()
    layer.backward(layer(x))
    assert_close(layer.weight.grad, 2 * before)


@pytest.mark.parametrize(("at_forward", "at_backward"), [(True, False), (False, True)])
def test_a_change_between_forward_and_backward(rng, at_forward, at_backward):
    """There is a gradient only if it is set at both, as in torch."""
    layer, x = BatchNorm2d(C), random_batch(rng, SHAPE)
    layer.weight.requires_grad = at_forward
    y = layer(x)
    layer.weight.requires_grad = at_backward
    layer.backward(y)
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    theirs = torch.nn.BatchNorm2d(C)
    theirs.weight.requires_grad_(at_forward)
    y = theirs(torch.from_numpy(x))
    theirs.weight.requires_grad_(at_backward)
    y.sum().backward()
    assert theirs.weight.grad is None


def test_a_parameter_of_ones_own():
    parameter = Parameter(np.ones(2), requires_grad=False)
    parameter.accumulate(np.ones(2))
    assert parameter.grad is None
    assert "requires_grad=False" in repr(parameter)
    assert parameter.requires_grad_() is parameter
    parameter.accumulate(np.ones(2))
    assert parameter.grad.tolist() == [1, 1]
    assert "requires_grad" not in repr(parameter)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_frozen(duplicate):
    net = Sequential(BatchNorm1d(2).requires_grad_(False), BatchNorm1d(2))
    assert [p.requires_grad for p in duplicate(net).parameters()] == [False, False, True, True]
    converted = convert_sync_batchnorm(net)
    assert [p.requires_grad for p in converted.parameters()] == [False, False, True, True]


def test_frozen_gradients_are_not_averaged(world, device, xp):
    net = Sequential(SyncBatchNorm(C, device=device), BatchNorm2d(C, device=device))
    net[0].weight.requires_grad = False
    net[1].requires_grad_(False)
    model = DistributedDataParallel(net)
    for parameter in net.parameters():
        parameter.grad = xp.full(C, world.rank + 1.0, "f4")
    model.reduce_gradients()
    mean = (world.size + 1) / 2
    for parameter in net.parameters():
        expected = mean if parameter.requires_grad else world.rank + 1
        assert on_host(parameter.grad).tolist() == [expected] * C
    net.requires_grad_(True)  # on all ranks, it can change at any time
    model.reduce_gradients()
    assert on_host(net[0].weight.grad).tolist() == [mean] * C


def test_all_are_frozen(world):
    net = Sequential(SyncBatchNorm(C))
    model = DistributedDataParallel(net)
    net.requires_grad_(False)
    net[0].weight.grad = np.full(C, world.rank, "f4")
    model.reduce_gradients()
    assert net[0].weight.grad.tolist() == [world.rank] * C


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("grad_reduction", ["none", "sum"])
@pytest.mark.parametrize("where", ["construction", "reduction", "first call"])
def test_ranks_compare_which_are_frozen(world, rng, name, where, grad_reduction):
    """Those too whose gradients the layer itself adds up."""
    layer = SyncBatchNorm(C, grad_reduction=grad_reduction)
    net = Sequential(layer)
    last = world.size - 1
    model = DistributedDataParallel(net) if where == "reduction" else None
    calls = {
        "construction": lambda: DistributedDataParallel(net),
        "reduction": lambda: model.reduce_gradients(),
        "first call": lambda: layer(random_batch(rng, SHAPE)),
    }
    getattr(layer, name).requires_grad = world.rank != last
    with pytest.raises(RankMismatchError) as caught:
        calls[where]()
    text = str(caught.value)
    assert "requires_grad" in text or (where == "construction" and world.rank != last)
    assert name in text or where != "first call"


@pytest.mark.mpi(min_size=2)
def test_ranks_compare_which_parameters_there_are(world, rng):
    layer = SyncBatchNorm(C)
    if world.rank == 0:
        layer.bias = None
    with pytest.raises(RankMismatchError, match="bias=None"):
        layer(random_batch(rng, SHAPE))
