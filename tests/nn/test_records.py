"""Forwards that wait for their backward: between others, several at a time, in any order, or not at all."""

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
    Parameter,
    RankMismatchError,
    Record,
    Sequential,
    SingleProcessGroup,
    SyncBatchNorm,
    no_backward,
)
from support.arrays import on_host, random_array, random_batch
from support.compare import assert_close, assert_identical, assert_unchanged, snapshot
from support.reference import BatchNorm

C = 3
SHAPE = (18, C)


def there(layer, array):
    """Return an array where a layer is."""
    if isinstance(layer.running_mean, np.ndarray):
        return array
    import cupy

    return cupy.asarray(array)


class Linear(Module):
    """Keeps its input as most programs do: in an attribute."""

    def __init__(self, weight):
        self.weight = Parameter(weight)

    def forward(self, x):
        self.x = x
        return x @ self.weight.data

    def backward(self, dy):
        self.weight.accumulate(self.x.T @ dy)
        return dy @ self.weight.data.T


def network(rng, group=None):
    """Return layers that wait for several things: records, inputs, a residual's branch."""
    weights = [rng.normal(size=(C, C)) for _ in "12"]
    return Sequential(
        Linear(weights[0]),
        SyncBatchNorm(C, dtype="float64", activation="relu", process_group=group),
        Linear(weights[1]),
        SyncBatchNorm(C, dtype="float64", process_group=group),
    )


def draw(rng, world, count, shape=SHAPE, split="uneven", dtype="float64"):
    """Return this rank's part of some batches, and of gradients for them."""
    part = world.part(shape[0], split)
    return [
        (random_batch(rng, shape, dtype)[part], random_array(rng, shape, dtype)[part]) for _ in range(count)
    ]


def alone(model, x, dy):
    """Return the gradients of a forward and a backward with nothing in between."""
    twin = (
        copy.deepcopy(model) if isinstance(x, np.ndarray) else model
    )  # the stand-in's arrays stay where they are
    twin.zero_grad()
    twin(x)
    return twin.backward(dy), [parameter.grad for parameter in twin.parameters()]


def test_evaluation_in_between(world, rng, device):
    layer = SyncBatchNorm(C, device=device, activation="relu")
    (x, dy), (validation, _) = draw(rng, world, 2, dtype="float32")
    reference = BatchNorm(C, activation="relu")
    whole = [world.comm.allgather(part) for part in (x, dy)]
    x_all, dy_all = (np.concatenate(parts) for parts in whole)
    reference(x_all)
    start = sum(map(len, whole[0][: world.rank]))
    layer(there(layer, x))
    layer.eval()
    for _ in range(2):
        layer(there(layer, validation))
    layer.train()
    dx = on_host(layer.backward(there(layer, dy)))
    assert_close(dx, reference.backward(dy_all), slice(start, start + len(x)))
    assert_close(world.sum(on_host(layer.weight.grad)), reference.weight_grad, tolerance=1e-6)


def test_backward_in_evaluation_mode_while_both_wait(world, rng):
    """It is an error that names the ways on, each of which is taken; nothing is lost by it."""
    layer = SyncBatchNorm(C, dtype="float64")
    (x, dy), (other, dother) = draw(rng, world, 2)

    def both_wait():
        layer.train()(x)
        layer.eval()(other)
        with pytest.raises(RuntimeError, match=r"(?s)module\.train\(\).*module\.take_record\(\)"):
            layer.backward(dother)

    expected = alone(layer.train(), x, dy)[0]
    both_wait()
    evaluated = alone(layer.eval(), other, dother)[0]
    assert_identical(layer.train().backward(dy), expected)
    assert_identical(layer.eval().backward(dother), evaluated)  # alone, it waits on

    both_wait()
    evaluated = alone(layer.eval(), other, dother)[0]
    record = layer.take_record()
    assert_identical(layer.backward(dy), expected)
    assert_identical(record.backward(dother), evaluated)


def test_evaluation_that_waits_alone(world, rng):
    layer = SyncBatchNorm(C, dtype="float64")
    (x, dy), (other, dother) = draw(rng, world, 2)
    layer.eval()(other)
    evaluated = alone(layer, other, dother)[0]
    assert_identical(layer.train().backward(dother), evaluated)  # in the other mode, as ever

    layer(x)
    layer.eval()(other)
    layer.train().backward(dy)
    with pytest.raises(RuntimeError, match="each forward allows one backward"):
        layer.backward(dother)  # which would be that of a validation

    layer.eval()(other)
    layer.train()(x)
    with pytest.raises(RuntimeError, match=r"module\.train"):
        layer.eval().backward(dother)
    layer.train().backward(dy)
    with pytest.raises(RuntimeError, match="each forward allows one"):
        layer.eval().backward(dother)


@pytest.mark.parametrize("between", ["training", "training, evaluation", "training, training"])
def test_replaced_forward(world, rng, device, between):
    """Each remedy that the error names works; the error itself loses nothing and leaves the ranks in step."""
    layer = SyncBatchNorm(C, device=device, name="stem", grad_reduction="sum")
    batches = draw(rng, world, 2, dtype="float32")
    (x, dy), (other, dother) = [[there(layer, array) for array in pair] for pair in batches]
    expected, last = (on_host(alone(layer, *each)[0]) for each in ((x, dy), (other, dother)))

    def replace():
        layer.train()(x)
        for mode in between.split(", "):
            layer.train(mode == "training")(other)
        layer.train()
        before = snapshot(layer)
        with pytest.raises(
            RuntimeError, match=r"(?s)stem.*no_backward\(module\).*forget\(\).*take_record\(\)"
        ):
            layer.backward(dy)
        assert_unchanged(layer, before)

    replace()
    with pytest.raises(RuntimeError, match="stem"):
        layer.backward(dy)  # until something is done
    layer.forget()
    layer(other)
    assert_identical(on_host(layer.backward(dother)), last)

    replace()
    if "evaluation" in between:
        layer.take_record()
    assert_identical(on_host(layer.take_record().backward(dother)), last)

    layer(x)
    with no_backward(layer):
        layer(other)
    assert_identical(on_host(layer.backward(dy)), expected)

    layer(x)
    record = layer.take_record()
    layer(other)
    assert_identical(on_host(layer.backward(dother)), last)
    assert_identical(on_host(record.backward(dy)), expected)


def test_shared_layer_within_a_forward(world, rng):
    """Used twice, in a network that does not know of records: an error. In one that does: right."""
    layer = SyncBatchNorm(C, dtype="float64")
    ((x, dy),) = draw(rng, world, 1)
    twice = Sequential(layer, layer)
    twice(x)
    with pytest.raises(RuntimeError, match="another forward in training mode"):
        twice.backward(dy)
    assert layer.weight.grad is None
    twice(x)
    with pytest.raises(RuntimeError, match="each forward allows one"):
        twice.take_record().backward(dy)

    class Twice(Module):
        def __init__(self):
            self.bn = layer

        def forward(self, x):
            self.records = []
            for _ in "12":
                x = self.bn(x)
                self.records.append(self.bn.take_record())
            return x

        def backward(self, dy):
            for record in reversed(self.records):
                dy = record.backward(dy)
            return dy

    layer.zero_grad()
    layer.forget()
    first, second = (copy.deepcopy(layer) for _ in "12")
    model = Twice()
    model(x)
    dx = model.backward(dy)
    second(first(x))
    assert_identical(dx, first.backward(second.backward(dy)))
    assert_close(layer.weight.grad, first.weight.grad + second.weight.grad)


@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "ddp"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_records_of_a_network(world, rng, order, wrapped):
    """Three views, whose backwards come in any order, add up to what one after the other gives."""
    model = network(rng)
    model = DistributedDataParallel(model) if wrapped else model
    views = draw(rng, world, 3)
    expected = [alone(model, *view) for view in views]
    records = []
    for x, _ in views:
        model(x)
        records.append(model.take_record())
    assert all(isinstance(record, Record) for record in records)
    for i in order:
        assert_identical(records[i].backward(views[i][1]), expected[i][0])
    for k, parameter in enumerate(model.parameters()):
        assert_close(parameter.grad, sum(gradients[k] for _, gradients in expected))
    with pytest.raises(RuntimeError, match="has had its backward"):
        records[0].backward(views[0][1])
    with pytest.raises(RuntimeError, match="no forward"):
        model.take_record()


def test_other_forwards_wait_on(world, rng):
    """A record's backward leaves the forward that waits in the module, and its attributes, as they are."""
    model = network(rng)
    (x, dy), (other, dother) = draw(rng, world, 2)
    expected, last = alone(model, x, dy)[0], alone(model, other, dother)[0]
    model(x)
    record = model.take_record()
    model(other)
    attributes = dict(vars(model[0]))
    assert_identical(record.backward(dy), expected)
    assert all(vars(model[0])[name] is value for name, value in attributes.items())
    assert_identical(model.backward(dother), last)


def test_backward_of_a_record_that_fails(world, rng):
    """It serves again, as the module's own backward would."""
    layer = SyncBatchNorm(C, dtype="float64")
    (x, dy), (other, dother) = draw(rng, world, 2)
    expected, last = alone(layer, x, dy)[0], alone(layer, other, dother)[0]
    layer(x)
    record = layer.take_record()
    layer(other)
    with pytest.raises((TypeError, ValueError)):
        record.backward(dy[:, :2])
    assert_identical(record.backward(dy), expected)
    assert_identical(layer.backward(dother), last)


@pytest.mark.mpi(min_size=2)
def test_ranks_that_take_records_in_another_order(world, rng):
    layer = SyncBatchNorm(C, dtype="float64")
    records = []
    for x, _ in draw(rng, world, 2):
        layer(x)
        records.append((layer.take_record(), x))
    record, x = records[world.rank == 0]
    with pytest.raises(RankMismatchError, match="backward"):
        record.backward(x)


def test_records_take_the_mode_of_their_forward(world, rng):
    layer = SyncBatchNorm(C, dtype="float64")
    (x, dy), (other, dother) = draw(rng, world, 2)
    layer(x)
    trained = layer.take_record()
    layer.eval()(other)
    evaluated = layer.take_record()
    expected = alone(layer.train(), x, dy)[0], alone(layer.eval(), other, dother)[0]
    assert_identical(trained.backward(dy), expected[0])
    assert_identical(evaluated.backward(dother), expected[1])


def test_forward_without_a_record(world, rng):
    ((x, dy),) = draw(rng, world, 1)
    layer = SyncBatchNorm(C, dtype="float64")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no forward"):
            layer.take_record()
        with no_backward(layer):
            layer(x)
    with pytest.raises(RuntimeError, match="no_backward"):
        layer.backward(dy)
    assert Linear(np.ones((C, C))).take_record() is not None  # without layers, nobody can tell


@pytest.mark.parametrize("taken", ["forget", "no_backward", "record"])
def test_keeps_no_batch_alive(world, rng, taken):
    layer = SyncBatchNorm(C)
    x = random_batch(rng, SHAPE)
    batch = weakref.ref(x)
    if taken == "no_backward":
        with no_backward(layer):
            layer(x)
            del x
            gc.collect()
            assert batch() is None  # within the context too
        return
    layer(x)
    del x
    gc.collect()
    assert batch() is not None
    if taken == "record":
        record = layer.take_record()
        assert batch() is not None
        record.backward(layer(batch()))
        layer.forget()
    else:
        assert layer.forget() is layer
    gc.collect()
    assert batch() is None


def test_no_backward_leaves_a_network_as_it_was(world, rng):
    """The inputs that other modules keep, too; running statistics follow the batches as ever."""
    model = network(rng)
    (x, dy), (other, _) = draw(rng, world, 2)
    twin = copy.deepcopy(model)
    expected = alone(model, x, dy)[0]
    model(x)
    with no_backward(model):
        model(other)
        with no_backward(model[1]):
            model(other)
        model.eval()(other)
        model.train()
    assert_identical(model.backward(dy), expected)
    for batch in x, other, other:
        twin(batch)
    for (name, buffer), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert_identical(buffer, expected), name


def test_no_backward_is_entered_again_and_ends_on_errors(world, rng):
    ((x, dy),) = draw(rng, world, 1)
    layer = SyncBatchNorm(C, dtype="float64")
    unrecorded = no_backward(layer)

    @unrecorded
    def validate():
        with unrecorded:
            layer(x)
        layer(x)
        raise LookupError

    for _ in range(2):
        with pytest.raises(LookupError):
            validate()
    layer(x)
    assert layer.backward(dy).shape == x.shape
    with pytest.raises(TypeError, match="Module"):
        no_backward([layer])


class Lazy(Module):
    """What a forward may make: a parameter, a module, a buffer, and what it leaves for the backward."""

    def __init__(self):
        self.weight = None
        self.calls = 0

    def forward(self, x):
        if self.weight is None:
            self.weight = Parameter(np.full(x.shape[1], 2.0))
            self.bn = BatchNorm1d(x.shape[1], dtype="float64")
            self.register_buffer("seen", np.zeros(()))
        self.seen += 1
        self.calls += 1
        self.shape, self.inputs = x.shape, [x, (x, self.calls)]
        return self.bn(x) * self.weight.data


def test_what_a_forward_makes_for_good_stays(rng):
    lazy = Lazy()
    x = random_batch(rng, SHAPE, "float64")
    with no_backward(lazy):
        lazy(x)
        assert lazy.calls == 1
    assert set(lazy.state_dict()) >= {"weight", "bn.weight", "seen"}
    assert lazy.seen == 1
    assert lazy.calls == 0
    assert not hasattr(lazy, "inputs")
    assert not hasattr(lazy, "shape")
    lazy(x)
    record = lazy.take_record()
    lazy.weight.data = np.full(C, 3.0)
    weight, lazy.bn = lazy.weight, BatchNorm1d(C, dtype="float64")
    seen = {}
    lazy.backward = None
    record._backward = lambda: seen.update(vars(lazy))
    lazy(2 * x)
    record.backward()
    assert seen["inputs"][0] is x
    assert seen["calls"] == 1
    assert seen["weight"] is weight
    assert seen["bn"] is lazy.bn
    assert lazy.calls == 2
    assert_identical(lazy.inputs[0], 2 * x)


class Normed(SyncBatchNorm):
    """A subclass that leaves something of its own."""

    def forward(self, x, *args, **kwargs):
        self.sign = np.sign(x)
        return super().forward(np.abs(x), *args, **kwargs)

    def backward(self, dy):
        return super().backward(dy) * self.sign


def test_subclass_that_leaves_something(world, rng):
    layer = Normed(C, dtype="float64")
    (x, dy), (other, dother) = draw(rng, world, 2)
    expected, last = alone(layer, x, dy)[0], alone(layer, other, dother)[0]
    layer(x)
    record = layer.take_record()
    layer(other)
    with no_backward(layer):
        layer(-other)
    assert_identical(layer.backward(dother), last)
    assert_identical(record.backward(dy), expected)


def test_all_attributes_of_a_layer_are_known():
    for layer in (
        SyncBatchNorm(C),
        BatchNorm1d(C, affine=False),
        SyncBatchNorm(C, process_group=SingleProcessGroup()),
    ):
        layer(np.ones((4, C), "f4"))
        layer.name = "stem"
        assert layer._left() == {}
        assert DistributedDataParallel(SyncBatchNorm(C), SingleProcessGroup())._left() == {}


def test_copies_and_pickles_have_no_record(world, rng):
    model = network(rng)
    ((x, dy),) = draw(rng, world, 1)
    model(x)
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        with pytest.raises(RuntimeError, match="forward"):
            twin.backward(dy)
    model.backward(dy)


def test_zero_grad_drops_nothing(world, rng):
    model = network(rng)
    ((x, dy),) = draw(rng, world, 1)
    expected = alone(model, x, dy)[0]
    model(x)
    model.zero_grad()
    assert_identical(model.backward(dy), expected)


def test_wrapping_forgets(world, rng):
    """A forward before it, as of a trial, had other weights."""
    model = network(rng)
    model.layers.append(BatchNorm1d(C, dtype="float64"))
    ((x, dy),) = draw(rng, world, 1, shape=(3 * world.size, C), split="even")  # of which each rank needs two
    model(x)
    parallel = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="forward"):
        parallel.backward(dy)
    parallel(x)
    parallel.backward(dy)
