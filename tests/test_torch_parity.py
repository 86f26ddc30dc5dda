"""The layers against torch: its results kept in golden/, and torch itself where it is installed."""

import numpy as np
import pytest

from cupy_syncbn import SingleProcessGroup, SyncBatchNorm, sync_batch_norm, sync_batch_norm_backward
from golden import make_golden
from golden.make_golden import CASES, LEARNING_RATE, STEPS, make_inputs
from support.arrays import random_array, random_batch
from support.compare import TORCH_TOLERANCE, assert_close
from support.reference import BatchNorm
from support.world import SPLITS

RESULTS = ("y", "dx", "weight_grad", "bias_grad", "running_mean", "running_var", "num_batches_tracked")


def load(name):
    with np.load(make_golden.DIRECTORY / f"{name}.npz") as file:
        return dict(file)


def train(layer, golden, world, split):
    """Yield what the layer makes of the golden inputs at each step, like make_golden.train_torch."""
    for key, parameter in layer.named_parameters():
        parameter.data[...] = golden[key]
    for step in range(STEPS + 1):
        layer.train(step < STEPS)
        x, dy = golden["x"][step], golden["dy"][step]
        # In evaluation there is nothing to share: each rank takes the whole batch.
        part = world.part(len(x), split) if layer.training else slice(None)
        total = world.sum if layer.training else np.asarray
        record = {"y": layer(x[part]), "dx": layer.backward(dy[part])}
        record |= {f"{key}_grad": total(parameter.grad) for key, parameter in layer.named_parameters()}
        yield part, record | dict(layer.named_buffers())
        for key, parameter in layer.named_parameters():
            parameter.data[...] -= (LEARNING_RATE * record[f"{key}_grad"]).astype(parameter.data.dtype)
        layer.zero_grad()


def assert_equals_torch(results, expected, dtype):
    """Compare the records of `train` with arrays stacked over the steps."""
    names = {name for name in RESULTS if name in expected}
    for step, (part, record) in enumerate(results):
        assert record.keys() == names
        for name in names:
            rows = part if name in ("y", "dx") else ...
            assert_close(record[name], expected[name][step], rows, tolerance=TORCH_TOLERANCE[np.dtype(dtype)])
    assert step == STEPS


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_golden(world, name, split):
    shape, dtype, arguments = CASES[name]
    golden = load(name)
    layer = SyncBatchNorm(shape[1], dtype=dtype, **arguments)
    expected = {key.removeprefix("torch_"): golden[key] for key in golden if key.startswith("torch_")}
    assert_equals_torch(train(layer, golden, world, split), expected, dtype)


@pytest.mark.parametrize("name", CASES)
def test_reference_against_golden(name):
    """What the other tests compare with is right as well."""
    shape, dtype, arguments = CASES[name]
    golden = load(name)
    reference = BatchNorm(shape[1], **arguments)
    if reference.weight is not None:
        reference.weight, reference.bias = golden["weight"].astype("f8"), golden["bias"].astype("f8")
    for step in range(STEPS + 1):
        reference.training = step < STEPS
        record = {"y": reference(golden["x"][step]), "dx": reference.backward(golden["dy"][step])}
        record |= {key: np.asarray(getattr(reference, key)) for key in RESULTS[2:]}
        for key in RESULTS:
            if f"torch_{key}" in golden:
                expected = golden[f"torch_{key}"][step]
                assert_close(record[key], expected, tolerance=TORCH_TOLERANCE[np.dtype(dtype)])
        if reference.weight is not None:
            reference.weight = reference.weight - LEARNING_RATE * reference.weight_grad
            reference.bias = reference.bias - LEARNING_RATE * reference.bias_grad


def test_golden_files_are_of_these_cases():
    assert {path.stem for path in make_golden.DIRECTORY.glob("*.npz")} == set(CASES)
    for name in CASES:
        golden = load(name)
        for key, array in make_inputs(name).items():
            assert_close(golden[key], array.astype("f8"), tolerance=1e-6)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="compares with torch, which is not installed")


@pytest.mark.parametrize("name", CASES)
def test_live(world, torch, name):
    shape, dtype, arguments = CASES[name]
    inputs = make_inputs(name)
    layer = SyncBatchNorm(shape[1], dtype=dtype, **arguments)
    expected = make_golden.train_torch(name, inputs)
    assert_equals_torch(train(layer, inputs, world, "empty"), expected, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", ("leaky_relu", 0.2)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_live_activation_and_residual(world, torch, rng, dtype, activation, residual, training):
    shape = (18, 4, 5, 3)
    x, dy = random_batch(rng, shape, dtype), random_array(rng, shape, dtype)
    r = random_array(rng, shape, dtype) if residual else None
    layer = SyncBatchNorm(4, activation=activation, dtype=dtype).train(training)
    part = world.part(18, "uneven") if training else slice(None)
    total = world.sum if training else np.asarray
    y = layer(x[part], residual=r[part] if residual else None)
    dx = layer.backward(dy[part])

    theirs = torch.nn.BatchNorm2d(4, dtype=getattr(torch, dtype)).train(training)
    leaves = [torch.from_numpy(a).requires_grad_() for a in ([x, r] if residual else [x])]
    result = theirs(leaves[0])
    if residual:
        result = result + leaves[1]
    if activation == "relu":
        result = torch.relu(result)
    elif activation:
        slope = activation[1] if isinstance(activation, tuple) else 0.01
        result = torch.nn.functional.leaky_relu(result, slope)
    result.backward(torch.from_numpy(dy))

    tolerance = TORCH_TOLERANCE[np.dtype(dtype)]
    assert_close(y, result.detach().numpy(), part, tolerance=tolerance)
    for actual, leaf in zip(dx if residual else [dx], leaves, strict=True):
        assert_close(actual, leaf.grad.numpy(), part, tolerance=tolerance)
    for name in "weight", "bias":
        expected = getattr(theirs, name).grad.numpy()
        assert_close(total(getattr(layer, name).grad), expected, tolerance=tolerance)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_live_tracking_switched_off_and_on(world, torch, rng, momentum):
    layer = SyncBatchNorm(4, momentum=momentum, dtype="float64")
    theirs = torch.nn.BatchNorm1d(4, momentum=momentum, dtype=torch.float64)
    part = world.part(18, "uneven")
    for training, tracking in [(1, 1), (1, 0), (0, 0), (0, 1), (1, 0), (1, 1)]:
        for each in layer, theirs:
            each.train(bool(training)).track_running_stats = bool(tracking)
        x = random_batch(rng, (18, 4), "float64")
        expected = theirs(torch.from_numpy(x)).detach().numpy()
        assert_close(layer(x[part]), expected, part, tolerance=1e-11)
        for name, buffer in theirs.named_buffers():
            assert_close(getattr(layer, name), buffer.numpy(), tolerance=1e-11)
    for tracking in False, True:
        for each in layer, theirs:
            each.track_running_stats = tracking
            each.reset_running_stats()
        for name, buffer in theirs.named_buffers():
            assert_close(getattr(layer, name), buffer.numpy(), tolerance=1e-11)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("values", [(np.nan, 1), (np.inf, 1), (-np.inf, 1), (np.inf, np.inf)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_live_nan_and_inf(torch, rng, values, activation, training):
    x, dy = random_array(rng, (6, 3, 4)), random_array(rng, (6, 3, 4))
    x[1, 1, 2], x[2, 1, 0] = values
    running = np.zeros(3, "f4"), np.ones(3, "f4")
    arguments = {"training": training, "activation": activation, "process_group": SingleProcessGroup()}
    y, saved = sync_batch_norm(x, None, None, *running, **arguments)
    dx = sync_batch_norm_backward(dy, saved).x

    theirs = torch.nn.BatchNorm1d(3, affine=False).train(training)
    leaf = torch.from_numpy(x).requires_grad_()
    result = theirs(leaf)
    if activation is not None:
        result = getattr(torch.nn.functional, activation)(result)
    result.backward(torch.from_numpy(dy))
    for actual, expected in (
        (y, result.detach()),
        (dx, leaf.grad),
        (running[0], theirs.running_mean),
        (running[1], theirs.running_var),
    ):
        np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("shape", [(4,), (1, 3), (1, 3, 1)], ids=str)
def test_live_messages(torch, shape):
    """The words of torch's SyncBatchNorm and BatchNorm, where it has some."""
    layer = SyncBatchNorm(3, process_group=SingleProcessGroup())
    torch_layer = torch.nn.SyncBatchNorm(3) if len(shape) == 1 else torch.nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="xpected") as ours:
        layer(np.ones(shape, "f4"))
    with pytest.raises(ValueError, match="xpected") as theirs:
        torch_layer(torch.ones(shape))
    assert str(ours.value).split("got")[0] == str(theirs.value).split("got")[0]
