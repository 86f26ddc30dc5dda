"""recalibrate and frozen_statistics."""

import copy
import pickle

import numpy as np
import pytest

from cupy_syncbn import (
    BatchNorm1d,
    DistributedDataParallel,
    Module,
    RankMismatchError,
    RemoteRankError,
    Sequential,
    SingleProcessGroup,
    SyncBatchNorm,
    convert_sync_batchnorm,
    frozen_statistics,
    no_backward,
    recalibrate,
    split_group,
)
from support.arrays import DTYPES, random_array, random_batch, randomize
from support.compare import assert_close, assert_identical, assert_unchanged, relative_error, snapshot
from support.reference import BatchNorm

C = 3


class Fails(Module):
    """Gives a rank an input of its own."""

    def __init__(self, change):
        self.change = change

    def forward(self, x):
        return self.change(x)


def test_module_that_fails_on_a_rank_where_others_do_not_hear_of_it(world):
    """A layer of a sub-group tells its own ranks only, and the module itself nobody."""
    world_layer, own_layer = SyncBatchNorm(C), SyncBatchNorm(C, process_group=SingleProcessGroup())
    cut = Fails(lambda x: x[:, :2] if world.rank == 0 else x)
    before = [snapshot(layer) for layer in (world_layer, own_layer)]
    expected = ValueError if world.rank == 0 else RemoteRankError
    with pytest.raises(expected, match="channels" if world.rank == 0 else "rank 0 failed"):
        recalibrate(Sequential(world_layer, cut, own_layer), [np.ones((4, C), "f4")] * 2)
    for layer, state in zip((world_layer, own_layer), before, strict=True):
        assert_unchanged(layer, state)
    world_layer(np.ones((4, C), "f4"))  # the group goes on


def test_layer_that_the_module_keeps_in_evaluation():
    layer = BatchNorm1d(C)
    before = snapshot(layer)
    recalibrate(Sequential(Fails(lambda x: layer.eval()(x)), layer), [np.ones((4, C), "f4")])
    assert_unchanged(layer, before)


def draw_steps(rng, world, dtype="float64", steps=3):
    """Return what all ranks have, [step][rank]: rank r ends r steps before the last, after one at least."""
    counts = [max(steps - rank, 1) for rank in range(world.size)]
    return [
        [
            random_batch(rng, (2 + rank + 2 * step if step < counts[rank] else 0, C, 5), dtype)
            for rank in range(world.size)
        ]
        for step in range(steps)
    ]


def own_batches(steps, rank):
    return [parts[rank] for parts in steps if len(parts[rank])]


def statistics(values):
    """Return mean and unbiased variance of a list of (N, C, L) batches."""
    whole = np.concatenate([np.moveaxis(v, 1, 0).reshape(C, -1) for v in values], axis=1)
    whole = whole.astype(np.longdouble)
    return whole.mean(axis=1), whole.var(axis=1, ddof=1)


def assert_statistics(layer, values, tolerance=None):
    for actual, expected in zip((layer.running_mean, layer.running_var), statistics(values), strict=True):
        expected = expected.astype(np.float64)
        assert_close(actual, expected, tolerance=tolerance)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_statistics_are_those_of_all_values(world, rng, dtypes):
    """Ranks have batches of several sizes, and not all as many."""
    dtype, parameter_dtype = DTYPES[dtypes]
    steps = draw_steps(rng, world, dtype)
    layers = [SyncBatchNorm(C, dtype=parameter_dtype, activation="relu") for _ in "12"]
    references = [BatchNorm(C, activation="relu") for _ in layers]
    for layer, reference in zip(layers, references, strict=True):
        randomize(layer, reference, rng)
        layer.running_mean[...] = 7
        layer.num_batches_tracked[...] = 5
    model = DistributedDataParallel(Sequential(*layers)).eval()
    assert recalibrate(model, iter(own_batches(steps, world.rank))) is None

    seen = [[], []]
    for parts in steps:
        x = np.concatenate(parts)
        for reference, values in zip(references, seen, strict=True):
            values.append(x)
            x = reference(x).astype(dtype)  # what the next layer is given
    # The second layer's values are results, rounded to their type.
    assert_statistics(layers[0], seen[0])
    tolerance = {"float64": 1e-12, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype.name]
    assert_statistics(layers[1], seen[1], tolerance)
    for layer in layers:
        assert layer.num_batches_tracked == 5
        assert not layer.training
        world.assert_same(layer.running_mean, layer.running_var)


@pytest.mark.parametrize(
    ("dtype", "offset", "tolerance"),
    [("float64", 1e8, 1e-10), ("float64", 0, 1e-12), ("float32", 1e5, 1e-6), ("float32", 0, 1e-6)],
)
def test_variance_far_from_zero(world, rng, dtype, offset, tolerance):
    """Also where the means of batches are a deviation apart."""
    batches = [
        random_array(rng, (50, C, 20), dtype, offset=offset + rng.normal(size=(1, C, 1))) for _ in range(8)
    ]
    layer = SyncBatchNorm(C, dtype=dtype)
    recalibrate(layer, [x[world.part(50, "uneven")] for x in batches])
    mean, var = statistics(batches)
    assert relative_error(layer.running_var, var) <= tolerance
    assert relative_error(layer.running_mean, mean) <= 10 * np.finfo(dtype).eps
    # The average of the batches' variances is another number.
    if not offset:
        average = np.mean([statistics([x])[1] for x in batches], axis=0)
        assert relative_error(average, var) > 0.1


def test_recalibrated_network_evaluates_as_one_batch(world, rng):
    """With one batch, evaluation differs from training by the unbiased variance alone."""
    x = random_batch(rng, (18, C, 5), "float64")
    part = world.part(18)
    layer = SyncBatchNorm(C, eps=0, dtype="float64")
    y = layer(x[part])
    recalibrate(layer, [(x[part],)])
    assert_close(layer.eval()(x[part]) * np.sqrt(90 / 89), y)


class Twice(Module):
    """One layer for two inputs, and arguments that are no arrays."""

    def __init__(self, layer):
        self.layer, self.dropout = layer, Module().eval()
        self.waiting = layer._waiting
        self.modes = []

    def forward(self, pair, scale, flag=None):
        self.modes.append((self.training, self.layer.training, self.dropout.training))
        assert flag is None
        self.layer(pair["left"] * scale)
        y = self.layer(pair["right"][0])
        assert self.layer._waiting is self.waiting  # no batch is kept that no backward needs
        return y


def test_all_uses_of_a_layer_count(world, rng):
    steps = draw_steps(rng, world)
    model = Twice(SyncBatchNorm(C, dtype="float64"))
    recalibrate(model, [({"left": x, "right": [x + 4]}, 2, None) for x in own_batches(steps, world.rank)])
    whole = [x for parts in steps for x in parts]
    assert_statistics(model.layer, [2 * x for x in whole] + [x + 4 for x in whole])
    assert set(model.modes) == {(True, True, False)}
    assert len(model.modes) == len(steps)  # with empty batches at the end


def test_local_layers_have_their_own_ranks_data(world, rng):
    steps = draw_steps(rng, world)
    model = Sequential(SyncBatchNorm(C, dtype="float64"), BatchNorm1d(C, dtype="float64"))
    reference, own = BatchNorm(C), []
    randomize(model[0], reference, rng)
    recalibrate(model, own_batches(steps, world.rank))
    for parts in steps:
        y = reference(np.concatenate(parts))
        start = sum(map(len, parts[: world.rank]))
        own.append(y[start : start + len(parts[world.rank])])
    assert_statistics(model[0], [x for parts in steps for x in parts])
    assert_statistics(model[1], own)
    alone = BatchNorm1d(C, dtype="float64")
    if world.rank == 0:  # nothing is exchanged
        recalibrate(alone, own)
        assert_close(alone.running_var, model[1].running_var)


def test_groups_have_their_own_data(world, rng):
    size = 2 if world.size % 2 == 0 else 1
    group = split_group(size)
    steps = draw_steps(rng, world)
    inner = SyncBatchNorm(C, dtype="float64", process_group=group)
    recalibrate(inner, own_batches(steps, world.rank))
    start = world.rank - group.rank
    assert_statistics(inner, [x for parts in steps for x in parts[start : start + size]])

    model = Sequential(
        SyncBatchNorm(C, dtype="float64", process_group=group), SyncBatchNorm(C, dtype="float64")
    )
    recalibrate(model, own_batches(steps, world.rank))
    assert_identical(model[0].running_var, inner.running_var)
    world.assert_same(model[1].running_mean, model[1].running_var)


def test_nothing_but_running_statistics_changes(world, rng):
    part = world.part(18, "uneven")
    x, dy, other = (random_batch(rng, (18, C, 5))[part] for _ in "123")
    layer = SyncBatchNorm(C, name="stem")
    twin = copy.deepcopy(layer)
    for each in layer, twin:
        each.backward(each(x))
        each(x)
    before = snapshot(layer)
    recalibrate(layer, [other, other])
    after = snapshot(layer)
    assert not np.array_equal(after["running_mean"], before["running_mean"])
    for name in before.keys() - {"running_mean", "running_var"}:
        assert_identical(after[name], before[name])
    assert layer.training
    # The backward of the forward before is still to come, and momentum goes on from the new statistics.
    assert_identical(layer.backward(dy), twin.backward(dy))
    twin.running_mean[...] = layer.running_mean
    twin(x)
    layer(x)
    assert_identical(layer.running_mean, twin.running_mean)
    assert layer.num_batches_tracked == 3


def test_layers_without_statistics_or_data(world, rng):
    x = random_batch(rng, (18, C))
    plain = SyncBatchNorm(C, track_running_stats=False)
    recalibrate(plain, [x])
    layer = SyncBatchNorm(C)
    before = snapshot(layer)
    recalibrate(layer, [x[:0], x[:0]])
    assert_unchanged(layer, before)
    recalibrate(layer, [np.full_like(x, np.nan)])
    assert np.isnan(layer.running_var).all()


@pytest.mark.mpi(min_size=2)
def test_a_single_value(world):
    """Its variance is the biased one, 0."""
    layer = SyncBatchNorm(C)
    recalibrate(layer, [np.full((int(world.rank == 0), C), 4, "f4")])
    np.testing.assert_array_equal(layer.running_mean, np.full(C, 4))
    np.testing.assert_array_equal(layer.running_var, np.zeros(C))


class LostError(Exception):
    pass


def failing(x, count):
    for _ in range(count):
        yield x
    raise LostError("disk")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_error_of_one_ranks_batches(world, rng, count):
    x = random_batch(rng, (6, C))
    layer = SyncBatchNorm(C).eval()
    twin = copy.deepcopy(layer)
    last = world.size - 1
    error, match = (LostError, "disk") if world.rank == last else (RemoteRankError, f"rank {last} failed")
    with pytest.raises(error, match=match):
        recalibrate(layer, failing(x, count) if world.rank == last else [x] * 5)
    assert_unchanged(layer, snapshot(twin))
    assert (layer.training, layer._frozen, layer._observe) == (False, 0, None)
    recalibrate(layer, [x])  # the ranks are in step


def test_rank_without_a_batch(world, rng):
    x = random_batch(rng, (6, C))
    layer = SyncBatchNorm(C)
    before = snapshot(layer)
    error, match = (ValueError, r"\[x\[:0\]\]") if world.rank == 0 else (RemoteRankError, "rank 0 failed")
    with pytest.raises(error, match=match):
        recalibrate(layer, [] if world.rank == 0 else [x])
    assert_unchanged(layer, before)
    recalibrate(layer, [x[:0] if world.rank == 0 and world.size > 1 else x])


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_read_only_statistics_of_a_rank(world, rng, name):
    """The first layer's are not set before the second's are found to be read-only."""
    model = Sequential(SyncBatchNorm(C), SyncBatchNorm(C))
    twin = copy.deepcopy(model)
    last = world.size - 1
    if world.rank == last:
        getattr(model[1], name).flags.writeable = False
    error, match = (
        (ValueError, f"as {name}") if world.rank == last else (RemoteRankError, f"rank {last} failed")
    )
    with pytest.raises(error, match=match):
        recalibrate(model, [random_batch(rng, (6, C))])
    assert_unchanged(model, snapshot(twin))
    getattr(model[1], name).flags.writeable = True
    recalibrate(model, [random_batch(rng, (6, C))])


def test_error_of_the_module(world, rng):
    """In a layer on one rank, in the module on all, in the arguments."""
    x = random_batch(rng, (6, C))
    layer = SyncBatchNorm(C)
    layer(x)
    before, waiting = snapshot(layer), layer._waiting
    wrong = world.rank == world.size - 1
    with pytest.raises(ValueError if wrong else RemoteRankError, match=r"channels|failed"):
        recalibrate(layer, [x, x[:, 1:] if wrong else x])
    model = Twice(layer)
    with pytest.raises(KeyError):
        recalibrate(model, [({"left": x, "right": [x]}, 2), ({"left": x}, 2)])
    with pytest.raises(TypeError, match="not iterable"):
        recalibrate(layer, 3)
    for function in frozen_statistics, lambda module: recalibrate(module, [x]):
        with pytest.raises(TypeError, match=r"Module of cupy_syncbn \(got list\)"):
            function([layer])
    assert_unchanged(layer, before)
    assert layer._waiting is waiting
    assert (layer.training, layer._frozen, layer._observe) == (True, 0, None)


@pytest.mark.mpi_skip
def test_errors_that_a_transport_defers(rng):
    """They are looked for before anything is changed."""

    class Deferring(SingleProcessGroup):
        def check_errors(self):
            raise RemoteRankError("rank 1 failed")

    layer = SyncBatchNorm(C, process_group=Deferring())
    before = snapshot(layer)
    with pytest.raises(RemoteRankError):
        recalibrate(layer, [random_batch(rng, (6, C))])
    assert_unchanged(layer, before)


@pytest.mark.mpi(min_size=2)
def test_ranks_in_other_calls(world, rng):
    x = random_batch(rng, (6, C))
    layer = SyncBatchNorm(C)
    layer(x)
    with pytest.raises(RankMismatchError, match=r"recalibrate|forward"):
        recalibrate(layer, [x]) if world.rank == 0 else layer(x)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_checkpointed_training_equals_plain(world, rng, dtype, momentum):
    """A forward whose activations are dropped, and computed again before the backward."""
    part = world.part(18, "empty")
    batches = [[random_batch(rng, (18, C, 5), dtype)[part] for _ in range(2)] for _ in range(3)]
    plain = Sequential(*(SyncBatchNorm(C, momentum=momentum, dtype=dtype, activation="relu") for _ in "12"))
    checkpointed = copy.deepcopy(plain)
    for x, dy in batches:
        with no_backward(checkpointed), no_backward(plain):
            y, expected = checkpointed(x), plain(x)
            assert_identical(y, expected)
            checkpointed(x + 1)  # another use in between, whose activations are dropped too
            plain(x + 1)
        plain(x)
        for old, new in zip(plain.buffers(), checkpointed.buffers(), strict=True):
            old[...] = new
        with frozen_statistics(checkpointed):
            assert_identical(checkpointed(x), y)
        assert_identical(checkpointed.backward(dy), plain.backward(dy))
        for each in plain.parameters(), checkpointed.parameters():
            for parameter in each:
                parameter.data -= 0.1 * world.sum(parameter.grad).astype(dtype)
        assert_unchanged(checkpointed, snapshot(plain))
    assert plain[0].num_batches_tracked == 6


def test_frozen_steps_equal_the_reference(world, rng):
    layer, reference = SyncBatchNorm(C, dtype="float64"), BatchNorm(C)
    part = world.part(18, "uneven")
    x, dy = (random_batch(rng, (18, C, 5), "float64") for _ in "12")
    with frozen_statistics(layer):
        assert_close(layer(x[part]), reference(x), part)
        assert_close(layer.backward(dy[part]), reference.backward(dy), part)
    assert_close(world.sum(layer.weight.grad), reference.weight_grad)
    assert layer.num_batches_tracked == 0
    np.testing.assert_array_equal(layer.running_mean, np.zeros(C))


def test_contexts_nest_and_end_on_errors(world, rng):
    x = random_batch(rng, (6, C))
    layer, after = SyncBatchNorm(C), SyncBatchNorm(C)
    model = Sequential(layer, after)

    def fail():
        with frozen_statistics(model):
            with frozen_statistics(layer), frozen_statistics(layer):
                model(x)
            model(x)
            raise LostError

    with pytest.raises(LostError):
        fail()
    assert layer.num_batches_tracked == after.num_batches_tracked == 0
    with frozen_statistics(layer):
        model(x)
    assert (layer.num_batches_tracked, after.num_batches_tracked) == (0, 1)
    model(x)
    assert (layer.num_batches_tracked, after.num_batches_tracked) == (1, 2)


def test_one_context_is_entered_again(world, rng):
    x = random_batch(rng, (6, C))
    layer = SyncBatchNorm(C)
    frozen = frozen_statistics(layer)
    for _ in range(2):
        with frozen:
            with frozen:
                layer(x)
            layer(x)
    assert layer.num_batches_tracked == 0
    layer(x)
    assert layer.num_batches_tracked == 1


def test_copies_and_conversions_are_not_frozen(rng):
    layer = BatchNorm1d(C)
    with frozen_statistics(layer):
        others = copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        others = *others, convert_sync_batchnorm(layer)
    for other in others:
        other(random_batch(rng, (6, C)))
        assert other.num_batches_tracked.item() > 0


def test_ranks_inside_and_outside_are_in_step(world, rng):
    part = world.part(18)
    x = random_batch(rng, (18, C, 5), "float64")
    layer, reference = SyncBatchNorm(C, dtype="float64"), BatchNorm(C)
    if world.rank == 0:
        with frozen_statistics(layer):
            y = layer(x[part])
    else:
        y = layer(x[part])
    assert_close(y, reference(x), part)
    dy = x * x  # of dy = x the gradient cancels
    assert_close(layer.backward(dy[part]), reference.backward(dy), part)
    assert layer.num_batches_tracked == (world.rank > 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_on_the_gpu(world, rng, cupy, dtype):
    steps = draw_steps(rng, world, dtype)
    layer = SyncBatchNorm(C, dtype=dtype, device="cuda")
    batches = [cupy.asarray(x) for x in own_batches(steps, world.rank)]
    with frozen_statistics(layer):
        y = layer(batches[0])
        layer.backward(y)
    assert int(layer.num_batches_tracked) == 0
    assert not layer.running_mean.get().any()
    recalibrate(layer.eval(), batches)
    mean, var = statistics([x for parts in steps for x in parts])
    assert_close(layer.running_mean.get(), mean.astype("f8"))
    assert_close(layer.running_var.get(), var.astype("f8"))
    assert isinstance(layer.running_var, cupy.ndarray)
    assert int(layer.num_batches_tracked) == 0
    offset = {"float32": 1e5, "float64": 1e8}[dtype]
    far = [random_array(rng, (20, C, 5), dtype, offset=offset + step) for step in range(3)]
    recalibrate(layer, [cupy.asarray(x[world.part(20)]) for x in far])
    tolerance = {"float32": 1e-6, "float64": 1e-10}[dtype]
    assert relative_error(layer.running_var.get(), statistics(far)[1]) <= tolerance
