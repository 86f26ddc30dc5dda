"""A module's tree: walked once, and again when something has changed in it, whatever way that was done."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest

from cupy_syncbn import (
    BatchNorm1d,
    DistributedDataParallel,
    Module,
    MPIProcessGroup,
    Parameter,
    Sequential,
    SyncBatchNorm,
    convert_sync_batchnorm,
)
from cupy_syncbn.nn import tree


class Block(Module):
    def __init__(self):
        self.norm = BatchNorm1d(2)
        self.table = {"first": BatchNorm1d(3), "numbers": [1, 2]}
        self.pair = (1.0, [BatchNorm1d(4)])
        self.scale = None
        self.numbers = (1.0, 2.0)
        self.deep = ([], {"a": []})


@pytest.fixture
def net():
    net = Sequential(BatchNorm1d(1), Block(), Sequential(BatchNorm1d(5)))
    net.zero_grad()
    return net


@pytest.fixture
def walks(monkeypatch):
    """Return the list of the walks from here on."""
    found, usual = [], tree.Tree._walk
    monkeypatch.setattr(tree.Tree, "_walk", lambda self, *rest: found.append(1) or usual(self, *rest))
    return found


def names(module):
    return [name for name, _ in module.named_parameters()]


def test_nothing_has_changed(net, walks):
    before = names(net)
    assert len(before) == 2 * 5
    net[1].scale = 3.0  # no parameter, but another type: seen again
    net[0](np.ones((3, 1), "f4"))
    net.train().forget()
    names(net)
    walks.clear()
    for _ in range(3):
        net[1].scale = 4.0
        net[0].backward(net[0](np.arange(3, dtype="f4")[:, None]))
        assert names(net) == before
        net[0](np.ones((3, 1), "f4"))  # a record waits
        net.eval().train().forget().zero_grad()
    assert not walks


CHANGES = {
    "attribute": (lambda net: setattr(net[1], "more", Parameter(np.ones(7))), ["1.more"], []),
    "attribute of another type": (
        lambda net: setattr(net[1], "scale", Parameter(np.ones(7))), ["1.scale"], []
    ),
    "item of a tuple": (
        lambda net: setattr(net[1], "pair", (Parameter(np.ones(7)), net[1].pair[1])), ["1.pair.0"], []
    ),
    "item of a tuple of numbers": (
        lambda net: setattr(net[1], "numbers", (2.0, Parameter(np.ones(7)))), ["1.numbers.1"], []
    ),
    "attributes of the module": (
        lambda net: vars(net[1]).update(more=BatchNorm1d(7)), ["1.more.weight", "1.more.bias"], []
    ),
    "attribute of the root": (lambda net: setattr(net, "layers", net.layers[:1]), [], ["1.", "2."]),
    "deletion": (lambda net: delattr(net[1], "norm"), [], ["1.norm"]),
    "parameter to None": (lambda net: setattr(net[1].norm, "bias", None), [], ["1.norm.bias"]),
    "another name": (
        lambda net: setattr(net[1], "other", vars(net[1]).pop("norm")),
        ["1.other.weight", "1.other.bias"], ["1.norm"],
    ),
    "append": (lambda net: net.layers.append(BatchNorm1d(7)), ["3.weight", "3.bias"], []),
    "item of a list": (lambda net: net.layers.__setitem__(2, Parameter(np.ones(7))), ["2"], ["2."]),
    "removal": (lambda net: net.layers.pop(), [], ["2."]),
    "item of a list in a tuple": (lambda net: net[1].pair[1].clear(), [], ["1.pair.1.0"]),
    "item of a list of numbers": (
        lambda net: net[1].table["numbers"].__setitem__(0, Parameter(np.ones(7))), ["1.table.numbers.0"], []
    ),
    "empty list in a dict in a tuple": (
        lambda net: net[1].deep[1]["a"].append(Parameter(np.ones(7))), ["1.deep.1.a.0"], []
    ),
    "key of a dict": (
        lambda net: net[1].table.update(last=net[1].table.pop("first")),
        ["1.table.last.weight", "1.table.last.bias"], ["1.table.first"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(net, name):
    change, new, gone = CHANGES[name]
    before = names(net)
    change(net)
    kept = [name for name in before if not any(name.startswith(prefix) for prefix in gone)]
    assert set(names(net)) == {*kept, *new}
    for parameter in net.parameters():
        parameter.grad = np.ones(7)
    net.zero_grad()
    assert all(parameter.grad is None for _, parameter in net.named_parameters())


def test_order_of_names(net):
    """A change is seen in its place, not at the end."""
    net.layers.insert(0, BatchNorm1d(7))
    assert names(net)[:4] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_conversion_is_noticed(net, walks):
    net = convert_sync_batchnorm(net)
    assert {type(module).__name__ for module in net[1].pair[1]} == {"SyncBatchNorm"}
    assert [type(module) for _, module in net.named_modules()].count(SyncBatchNorm) == 5


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_have_trees_of_their_own(make):
    net = Block()
    before = names(net)
    other = make(net)
    assert names(other) == before
    del other.norm
    assert names(net) == before
    assert len(names(other)) == len(before) - 2


def test_a_module_that_copies_all_its_attributes():
    class Own(Module):
        def __init__(self):
            self.norm = BatchNorm1d(3)

        def __getstate__(self):
            return dict(vars(self))

    net = Own()
    names(net)
    other = copy.deepcopy(net)
    del other.norm
    assert (len(names(net)), len(names(other))) == (2, 0)


def test_a_module_that_refuses_attributes():
    class Frozen(Module):
        def __init__(self):
            vars(self)["norm"] = BatchNorm1d(3)

        def __setattr__(self, name, value):
            raise AttributeError(name)

    net = Frozen()
    net.zero_grad()
    assert len(names(net)) == 2


def test_a_tree_keeps_nothing_alive():
    """Neither the module, nor the arrays that its attributes or lists had when the tree was made."""
    gc.collect()
    gc.disable()
    try:
        net, array = Block(), np.ones(1000)
        net.saved, net.table["x"], net.pair[1][0].seen = array, array, [(array,)]
        net.norm(np.ones((3, 2), "f4"))
        x = np.full((3, 3), array[0], "f4")
        net.table["first"](x)  # a record that waits for its backward
        reference, net_reference, x_reference = weakref.ref(array), weakref.ref(net), weakref.ref(x)
        net.zero_grad()
        net.table["first"](np.ones((3, 3), "f4"))
        del net.saved, net.table["x"], net.pair[1][0].seen, array, x
        assert x_reference() is None
        assert reference() is None
        net.zero_grad()
        del net
        assert net_reference() is None
    finally:
        gc.enable()


def test_pickles_name_no_file_of_the_package(world):
    """So that they can be loaded when a class has moved to another file."""
    bn = SyncBatchNorm(3)
    bn.backward(bn(np.full((4, 3), world.rank, "f4")))
    ranks = world.comm.Split(world.rank % 2)
    grouped = SyncBatchNorm(3, process_group=MPIProcessGroup(ranks))
    model = DistributedDataParallel(Sequential(bn, BatchNorm1d(3)))
    model.zero_grad()
    for thing in bn, grouped, model, bn.weight, MPIProcessGroup(world.comm), MPIProcessGroup(ranks):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            data = pickle.dumps(thing, protocol)
            assert b"cupy_syncbn" in data
            assert b"cupy_syncbn." not in data
        pickle.loads(data)
