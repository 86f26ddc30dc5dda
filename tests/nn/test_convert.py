"""convert_sync_batchnorm."""

import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from cupy_syncbn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Module,
    Parameter,
    Sequential,
    SyncBatchNorm,
    convert_sync_batchnorm,
    split_group,
)
from support.arrays import random_array, random_batch
from support.compare import assert_close, assert_identical
from support.reference import BatchNorm

ARGUMENTS = {"eps": 1e-3, "momentum": None, "dtype": "float64", "channels_last": True, "activation": "relu"}


@pytest.mark.parametrize("layer_class", [BatchNorm1d, BatchNorm2d, BatchNorm3d])
@pytest.mark.parametrize("convert", [convert_sync_batchnorm, SyncBatchNorm.convert_sync_batchnorm])
def test_layer_shares_all_it_has(layer_class, convert):
    layer = layer_class(5, **ARGUMENTS, grad_reduction="sum", name="norm").eval()
    converted = convert(layer)
    assert type(converted) is SyncBatchNorm
    assert converted.weight is layer.weight
    assert converted.bias is layer.bias
    assert converted.running_mean is layer.running_mean
    assert converted.running_var is layer.running_var
    assert converted.num_batches_tracked is layer.num_batches_tracked
    assert not converted.training
    for name in "eps", "momentum", "channels_last", "activation", "grad_reduction", "name":
        assert getattr(converted, name) == getattr(layer, name)
    assert convert(layer_class(5)).training


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track_running_stats", [True, False])
def test_layer_without_parameters_or_buffers(affine, track_running_stats):
    layer = BatchNorm1d(5, affine=affine, track_running_stats=track_running_stats)
    converted = convert_sync_batchnorm(layer)
    assert converted.state_dict().keys() == layer.state_dict().keys()
    assert (converted.weight is None) == (not affine)
    assert (converted.running_mean is None) == (not track_running_stats)


class Linear(Module):
    def __init__(self):
        super().__init__()
        self.weight = Parameter(np.ones((2, 2), "f4"))


class Network(Module):
    def __init__(self):
        super().__init__()
        self.linear = Linear()
        self.norm = BatchNorm1d(1)
        self.blocks = [Linear(), BatchNorm2d(2), [BatchNorm3d(3)]]
        self.pair = (BatchNorm1d(4), Linear())
        self.heads = {"a": Sequential(BatchNorm1d(5)), "b": Linear()}
        self.sizes = [1, 2, 3]
        self.nothing = None


def test_whole_tree():
    network = Network()
    names = [name for name, _ in network.named_parameters()]
    state = network.state_dict()
    kept = network.linear, network.blocks[0], network.pair[1], network.heads["b"]

    assert convert_sync_batchnorm(network) is network
    norms = [network.norm, network.blocks[1], network.blocks[2][0], network.pair[0], network.heads["a"][0]]
    assert [type(norm) for norm in norms] == [SyncBatchNorm] * 5
    assert [norm.weight.data.size for norm in norms] == [1, 2, 3, 4, 5]
    assert isinstance(network.pair, tuple)
    assert (network.linear, network.blocks[0], network.pair[1], network.heads["b"]) == kept
    assert network.sizes == [1, 2, 3]
    assert [name for name, _ in network.named_parameters()] == names
    assert network.state_dict().keys() == state.keys()
    for name, array in network.state_dict().items():
        assert array is state[name]


def test_shared_layer_stays_shared():
    layer = BatchNorm1d(3)
    model = convert_sync_batchnorm(Sequential(layer, layer))
    assert model[0] is model[1]


def test_converted_layer_is_synchronized(world, rng):
    x, dy = random_batch(rng, (12, 3, 4)), random_array(rng, (12, 3, 4))
    part = world.part(12, "empty")
    model, reference = convert_sync_batchnorm(Sequential(BatchNorm1d(3))), BatchNorm(3)
    assert_close(model(x[part]), reference(x), part)
    assert_close(model[0].backward(dy[part]), reference.backward(dy), part)
    assert_close(model[0].running_var, reference.running_var)


@pytest.mark.parametrize("layer_class", [BatchNorm1d, SyncBatchNorm])
def test_process_group(world, rng, layer_class):
    """In groups of one, each rank has its own statistics."""
    x = random_batch(rng, (12, 3))[world.part(12)]
    model = convert_sync_batchnorm(Sequential(layer_class(3)), process_group=split_group(1))
    assert_identical(model(x), BatchNorm1d(3)(x))


def test_synchronized_layers_are_left_alone(world):
    group = split_group(world.size)
    layer = SyncBatchNorm(3, process_group=group)
    model = Sequential(layer)
    convert_sync_batchnorm(model)
    assert model[0] is layer
    assert convert_sync_batchnorm(layer) is layer


class Pair(NamedTuple):
    first: object
    second: object


def test_other_objects():
    """Layers are found wherever a program keeps them."""
    linear = Linear()
    assert convert_sync_batchnorm(linear) is linear
    layers = [BatchNorm1d(3)]
    assert convert_sync_batchnorm(layers) is layers
    assert type(layers[0]) is SyncBatchNorm
    holder = SimpleNamespace(pair=Pair(BatchNorm1d(3), 5), itself=None)
    holder.itself = holder
    convert_sync_batchnorm(holder)
    assert isinstance(holder.pair, Pair)
    assert type(holder.pair.first) is SyncBatchNorm


class Registry(dict):
    pass


class Stack(list):
    __slots__ = ("norm",)


class Private:
    __slots__ = "__norm"

    def __init__(self, norm):
        self.__norm = norm

    @property
    def norm(self):
        return self.__norm


class Named(Pair):
    """A subclass without slots has attributes beside its items."""


class Two(tuple):
    def __new__(cls, first, second):
        return super().__new__(cls, (first, second))


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    norm: object


def test_attributes_of_collections():
    layer = BatchNorm1d(3)
    for holder in Registry(item=layer), Stack([layer]):
        holder.norm = layer
        assert convert_sync_batchnorm(holder) is holder
        assert type(holder.norm) is SyncBatchNorm
        assert holder.norm is holder["item" if isinstance(holder, dict) else 0]
    without = Named("a", "b")
    without.norm = layer
    assert convert_sync_batchnorm(without) is without
    assert type(without.norm) is SyncBatchNorm


@pytest.mark.parametrize("kind", [Private, Frozen])
def test_slots(kind):
    holder = kind(BatchNorm1d(3))
    convert_sync_batchnorm([holder])
    assert type(holder.norm) is SyncBatchNorm


@pytest.mark.parametrize("kind", [tuple, Pair, Named, Two])
def test_tuples(kind):
    layer = BatchNorm1d(3)
    old = (layer, [layer]) if kind is tuple else kind(layer, [layer])
    if kind in (Named, Two):
        old.norm, old.itself, old.size = layer, old, 7
    new, same = convert_sync_batchnorm([old, old])
    assert type(new) is kind
    assert new is same
    assert type(new[0]) is SyncBatchNorm
    assert new[0] is new[1][0]
    if kind in (Named, Two):
        assert (new.norm, new.itself, new.size) == (new[0], new, 7)
        assert new.itself is new
    assert old[0] is layer


class Unbuildable(tuple):
    def __iter__(self):
        raise ValueError("no items")


def test_all_or_nothing():
    model = Sequential(BatchNorm1d(3), BatchNorm1d(3))
    model.heads = [BatchNorm1d(3), Unbuildable((BatchNorm1d(3),))]
    model.last = BatchNorm1d(3)
    with pytest.raises(ValueError, match="no items"):
        convert_sync_batchnorm(model)
    for layer in model[0], model[1], model.heads[0], model.last:
        assert type(layer) is BatchNorm1d


def test_attribute_that_a_property_hides():
    class Net:
        bn = property(lambda self: vars(self)["bn"])

        def __init__(self):
            vars(self)["bn"] = BatchNorm1d(3)

    assert type(convert_sync_batchnorm(Net()).bn) is SyncBatchNorm


def test_wrong_process_group_changes_nothing():
    model = Sequential(BatchNorm1d(3))
    with pytest.raises(TypeError, match="process_group"):
        convert_sync_batchnorm(model, process_group="world")
    assert type(model[0]) is BatchNorm1d
