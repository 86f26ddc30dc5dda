"""convert_sync_batchnorm."""

import copy
import dataclasses
import warnings
from collections import deque
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from cupy_syncbn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    DistributedDataParallel,
    Module,
    Parameter,
    RemoteRankError,
    Sequential,
    SyncBatchNorm,
    convert_sync_batchnorm,
    frozen_statistics,
    recalibrate,
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


# What a conversion would lose


class Rectified(BatchNorm2d):
    """A normalization with what follows it, as other libraries have."""

    def forward(self, x, *arguments, **keywords):
        return np.maximum(super().forward(x, *arguments, **keywords), 0)

    def backward(self, dy):
        return super().backward(dy * 2)


class WithSettings(BatchNorm1d):
    def __init__(self, channels):
        super().__init__(channels, eps=1e-3, activation="relu")

    def __repr__(self):
        return "WithSettings"


class Mixin:
    def extra_repr(self):
        return "mixed"


class Mixed(Mixin, BatchNorm3d):
    __slots__ = ("scale",)
    training = False


class Called(BatchNorm1d):
    def __call__(self, x):
        return -self.forward(x)


CONVERT = [convert_sync_batchnorm, SyncBatchNorm.convert_sync_batchnorm]


@pytest.mark.parametrize("convert", CONVERT)
@pytest.mark.parametrize(
    ("kind", "lost"),
    [(Rectified, "backward, forward"), (Mixed, "extra_repr, scale, training"), (Called, "__call__")],
)
def test_class_that_loses_what_it_has_of_its_own(kind, lost, convert):
    layers = [kind(2), kind(2)]
    with pytest.warns(UserWarning, match="becomes SyncBatchNorm") as caught:
        convert(layers)
    (warning,) = caught  # one for the class
    assert f"{kind.__name__} becomes SyncBatchNorm, and loses what it has of its own: {lost}. Derive" in str(
        warning.message
    )
    assert warning.filename == __file__
    assert [type(layer) for layer in layers] == [SyncBatchNorm] * 2


def test_the_remedy_for_what_is_lost(world, rng):
    class SyncRectified(SyncBatchNorm):
        def forward(self, x):
            return np.maximum(super().forward(x), 0)

    net = convert_sync_batchnorm(Sequential(SyncRectified(2)))
    x = random_batch(rng, (12, 2, 3, 3))
    assert type(net[0]) is SyncRectified
    assert_close(net(x[world.part(12)]), np.maximum(BatchNorm(2)(x), 0), world.part(12))


def test_class_that_loses_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = convert_sync_batchnorm(WithSettings(3))
    assert (type(layer), layer.eps, layer.activation) == (SyncBatchNorm, 1e-3, "relu")


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_methods_that_are_set_on_a_layer(name):
    """They may call the layer that was."""
    layer, usual = BatchNorm1d(3), getattr(BatchNorm1d(3), name)
    setattr(layer, name, lambda x: usual(x) * 2)
    with pytest.warns(UserWarning, match=f"BatchNorm1d has its own {name} as an attribute"):
        convert_sync_batchnorm([layer])


class Scaled(SyncBatchNorm):
    """Has an attribute, a slot, and an __init__ and a __new__ of its own."""

    __slots__ = ("scale",)

    def __new__(cls, channels, factor):
        return super().__new__(cls)

    def __init__(self, channels, factor):
        super().__init__(channels)
        self.factor, self.scale = factor, 3

    def forward(self, x):
        return super().forward(x) * self.factor


@pytest.mark.parametrize("group", [None, "halves"])
def test_subclasses_of_synchronized_layers_keep_their_type(world, rng, group):
    layer = Scaled(3, factor=5)
    x = random_batch(rng, (12, 3))[world.part(12)]
    layer(x)
    group = group and split_group(1)
    net = convert_sync_batchnorm({"norm": layer, "same": layer}, group)
    new = net["norm"]
    assert type(new) is Scaled
    assert new is net["same"]
    assert (new.factor, new.scale) == (5, 3)
    assert new.weight is layer.weight
    assert new.running_var is layer.running_var
    assert (new is layer) == (group is None)
    if group is not None:
        assert new.process_group is group
        assert layer.process_group is None
        assert_identical(new(x), BatchNorm1d(3)(x) * 5)


# What holds no layers


@pytest.mark.parametrize("convert", CONVERT)
@pytest.mark.parametrize(
    "held",
    [[], {}, (), Linear(), [Linear(), "relu", 3], SimpleNamespace(a=1)],
    ids=["list", "dict", "tuple", "module", "modules", "namespace"],
)
def test_object_without_layers(held, convert):
    match = r"found no BatchNorm layer of cupy_syncbn in [\w.]+, .*keep layers there"
    with pytest.warns(UserWarning, match=match) as caught:
        assert convert(held) is held
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "thing",
    ["model", b"model", 3, 2.5, None, np.ones(3), {BatchNorm1d(3)}, deque([BatchNorm1d(3)]), object()],
    ids=lambda thing: type(thing).__name__,
)
def test_things_that_can_hold_no_layers(thing):
    kind = type(thing).__name__
    with pytest.raises(
        TypeError, match=rf"expected a layer, a Module, or an object .*\(got (\w+\.)?{kind}\)"
    ):
        convert_sync_batchnorm(thing)


@pytest.mark.parametrize(
    "thing", [BatchNorm2d, Linear, convert_sync_batchnorm, np, len, Parameter(np.ones(3))]
)
def test_classes_functions_and_modules_of_python(thing):
    with pytest.raises(TypeError, match=r"expected a layer, a Module, or an object"):
        convert_sync_batchnorm(thing)
    with pytest.raises(TypeError, match="the class BatchNorm2d"):
        convert_sync_batchnorm(BatchNorm2d)


def test_object_that_is_converted_already():
    for held in SyncBatchNorm(3), Sequential(SyncBatchNorm(3)), {"a": [SyncBatchNorm(3)]}:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert convert_sync_batchnorm(held) is held
            assert convert_sync_batchnorm(convert_sync_batchnorm(held)) is held


@pytest.mark.mpi_skip
def test_modules_of_torch():
    torch = pytest.importorskip("torch", reason="builds modules of torch, which is not installed")
    nn = torch.nn

    class Theirs(nn.BatchNorm2d):
        pass

    remedy = r"by cupy_syncbn\.interop\.torch\.convert_sync_batchnorm$"
    for model in nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Identity():
        with pytest.raises(TypeError, match=r"got torch\.nn\.modules\..*" + remedy):
            convert_sync_batchnorm(model)
    ours = BatchNorm2d(3)
    for held, path in (
        (nn.BatchNorm1d(3), r"\)"),
        (nn.Sequential(nn.Linear(2, 2), Theirs(3)), r" at 1\)"),
        ({"encoder": nn.Sequential(nn.BatchNorm3d(3)), "head": ours}, r" at encoder\.0\)"),
        (SimpleNamespace(head=ours, norm=Theirs(3)), r" at norm\)"),
    ):
        with pytest.raises(TypeError, match=path + ".*" + remedy):
            convert_sync_batchnorm(held)
    hybrid = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(3))
    hybrid.norm = ours
    assert convert_sync_batchnorm(hybrid) is hybrid
    assert type(hybrid.norm) is SyncBatchNorm


# Conversion and Module reach the same layers


class Plain:
    """Is no Module."""

    def __init__(self, held):
        self.held = held


@dataclasses.dataclass
class Record:
    held: object


class Holder(Module):
    def __init__(self, held):
        self.block = held


class Slots(Module):
    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held


def unseen(layer):
    """Return modules that do not see a layer, by its name in them, with the type that keeps it from them."""
    items = Stack([])
    items.norm = layer
    return {
        "block.held": (Holder(Plain(layer)), "Plain"),
        "block.0.held": (Holder([Record(layer)]), "Record"),
        "block.a.held.1": (Holder({"a": SimpleNamespace(held=(1, layer))}), "SimpleNamespace"),
        "block.held.block": (Holder(Plain(Holder(layer))), "Plain"),
        "block.held.0.layers.0": (Holder(Record([Sequential(layer)])), "Record"),
        "layers.1.block.held": (Sequential(Linear(), Holder(Plain(layer))), "Plain"),
        "block.norm": (Holder(items), "Stack"),
        "held": (Slots(layer), "Slots"),
    }


@pytest.mark.parametrize("within", ["", "dict", "plain"])
@pytest.mark.parametrize("name", unseen(BatchNorm1d(1)))
def test_layer_that_a_module_does_not_see(name, within):
    layer = BatchNorm1d(3)
    module, wall = unseen(layer)[name]
    root = {"": module, "dict": {"net": module}, "plain": Plain([BatchNorm1d(3), module])}[within]
    match = rf"{type(module).__name__} does not see its layer {name} \(BatchNorm1d\) .*{wall} (is no|shows)"
    with pytest.raises(TypeError, match=match):
        convert_sync_batchnorm(root)
    assert type(layer) is BatchNorm1d
    if within == "plain":
        assert type(root.held[0]) is BatchNorm1d  # nothing has been changed
    # One that is converted by itself, before it comes there, is left alone.
    convert_sync_batchnorm(unseen(SyncBatchNorm(3))[name][0])


@pytest.mark.parametrize("kind", [BatchNorm1d, SyncBatchNorm])
@pytest.mark.parametrize("name", unseen(BatchNorm1d(1)))
def test_wrapper_of_a_layer_that_the_module_does_not_see(world, name, kind):
    """On one rank: the others hear of it."""
    last = world.size - 1
    module = unseen(kind(3))[name][0] if world.rank == last else Sequential(SyncBatchNorm(3))
    match = f"does not see its layer {name}" if world.rank == last else f"rank {last}"
    with pytest.raises(TypeError if world.rank == last else RemoteRankError, match=match):
        DistributedDataParallel(module)


def test_recalibration_of_a_layer_that_the_module_does_not_see():
    with pytest.raises(TypeError, match=r"does not see its layer block\.held"):
        recalibrate(Holder(Plain(BatchNorm1d(3))), [np.ones((4, 3), "f4")])


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    "use", [DistributedDataParallel, frozen_statistics, lambda held: recalibrate(held, [])]
)
def test_what_is_no_module(use):
    torch = pytest.importorskip("torch", reason="builds modules of torch, which is not installed")
    for held in torch.nn.Sequential(), [SyncBatchNorm(3)], Plain(SyncBatchNorm(3)), None:
        kind = type(held)
        match = rf"expected a Module of cupy_syncbn \(got (\w+\.)*{kind.__name__}\)"
        with pytest.raises(TypeError, match=match):
            use(held)


def test_the_remedy_for_layers_that_are_not_seen(world):
    class Block(Module):
        __init__ = Plain.__init__

    class Net(Module):
        def __init__(self):
            self.block = Block([BatchNorm1d(3), {"a": BatchNorm2d(3)}])

    net = DistributedDataParallel(convert_sync_batchnorm(Net()))
    assert len(net.state_dict()) == 10
    assert not net.eval().module.block.held[1]["a"].training
    assert type(net.module.block.held[0]) is SyncBatchNorm


def test_layer_that_a_module_sees_elsewhere():
    """A plain object may refer to layers, or to the module itself."""
    net = Holder([BatchNorm1d(3)])
    net.helper = Plain([net.block[0], net])
    net.copy = None
    assert convert_sync_batchnorm(net) is net
    assert net.helper.held[0] is net.block[0]
    DistributedDataParallel(net)
    DistributedDataParallel(copy.deepcopy(net))


def test_long_chains_of_objects():
    chain = None
    for _ in range(20000):
        chain = Plain(chain)
    net = Holder([BatchNorm1d(3)])
    net.tape = chain
    convert_sync_batchnorm(net)
    DistributedDataParallel(net)
    while chain is not None:  # as Python would end them in a recursion
        chain.held, chain = None, chain.held
