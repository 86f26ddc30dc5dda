"""The layers: training over several steps, modes, parameters, gradients."""

import copy
import pickle

import numpy as np
import pytest
from mpi4py import MPI

from cupy_syncbn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Module,
    Parameter,
    RemoteRankError,
    Sequential,
    SingleProcessGroup,
    SyncBatchNorm,
    no_backward,
    split_group,
)
from cupy_syncbn.comm.groups import as_group
from support.arrays import DTYPES, SHAPES, random_array, random_batch, randomize
from support.compare import assert_close, assert_identical, assert_unchanged, snapshot
from support.reference import BatchNorm
from support.world import SPLITS

STEPS = 5
LEARNING_RATE = 0.1


def sgd_step(world, layer):
    """Update with the whole batch's gradients, as a data-parallel optimizer would."""
    for parameter in layer.parameters():
        parameter.data[...] -= (LEARNING_RATE * world.sum(parameter.grad)).astype(parameter.data.dtype)
    layer.zero_grad()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", ["float64", "float32", "float16-float32", "bfloat16-float32"])
def test_five_training_steps_equal_reference(world, rng, dtypes, shape, split):
    dtype, parameter_dtype = DTYPES[dtypes]
    shape = SHAPES[shape]
    part = world.part(shape[0], split)
    layer = SyncBatchNorm(shape[1], dtype=parameter_dtype, activation="leaky_relu")
    reference = BatchNorm(shape[1], activation="leaky_relu")
    randomize(layer, reference, rng)
    for step in range(STEPS):
        x, dy, residual = random_batch(rng, shape, dtype), *(random_array(rng, shape, dtype) for _ in "12")
        assert_close(layer(x[part], residual=residual[part]), reference(x, residual), part)
        for actual, expected in zip(layer.backward(dy[part]), reference.backward(dy), strict=True):
            assert_close(actual, expected, part)
        for name in "weight", "bias":
            total = world.sum(getattr(layer, name).grad).astype(parameter_dtype)
            assert_close(total, getattr(reference, f"{name}_grad"))
        assert_close(layer.running_mean, reference.running_mean)
        assert_close(layer.running_var, reference.running_var)
        assert layer.num_batches_tracked == step + 1
        world.assert_same(*layer.state_dict().values())
        sgd_step(world, layer)
        reference.weight = reference.weight - LEARNING_RATE * reference.weight_grad
        reference.bias = reference.bias - LEARNING_RATE * reference.bias_grad

    layer.eval()
    reference.training = False
    before = snapshot(layer)
    x, dy = random_batch(rng, shape, dtype), random_array(rng, shape, dtype)
    assert_close(layer(x), reference(x))
    assert_unchanged(layer, before)
    assert_close(layer.backward(dy), reference.backward(dy))
    assert_close(layer.weight.grad, reference.weight_grad)


def test_ranks_with_local_batch_norm_differ(world, rng):
    """The negative control: synchronization is what makes many ranks equal one."""
    shape = SHAPES["4d"]
    x = random_batch(rng, shape)
    x[shape[0] // 2 :] += 1
    part = world.part(shape[0])
    whole = BatchNorm2d(shape[1])
    expected = whole(x)[part]
    local, synchronized = BatchNorm2d(shape[1]), SyncBatchNorm(shape[1])
    assert_close(synchronized(x[part]), expected)
    assert_close(synchronized.running_var, whole.running_var)
    if world.size == 1:
        assert_identical(local(x[part]), expected)
    else:
        assert np.max(np.abs(local(x[part]) - expected)) > 0.1
        assert np.max(np.abs(local.running_var - whole.running_var)) > 0.001


@pytest.mark.parametrize("layer_class", [BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm])
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_two_to_five_dimensions(rng, layer_class, channels_last):
    accepted = {BatchNorm1d: [2, 3], BatchNorm2d: [4], BatchNorm3d: [5], SyncBatchNorm: [2, 3, 4, 5]}
    described = {BatchNorm1d: "2D or 3D", BatchNorm2d: "4D", BatchNorm3d: "5D", SyncBatchNorm: "at least 2D"}
    for shape in [(4,), *SHAPES.values()]:
        channels = shape[1] if len(shape) > 1 else 4
        layer = layer_class(channels, channels_last=channels_last)
        if channels_last and len(shape) > 2:
            shape = (shape[0], *shape[2:], channels)
        x, dy = random_array(rng, shape), random_array(rng, shape)
        if len(shape) in accepted[layer_class]:
            reference = BatchNorm(channels, channel_axis=-1 if channels_last else 1)
            assert_close(layer(x), reference(x))
            assert_close(layer.backward(dy), reference.backward(dy))
        else:
            message = rf"expected {described[layer_class]} input \(got {len(shape)}D input\)"
            with pytest.raises(ValueError, match=message):
                layer(x)


@pytest.mark.parametrize("layer_class", [BatchNorm1d, BatchNorm2d, BatchNorm3d])
def test_local_layers_never_communicate(world, rng, layer_class):
    """Only one rank calls the layer; an exchange would wait for the others."""
    if world.rank:
        return
    ndim = {BatchNorm1d: 3, BatchNorm2d: 4, BatchNorm3d: 5}[layer_class]
    layer = layer_class(3, activation="relu", dtype="float64", momentum=None)
    reference = BatchNorm(3, activation="relu", momentum=None)
    for _ in range(2):
        x, dy = (random_array(rng, (6, 3, 2, 3, 4)[:ndim], "float64") for _ in range(2))
        assert_close(layer(x), reference(x))
        assert_close(layer.backward(dy), reference.backward(dy))
    assert_close(layer.running_var, reference.running_var)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training"):
        layer(x[:1, :, *[slice(1)] * (ndim - 2)])


@pytest.mark.parametrize("track_running_stats", [True, False])
def test_eval_does_not_communicate(world, rng, track_running_stats):
    layer = SyncBatchNorm(5, track_running_stats=track_running_stats).eval()
    if world.rank == 0:
        x, dy = random_batch(rng, SHAPES["2d"]), random_array(rng, SHAPES["2d"])
        reference = BatchNorm(5, track_running_stats=track_running_stats)
        reference.training = False
        assert_close(layer(x), reference(x))
        assert_close(layer.backward(dy), reference.backward(dy))


def test_initial_values():
    layer = SyncBatchNorm(3)
    assert_identical(layer.weight.data, np.ones(3, "f4"))
    assert_identical(layer.bias.data, np.zeros(3, "f4"))
    assert_identical(layer.running_mean, np.zeros(3, "f4"))
    assert_identical(layer.running_var, np.ones(3, "f4"))
    assert_identical(layer.num_batches_tracked, np.array(0))
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert layer.training


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track_running_stats", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_parameters_and_buffers(rng, affine, track_running_stats, dtypes):
    dtype, parameter_dtype = DTYPES[dtypes]
    layer = SyncBatchNorm(5, affine=affine, track_running_stats=track_running_stats, dtype=parameter_dtype)
    parameters = {"weight": layer.weight, "bias": layer.bias} if affine else {}
    names = ["running_mean", "running_var", "num_batches_tracked"] if track_running_stats else []
    assert dict(layer.named_parameters()) == parameters
    assert list(layer.parameters()) == list(parameters.values())
    assert all(isinstance(parameter, Parameter) for parameter in parameters.values())
    assert [name for name, _ in layer.named_buffers()] == names
    assert all(buffer is getattr(layer, name) for name, buffer in layer.named_buffers())
    assert len(list(layer.buffers())) == len(names)
    if not affine:
        assert layer.weight is None
        assert layer.bias is None
    if not track_running_stats:
        assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None

    y = layer(random_array(rng, SHAPES["2d"], dtype))
    dx = layer.backward(y)
    assert y.dtype == dx.dtype == dtype
    for parameter in parameters.values():
        assert parameter.grad.dtype == parameter.data.dtype == parameter_dtype
        assert parameter.grad.shape == parameter.data.shape == (5,)


def test_gradients_accumulate(world, rng):
    shape = SHAPES["3d"]
    part = world.part(shape[0], "empty")
    layer, reference = SyncBatchNorm(shape[1]), BatchNorm(shape[1])
    randomize(layer, reference, rng)
    weight_grad = bias_grad = 0
    for _ in range(3):
        x, dy = random_batch(rng, shape), random_array(rng, shape)
        layer(x[part])
        layer.backward(dy[part])
        reference(x)
        reference.backward(dy)
        weight_grad, bias_grad = weight_grad + reference.weight_grad, bias_grad + reference.bias_grad
    assert_close(world.sum(layer.weight.grad), weight_grad, tolerance=1e-6)
    assert_close(world.sum(layer.bias.grad), bias_grad, tolerance=1e-6)

    layer.zero_grad()
    layer(x[part])
    layer.backward(dy[part])
    assert_close(world.sum(layer.weight.grad), reference.weight_grad, tolerance=1e-6)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    ("grad", "error", "got"),
    [
        ([0.0] * 5, TypeError, "list"),
        (np.float32(0), TypeError, "numpy.float32"),
        (np.zeros(4, "f4"), ValueError, r"\(4,\)"),
        (np.zeros((5, 1), "f4"), ValueError, r"\(5, 1\)"),
        (np.zeros(5, "i4"), TypeError, "int32"),
    ],
    ids=str,
)
def test_gradient_that_cannot_be_added_to(world, rng, name, grad, error, got):
    """The rank that has it changes nothing, and the others hear of it."""
    part = world.part(18, "uneven")
    x, dy = random_batch(rng, SHAPES["2d"])[part], random_array(rng, SHAPES["2d"])[part]
    layer = SyncBatchNorm(5, activation="relu")
    twin = copy.deepcopy(layer)
    for each in layer, twin:
        each.backward(each(x))
        each(x)
    last = world.size - 1
    kept = getattr(layer, name).grad
    if world.rank == last:
        getattr(layer, name).grad = grad
        expected = pytest.raises(error, match=rf"{name}\.grad .*\(got .*{got}\)")
    else:
        expected = pytest.raises(RemoteRankError, match=f"rank {last} failed")
    with expected:
        layer.backward(dy)
    getattr(layer, name).grad = kept
    assert_unchanged(layer, snapshot(twin))
    assert_identical(layer.backward(dy), twin.backward(dy))
    assert_unchanged(layer, snapshot(twin))


def test_gradients_that_are_read_only_or_of_another_type(rng):
    parameter = Parameter(np.ones(5, "f4"))
    for grad in np.broadcast_to(np.float32(1), 5), np.ones(5, "f8"), np.ones(5, "f2"):
        parameter.grad = grad
        parameter.accumulate(np.full(5, 2, "f4"))
        assert_identical(parameter.grad, np.full(5, 3, grad.dtype))
        assert (parameter.grad is grad) == grad.flags.writeable


@pytest.mark.filterwarnings("error")
def test_gradients_that_overflow(rng):
    parameter = Parameter(np.ones(2, "f2"))
    with np.errstate(all="raise"):
        for _ in range(2):
            parameter.accumulate(np.array([6e4, np.inf], "f2"))
            parameter.accumulate(np.array([6e4, -np.inf], "f2"))
    np.testing.assert_array_equal(parameter.grad, [np.inf, np.nan])


@pytest.mark.parametrize("grad_reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_grad_reduction(world, rng, grad_reduction, channels_last):
    shape = (12, 4, 4)
    part = world.part(12, "uneven")
    layer = SyncBatchNorm(4, channels_last=channels_last, grad_reduction=grad_reduction, activation="relu")
    reference = BatchNorm(4, channel_axis=-1 if channels_last else 1, activation="relu")
    randomize(layer, reference, rng)
    x, dy = random_batch(rng, shape), random_array(rng, shape)
    for repetitions in 1, 2:
        reference(x)
        reference.backward(dy)
        layer(x[part])
        layer.backward(dy[part])
        for name in "weight", "bias":
            grad, expected = getattr(layer, name).grad, repetitions * getattr(reference, f"{name}_grad")
            if grad_reduction == "none":
                assert_close(world.sum(grad), expected, tolerance=1e-6)
            else:
                assert_close(grad, expected / (world.size if grad_reduction == "mean" else 1))
                world.assert_same(grad)


@pytest.mark.parametrize("grad_reduction", ["none", "sum", "mean"])
def test_grad_reduction_in_eval(world, rng, grad_reduction):
    """Without an exchange of the backward's to share, the gradients still are what the option says."""
    layer, reference = SyncBatchNorm(4, grad_reduction=grad_reduction).eval(), BatchNorm(4)
    reference.training = False
    x, dy = random_batch(rng, (12, 4)), random_array(rng, (12, 4))
    part = world.part(12, "uneven")
    assert_close(layer(x[part]), reference(x), part)
    assert_close(layer.backward(dy[part]), reference.backward(dy), part)
    total = world.sum(layer.weight.grad) if grad_reduction == "none" else layer.weight.grad
    share = world.size if grad_reduction == "mean" else 1
    assert_close(total, reference.weight_grad / share, tolerance=1e-6)


def test_weight_changed_between_forward_and_backward(world, rng):
    shape = SHAPES["4d"]
    x, dy = (random_array(rng, shape)[world.part(shape[0], "empty")] for _ in range(2))
    layer = SyncBatchNorm(shape[1], activation="relu")
    randomize(layer, BatchNorm(shape[1]), rng)
    twin = copy.deepcopy(layer)
    assert_identical(layer(x), twin(x))
    layer.weight.data[...] *= -2
    layer.bias.data[...] += 1
    assert_identical(layer.backward(dy), twin.backward(dy))
    assert_identical(layer.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("group", ["none", "comm", "split"])
def test_deepcopy_is_independent(world, rng, group):
    process_group = {"none": lambda: None, "comm": world.comm.Dup, "split": lambda: split_group(world.size)}
    layer = SyncBatchNorm(5, process_group=process_group[group]())
    x = random_batch(rng, SHAPES["2d"])[world.part(18, "empty")]
    layer(x)
    layer.backward(x)
    twin = copy.deepcopy(layer)
    before = snapshot(layer)
    for name, array in snapshot(twin).items():
        assert_identical(array, before[name])
    y = twin(x)
    twin.backward(x)
    twin.weight.data[...] = 3
    assert_unchanged(layer, before)
    assert_identical(layer(x), y)


def test_out_and_call(world, rng):
    x, residual = (random_array(rng, SHAPES["2d"])[world.part(18)] for _ in range(2))
    layer = SyncBatchNorm(5)
    with no_backward(layer):
        expected = layer.forward(x, residual)
    out = np.empty_like(x)
    assert layer(x, residual=residual, out=out) is out
    assert_identical(out, expected)
    dx, dresidual = layer.backward(x)
    assert_identical(dresidual, x)
    assert dx.shape == x.shape


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_backward_needs_its_forward(world, rng, training):
    layer = SyncBatchNorm(5).train(training)
    x = random_array(rng, SHAPES["2d"])[world.part(18)]
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(x)
    layer(x)
    layer.backward(x)
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(x)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_2d_input_either_way(world, rng, channels_last):
    x, dy = random_batch(rng, SHAPES["2d"]), random_array(rng, SHAPES["2d"])
    part = world.part(18, "uneven")
    layer, reference = SyncBatchNorm(5, channels_last=channels_last), BatchNorm(5)
    assert_close(layer(x[part]), reference(x), part)
    assert_close(layer.backward(dy[part]), reference.backward(dy), part)


def test_train_and_eval_reach_submodules():
    inner = SyncBatchNorm(3)
    model = Sequential(Sequential(inner), BatchNorm1d(3))
    assert model.eval() is model
    assert not inner.training
    assert not model.training
    assert model.train() is model
    assert inner.training
    model.train(False)
    assert not inner.training


def test_reset(rng):
    layer = SyncBatchNorm(5, process_group=SingleProcessGroup())
    initial = {name: array.copy() for name, array in layer.state_dict().items()}
    running_var = layer.running_var
    layer(random_batch(rng, SHAPES["2d"]))
    layer.weight.data[...] = 3
    layer.bias.data[...] = 4
    layer.reset_running_stats()
    assert layer.running_var is running_var
    for name in "running_mean", "running_var", "num_batches_tracked":
        assert_identical(getattr(layer, name), initial[name])
    assert layer.weight.data[0] == 3
    layer.reset_parameters()
    for name, array in layer.state_dict().items():
        assert_identical(array, initial[name])


def test_reset_parameters_to_uniform(world):
    layer = SyncBatchNorm(1000, dtype="float64")
    layer.reset_parameters(weight="uniform")
    assert 0 <= layer.weight.data.min() < 0.05
    assert 0.95 < layer.weight.data.max() < 1
    assert not layer.bias.data.any()
    world.assert_same(layer.weight.data)
    with pytest.raises(ValueError, match="normal"):
        layer.reset_parameters(weight="normal")


def test_sequential_runs_in_order_and_back(world, rng):
    x, dy = random_batch(rng, SHAPES["2d"]), random_array(rng, SHAPES["2d"])
    part = world.part(18, "empty")
    model = Sequential(SyncBatchNorm(5, activation="relu"), SyncBatchNorm(5))
    first, second = BatchNorm(5, activation="relu"), BatchNorm(5)
    randomize(model[0], first, rng)
    randomize(model[1], second, rng)
    assert_close(model(x[part]), second(first(x)), part)
    assert_close(model.backward(dy[part]), first.backward(second.backward(dy)), part, tolerance=2e-6)
    assert_close(world.sum(model[0].weight.grad), first.weight_grad, tolerance=2e-6)


class Tree(Module):
    def __init__(self):
        super().__init__()
        self.scale = Parameter(np.ones(2, "f4"))
        self.first = BatchNorm1d(1)
        self.blocks = [Sequential(BatchNorm1d(2, affine=False)), BatchNorm1d(3, track_running_stats=False)]
        self.pair = (BatchNorm2d(4, affine=False, track_running_stats=False), SyncBatchNorm(5))
        self.heads = {"left": BatchNorm3d(6, track_running_stats=False), "right": SyncBatchNorm(7)}
        self.threshold = 0.5


def test_dotted_names():
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    model = Tree()
    assert {name for name, _ in model.named_parameters()} == {
        "scale",
        *("first.weight", "first.bias", "blocks.1.weight", "blocks.1.bias", "pair.1.weight", "pair.1.bias"),
        *("heads.left.weight", "heads.left.bias", "heads.right.weight", "heads.right.bias"),
    }
    assert {name for name, _ in model.named_buffers()} == {
        f"{prefix}.{name}" for prefix in ("first", "blocks.0.0", "pair.1", "heads.right") for name in buffers
    }
    assert dict(model.named_parameters())["heads.left.weight"] is model.heads["left"].weight
    assert len(list(model.parameters())) == 11
    assert len(list(model.buffers())) == 12


def test_registered_buffers():
    model = Module()
    model.register_buffer("step", np.array(3))
    model.register_buffer("nothing", None)
    model.register_buffer("step", step := np.array(4))
    model.child = BatchNorm1d(2, affine=False, track_running_stats=False)
    assert dict(model.named_buffers()) == {"step": step} == model.state_dict()
    model.load_state_dict({"step": 5})
    assert model.step == step == 5


def test_shared_layer_counts_once():
    layer = BatchNorm1d(3)
    model = Sequential(layer, layer)
    assert list(model.parameters()) == [layer.weight, layer.bias]


def test_thousand_layers_share_one_duplicate(world, rng):
    """MPI has a limited number of communicators, which a duplicate for each layer would exhaust."""

    class CountingComm(MPI.Intracomm):
        duplicates = 0

        def Dup(self, *info):  # noqa: N802
            CountingComm.duplicates += 1
            return super().Dup(*info)

        def Idup(self, *info):  # noqa: N802, and info is new in mpi4py 4
            CountingComm.duplicates += 1
            return super().Idup(*info)

        Clone = Dup

    comm = CountingComm(world.comm.Dup())
    layers = [SyncBatchNorm(2, process_group=comm) for _ in range(1000)]
    x = random_array(rng, (world.size + 1, 2))[world.part(world.size + 1)]
    for layer in layers:
        y = layer(x)
    layer.backward(x)
    assert_close(y, SyncBatchNorm(2)(x))
    assert CountingComm.duplicates == (1 if world.size > 1 else 0)


@pytest.mark.parametrize("group", ["none", "comm", "split"])
def test_group_that_is_assigned_later(world, rng, group):
    """Ranks may have called the layer by themselves before, each as often as it liked."""
    x, part = random_batch(rng, SHAPES["2d"]), world.part(18, "uneven")
    layer = SyncBatchNorm(5, process_group=SingleProcessGroup(), momentum=1.0)
    for _ in range(1 + world.rank):
        layer.backward(layer(x))
    group = {"none": None, "comm": world.comm, "split": split_group(world.size)}[group]
    layer.process_group = group
    assert layer.process_group is (None if group is None else as_group(group))
    for wrong in "world", 3, [0, 1]:
        with pytest.raises(TypeError, match="process_group"):
            layer.process_group = wrong
    reference = BatchNorm(5)
    for each in layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        each.zero_grad()
        assert_close(each(x[part]), reference(x), part)
        assert_close(each.backward(x[part] ** 2), reference.backward(x**2), part, tolerance=2e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features"),
        ({"num_features": -3}, ValueError, "num_features"),
        ({"activation": "gelu"}, ValueError, "gelu"),
        ({"grad_reduction": "max"}, ValueError, "max"),
        ({"dtype": "int32"}, TypeError, "int32"),
        ({"dtype": "complex64"}, TypeError, "complex64"),
        ({"device": "tpu"}, ValueError, "tpu"),
        ({"process_group": "world"}, TypeError, "process_group"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        SyncBatchNorm(**({"num_features": 4} | arguments))
