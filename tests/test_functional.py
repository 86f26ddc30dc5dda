"""sync_batch_norm and sync_batch_norm_backward against the reference on the concatenated batch.

Tables of several factors hold each pair of their values; test_fuzz.py draws from the product of all factors.
"""

import numpy as np
import pytest

from cupy_syncbn import ProcessGroup, RankMismatchError, sync_batch_norm, sync_batch_norm_backward
from support.arrays import DTYPES, SHAPES, random_array, random_batch, random_channels
from support.cases import pairwise
from support.compare import TOLERANCE, assert_close, assert_identical, relative_error
from support.reference import BatchNorm
from support.world import SPLITS

ACTIVATIONS = [None, "relu", "leaky_relu", ("leaky_relu", 0.25)]


def make_layer(rng, channels, parameter_dtype, **arguments):
    """Return a reference with random parameters, and the arrays that make a function call of it."""
    reference = BatchNorm(channels, **arguments)
    arrays = {
        "running_mean": np.zeros(channels, parameter_dtype),
        "running_var": np.ones(channels, parameter_dtype),
        "num_batches_tracked": np.array(0),
    }
    if reference.weight is not None:
        arrays["weight"], arrays["bias"] = random_channels(rng, channels, parameter_dtype)
        reference.weight, reference.bias = (
            arrays[name].astype(reference.dtype) for name in ("weight", "bias")
        )
    return reference, arrays


def assert_step(world, reference, arrays, x, dy, split="even", **arguments):
    """Run a training step on this rank's part of a batch and compare all its results."""
    part = world.part(len(x), split)
    y, saved = sync_batch_norm(x[part], **arrays, **arguments)
    assert y.dtype == x.dtype
    assert_close(y, reference(x), part)
    gradients = sync_batch_norm_backward(dy[part], saved)
    assert gradients.x.dtype == x.dtype
    assert_close(gradients.x, reference.backward(dy), part)
    assert gradients.residual is None
    if reference.weight is None:
        assert gradients.weight is None
        assert gradients.bias is None
    else:
        assert gradients.weight.dtype == gradients.bias.dtype == arrays["weight"].dtype
        if arrays["weight"].dtype.itemsize > 2:  # a sum of rounded sums is not the sum rounded
            for name in "weight", "bias":
                actual = world.sum(getattr(gradients, name)).astype(arrays[name].dtype)
                assert_close(actual, getattr(reference, f"{name}_grad"))
    assert arrays["num_batches_tracked"] == reference.num_batches_tracked
    for name in "running_mean", "running_var":
        assert_close(arrays[name], getattr(reference, name))
    world.assert_same(arrays["running_mean"], arrays["running_var"])


@pytest.mark.parametrize(("dtypes", "shape", "split"), pairwise(DTYPES, SHAPES, SPLITS))
def test_step_equals_reference(world, rng, dtypes, shape, split):
    dtype, parameter_dtype = DTYPES[dtypes]
    shape = SHAPES[shape]
    x, dy = random_batch(rng, shape, dtype), random_array(rng, shape, dtype)
    reference, arrays = make_layer(rng, shape[1], parameter_dtype)
    assert_step(world, reference, arrays, x, dy, split)


@pytest.mark.parametrize(
    ("dtypes", "shape", "split"), pairwise(["float64", "float32", "bfloat16-float32"], SHAPES, SPLITS)
)
def test_step_equals_reference_channels_last(world, rng, dtypes, shape, split):
    dtype, parameter_dtype = DTYPES[dtypes]
    n, channels, *spatial = SHAPES[shape]
    shape = (n, *spatial, channels)
    x, dy = random_batch(rng, shape, dtype, channel_axis=-1), random_array(rng, shape, dtype)
    reference, arrays = make_layer(rng, channels, parameter_dtype, channel_axis=-1)
    assert_step(world, reference, arrays, x, dy, split, channels_last=True)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_step_without_parameters(world, rng, dtypes):
    dtype, parameter_dtype = DTYPES[dtypes]
    shape = SHAPES["4d"]
    x, dy = random_batch(rng, shape, dtype), random_array(rng, shape, dtype)
    reference, arrays = make_layer(rng, shape[1], parameter_dtype, affine=False)
    assert_step(world, reference, arrays, x, dy, "empty")


@pytest.mark.parametrize(
    ("dtypes", "mode", "activation", "residual"),
    pairwise(DTYPES, ["training", "eval", "eval_batch_statistics"], ACTIVATIONS, [False, True]),
)
def test_activation_and_residual(world, rng, dtypes, mode, activation, residual):
    dtype, parameter_dtype = DTYPES[dtypes]
    shape = SHAPES["4d"]
    x, dy, r = random_batch(rng, shape, dtype), *(random_array(rng, shape, dtype) for _ in range(2))
    reference, arrays = make_layer(rng, shape[1], parameter_dtype, activation=activation)
    reference.training = mode == "training"
    # Ranks share the statistics in training alone; otherwise each may as well take the whole batch.
    part = world.part(len(x), "empty") if mode == "training" else slice(None)
    if mode == "eval_batch_statistics":
        reference.running_mean = reference.running_var = None
        del arrays["running_mean"], arrays["running_var"]
    elif mode == "eval":
        arrays["running_mean"][...] = rng.normal(size=shape[1])
        arrays["running_var"][...] = rng.uniform(0.5, 2, shape[1])
        reference.running_mean, reference.running_var = (
            arrays[name].astype(np.float64) for name in ("running_mean", "running_var")
        )
    before = {name: array.copy() for name, array in arrays.items()}

    y, saved = sync_batch_norm(
        x[part],
        **arrays,
        training=reference.training,
        activation=activation,
        residual=r[part] if residual else None,
    )
    assert_close(y, reference(x, r if residual else None), part)
    gradients = sync_batch_norm_backward(dy[part], saved)
    expected = reference.backward(dy)
    dx, dresidual = expected if residual else (expected, None)
    assert_close(gradients.x, dx, part)
    if residual:
        assert gradients.residual.dtype == dtype
        assert_close(gradients.residual, dresidual, part)
    else:
        assert gradients.residual is None
    for name in "weight", "bias":
        gradient = getattr(gradients, name)
        total = world.sum(gradient).astype(gradient.dtype) if mode == "training" else gradient
        if mode != "training" or parameter_dtype.itemsize > 2:
            assert_close(total, getattr(reference, f"{name}_grad"))
    if mode != "training":
        for name, array in before.items():
            assert_identical(arrays[name], array)


@pytest.mark.parametrize(
    ("dtypes", "statistics", "reduction", "split", "activation"),
    pairwise(DTYPES, ["batch", "running"], ["sum", "mean"], SPLITS, [None, "relu"]),
)
def test_reduction_in_eval_of_own_statistics(world, rng, dtypes, statistics, reduction, split, activation):
    """Each rank's gradients have the factors of its own statistics, before they are added up."""
    dtype, parameter_dtype = DTYPES[dtypes]
    shape = SHAPES["4d"]
    x, dy = random_batch(rng, shape, dtype), random_array(rng, shape, dtype)
    reference, arrays = make_layer(rng, shape[1], parameter_dtype, activation=activation)
    reference.training = False
    expected = {"weight": 0.0, "bias": 0.0}
    for rank in range(world.size):
        mean, var = rng.normal(size=shape[1]), rng.uniform(0.1, 1, shape[1]) * 10.0**rank
        share = world.part(len(x), split, rank)
        reference.running_mean = reference.running_var = None
        if statistics == "running":
            reference.running_mean, reference.running_var = (
                each.astype(parameter_dtype).astype(np.float64) for each in (mean, var)
            )
        reference(x[share])
        dx = reference.backward(dy[share])
        for name in expected:
            expected[name] = expected[name] + getattr(reference, f"{name}_grad")
        if rank == world.rank:
            own, part = dx, share
            arrays["running_mean"], arrays["running_var"] = (
                mean.astype(parameter_dtype),
                var.astype(parameter_dtype),
            )
    if statistics == "batch":
        del arrays["running_mean"], arrays["running_var"]
    _, saved = sync_batch_norm(x[part], **arrays, training=False, activation=activation)
    gradients = sync_batch_norm_backward(dy[part], saved, grad_reduction=reduction)
    assert_close(gradients.x, own)
    for name in expected:
        gradient, divisor = getattr(gradients, name), world.size if reduction == "mean" else 1
        assert gradient.dtype == parameter_dtype
        assert_close(gradient, expected[name] / divisor)
    world.assert_same(gradients.weight, gradients.bias)


def test_reduction_in_eval_with_one_parameter(world, rng):
    """The gradient of a weight or a bias alone takes its own place in the sum."""
    x = random_batch(rng, (6, 3)) * (world.rank + 1)
    weight, bias = random_channels(rng, 3)
    _, saved = sync_batch_norm(x, weight, bias, training=False)
    both = sync_batch_norm_backward(x, saved, grad_reduction="sum")
    for arrays in {"weight": weight}, {"bias": bias}, {}:
        _, saved = sync_batch_norm(x, **arrays, training=False)
        alone = sync_batch_norm_backward(x, saved, grad_reduction="sum")
        for name in "weight", "bias":
            if name in arrays:
                assert_identical(getattr(alone, name), getattr(both, name))
            else:
                assert getattr(alone, name) is None


def test_infinite_gradient_under_relu_mask(world, rng):
    shape = SHAPES["4d"]
    part = world.part(shape[0], "uneven")
    x, dy = random_array(rng, shape), random_array(rng, shape)
    masked = BatchNorm(shape[1], activation="relu")(x) == 0
    assert masked.any()
    gradients = []
    for at_mask in 0, np.inf, np.nan:
        _, saved = sync_batch_norm(x[part], np.ones(4, "f4"), np.zeros(4, "f4"), activation="relu")
        masked_dy = np.where(masked, np.float32(at_mask), dy)
        gradients.append(sync_batch_norm_backward(masked_dy[part], saved))
    for other in gradients[1:]:
        for name in "x", "weight", "bias":
            assert np.isfinite(getattr(other, name)).all()
            assert_identical(getattr(other, name), getattr(gradients[0], name))


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_running_statistics(world, rng, momentum):
    shape = SHAPES["3d"]
    reference, arrays = make_layer(rng, shape[1], "float64", momentum=momentum)
    for _ in range(4):
        x = random_batch(rng, shape, "float64")
        reference(x)
        sync_batch_norm(x[world.part(len(x), "empty")], **arrays, momentum=momentum)
        for name in "running_mean", "running_var", "num_batches_tracked":
            assert_close(arrays[name].astype(float), getattr(reference, name), tolerance=1e-13)
    assert arrays["num_batches_tracked"] == 4
    assert arrays["num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0), (0, 4, 0)], ids=str)
def test_all_ranks_empty(world, rng, dtypes, shape):
    dtype, parameter_dtype = DTYPES[dtypes]
    _, arrays = make_layer(rng, 4, parameter_dtype)
    arrays["running_mean"][...], arrays["running_var"][...] = 3, 5
    arrays["num_batches_tracked"][...] = 7
    before = {name: array.copy() for name, array in arrays.items()}
    for momentum in 0.1, None:
        y, saved = sync_batch_norm(np.empty(shape, dtype), **arrays, momentum=momentum)
        assert (y.shape, y.dtype) == (shape, dtype)
        gradients = sync_batch_norm_backward(np.empty(shape, dtype), saved)
        assert (gradients.x.shape, gradients.x.dtype) == (shape, dtype)
        for gradient in gradients.weight, gradients.bias:
            assert_identical(gradient, np.zeros(4, parameter_dtype))
    for name, array in before.items():
        assert_identical(arrays[name], array)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_one_value_a_channel_in_all(world, rng, dtypes):
    dtype, parameter_dtype = DTYPES[dtypes]
    _, arrays = make_layer(rng, 3, parameter_dtype)
    # The rank in the middle has the value.
    x = random_array(rng, (int(world.rank == world.size // 2), 3, 1), dtype, offset=2)
    if world.size == 1:
        with pytest.raises(ValueError, match=r"more than 1 value per channel when training.*1, 3, 1"):
            sync_batch_norm(x, **arrays)
        return
    y, saved = sync_batch_norm(x, **arrays, momentum=1.0)
    assert_identical(y, np.repeat(arrays["bias"].astype(dtype)[None, :, None], len(x), axis=0))
    gradients = sync_batch_norm_backward(np.ones_like(x), saved)
    np.testing.assert_array_equal(gradients.x, np.zeros_like(x))
    np.testing.assert_array_equal(gradients.weight, np.zeros(3, parameter_dtype))
    assert_identical(gradients.bias, np.full(3, len(x), parameter_dtype))
    np.testing.assert_array_less(arrays["running_var"].astype(float), 1e-15)
    mean = world.comm.bcast(x, world.size // 2)[0, :, 0]
    assert_identical(arrays["running_mean"], mean.astype(parameter_dtype))


def test_one_value_on_each_rank(world, rng):
    x = random_batch(rng, (world.size, 3), "float32")
    dy = random_array(rng, x.shape)
    if world.size == 1:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            sync_batch_norm(x)
        return
    reference, arrays = make_layer(rng, 3, "float32")
    y, saved = sync_batch_norm(x[world.rank][None], **arrays)
    assert_close(y[0], reference(x), world.rank)
    assert_close(arrays["running_var"], reference.running_var)
    # With two values in all, dx is what eps leaves of zero.
    dx = sync_batch_norm_backward(dy[world.rank][None], saved).x
    np.testing.assert_allclose(dx[0], reference.backward(dy)[world.rank], atol=1e-6)


@pytest.mark.parametrize(
    ("dtypes", "channels_last", "value"), pairwise(DTYPES, [False, True], [np.nan, np.inf, -np.inf])
)
def test_nan_and_inf_stay_in_their_channel(world, rng, dtypes, channels_last, value):
    dtype, parameter_dtype = DTYPES[dtypes]
    shape = (12, 5, 5)
    clean = random_batch(rng, shape, dtype)
    dirty = clean.copy()
    dirty[(11, 2, 1) if channels_last else (11, 1, 2)] = value
    dy = random_array(rng, shape, dtype)
    part = world.part(12, "uneven")
    results = []
    for x in clean, dirty:
        _, arrays = make_layer(np.random.default_rng(0), 5, parameter_dtype)
        y, saved = sync_batch_norm(x[part], **arrays, channels_last=channels_last)
        gradients = sync_batch_norm_backward(dy[part], saved)
        by_channel = [np.rollaxis(a, 2 if channels_last else 1) for a in (y, gradients.x)]
        results.append([*by_channel, gradients.weight, arrays["running_mean"], arrays["running_var"]])
    others = [0, 2, 3, 4]
    for expected, actual in zip(*results, strict=True):
        assert_identical(np.ascontiguousarray(actual[others]), np.ascontiguousarray(expected[others]))
    y, dx, weight_grad, running_mean, running_var = results[1]
    assert np.isnan(y[1].astype(float)).all()
    assert np.isnan(dx[1].astype(float)).all()
    if len(y[1]):
        assert np.isnan(weight_grad[1])
    # In one channel the value itself, in the variance inf - inf.
    np.testing.assert_equal(float(running_mean[1]), value)
    assert np.isnan(running_var[1])


@pytest.mark.parametrize(
    ("shape", "scale", "eps"), pairwise(["2d", "4d"], [1e30, 1e15, 1e-15, 1e-19], [0.0, 1e-5])
)
def test_squares_beyond_float32(world, rng, shape, scale, eps):
    """Squares over- or underflow in float32, the results do not (but running_var may)."""
    shape = SHAPES[shape]
    x = random_array(rng, shape, offset=0.5 * scale, scale=scale)
    dy = random_array(rng, shape)
    part = world.part(len(x), "empty")
    reference, arrays = make_layer(rng, shape[1], "float32", eps=eps)
    y, saved = sync_batch_norm(x[part], **arrays, eps=eps)
    assert_close(y, reference(x), part)
    gradients = sync_batch_norm_backward(dy[part], saved)
    assert_close(gradients.x, reference.backward(dy), part)
    for name in "weight", "bias":
        total = world.sum(getattr(gradients, name)).astype("f4")
        assert_close(total, getattr(reference, f"{name}_grad"))
    assert_close(arrays["running_mean"], reference.running_mean)
    if scale == 1e30:
        assert (arrays["running_var"] == np.inf).all()
    else:
        assert_close(arrays["running_var"], reference.running_var)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_constant_channel(world, rng, dtypes):
    """A variance of zero is no division by zero: y = bias but for what rounding leaves of x - mean."""
    dtype, parameter_dtype = DTYPES[dtypes]
    shape = SHAPES["3d"]
    x, dy = random_batch(rng, shape, dtype), random_array(rng, shape, dtype)
    x[:, 1] = 3.3
    part = world.part(len(x), "empty")
    reference, arrays = make_layer(rng, shape[1], parameter_dtype)
    y, saved = sync_batch_norm(x[part], **arrays, momentum=1.0)
    bias = np.broadcast_to(arrays["bias"][1].astype(np.float64), (len(x), shape[2]))
    assert_close(y[:, 1], bias, part, tolerance=1e-2 if dtype.itemsize == 2 else 1e-4)
    assert_close(y[:, [0, 2]], reference(x)[:, [0, 2]], part)
    dx = sync_batch_norm_backward(dy[part], saved).x
    assert_close(dx[:, [0, 2]], reference.backward(dy)[:, [0, 2]], part)
    assert np.isfinite(dx.astype(float)).all()
    assert 0 <= float(arrays["running_var"][1]) < 1e-12


def test_constant_channel_without_eps(world, rng):
    """0/0 is NaN, in its own channel."""
    shape = SHAPES["3d"]
    x, dy = random_batch(rng, shape), random_array(rng, shape)
    x[:, 1] = 3
    part = world.part(len(x), "uneven")
    reference, arrays = make_layer(rng, shape[1], "float32", eps=0.0)
    y, saved = sync_batch_norm(x[part], **arrays, eps=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        assert_close(y[:, [0, 2]], reference(x)[:, [0, 2]], part)
        dx = reference.backward(dy)
    assert_close(sync_batch_norm_backward(dy[part], saved).x[:, [0, 2]], dx[:, [0, 2]], part)
    assert np.isfinite(arrays["running_var"]).all()


def test_eps_zero(world, rng):
    shape = SHAPES["4d"]
    for dtype in "float32", "float64":
        x, dy = random_batch(rng, shape, dtype), random_array(rng, shape, dtype)
        reference, arrays = make_layer(rng, shape[1], dtype, eps=0.0)
        assert_step(world, reference, arrays, x, dy, "uneven", eps=0.0)


def global_variance(world, x, part, **arguments):
    """Return the biased variance as running_var shows it."""
    channels = x.shape[-1 if arguments.get("channels_last") else 1]
    running_mean, running_var = np.zeros(channels, x.dtype), np.ones(channels, x.dtype)
    sync_batch_norm(x[part], None, None, running_mean, running_var, momentum=1.0, **arguments)
    world.assert_same(running_mean, running_var)
    count = x.size // channels
    return running_var.astype(np.float64) * (count - 1) / count


@pytest.mark.parametrize(
    "offset", [0.0, 1e3, 1e5, *(pytest.param(offset, marks=pytest.mark.long) for offset in (1e2, 1e4, -1e5))]
)
def test_variance_at_offset_float32(world, rng, offset):
    """Two million values, whose mean is many deviations from zero."""
    x = (rng.standard_normal((2000, 1, 1024), np.float32) + np.float32(offset)).astype(np.float32)
    expected = np.var(x.astype(np.float64))
    for split in ["even", "empty"] if world.size > 1 else ["even"]:
        assert relative_error(global_variance(world, x, world.part(2000, split)), [expected]) <= 1e-6


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("position", [0, -1])
def test_variance_with_outlier_float32(world, rng, offset, position):
    """The value that a naive shift would take lies 1e4 deviations from all others."""
    x = rng.standard_normal((2000, 1, 1024), np.float32) + np.float32(offset)
    x[position, 0, position] = offset + 1e4
    expected = np.var(x.astype(np.float64))
    assert relative_error(global_variance(world, x, world.part(2000, "uneven")), [expected]) <= 1e-6


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("offset", [1e5, 1e8])
def test_variance_at_offset_float64(world, rng, offset, split):
    x = rng.normal(offset, 1, (400, 3, 50))
    expected = np.var(x.astype(np.longdouble), axis=(0, 2))
    assert relative_error(global_variance(world, x, world.part(400, split)), expected) <= 1e-11


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spread", [1e2, 1e4])
def test_variance_of_ranks_far_apart(world, rng, dtype, spread):
    """Each rank's values lie close together, far from the other ranks'."""
    x = rng.normal(size=(64, 3, 10)).astype(dtype)
    for rank in range(world.size):
        rows = slice(64 * rank // world.size, 64 * (rank + 1) // world.size)
        x[rows] += np.asarray(spread * (rank + 1), dtype)
    part = slice(64 * world.rank // world.size, 64 * (world.rank + 1) // world.size)
    expected = np.var(x.astype(np.longdouble), axis=(0, 2))
    assert relative_error(global_variance(world, x, part), expected) <= TOLERANCE[np.dtype(dtype)]


def test_float64_on_one_rank(world, rng):
    """It would exchange once more than the others."""
    x = random_array(rng, (6, 3), "float64" if world.rank == world.size - 1 else "float32")
    if world.size > 1:
        with pytest.raises(RankMismatchError):
            sync_batch_norm(x)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("offset", [3, 1000])
def test_ranks_at_opposite_offsets(world, rng, dtype, offset):
    """Whatever stands for each rank's mean may add up to zero over the ranks: as here over an even number."""
    n = 16
    part = slice(n * world.rank, n * (world.rank + 1))
    x = np.tile(random_array(rng, (n, 3, 4), dtype, offset=offset, scale=0.5), (world.size, 1, 1))
    for rank in range(1, world.size, 2):
        x[n * rank : n * (rank + 1)] *= -1
    dy = random_array(rng, x.shape, dtype)
    exact = dtype if dtype == "float64" else "float32"
    reference, arrays = make_layer(rng, 3, exact, dtype=np.longdouble)
    y, saved = sync_batch_norm(x[part], **arrays)
    tolerance = {"float16": 1e-3, "float32": 1e-6, "float64": 1e-12}[dtype]
    assert_close(y, reference(x), part, tolerance=tolerance)
    assert_close(
        sync_batch_norm_backward(dy[part], saved).x, reference.backward(dy), part, tolerance=tolerance
    )
    assert_close(arrays["running_var"], reference.running_var)


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_variance_of_channels_around_an_offset(world, rng, offset):
    """Whatever value stands for a channel's mean on each rank, it differs between ranks for some channels."""
    offsets = offset + 0.5 * np.arange(256)
    x = rng.normal(offsets[:, None], 1, (32, 256, 10))
    expected = np.var(x.astype(np.longdouble), axis=(0, 2))
    assert relative_error(global_variance(world, x, world.part(32, "uneven")), expected) <= 1e-11


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [1e2, 1e5])
def test_y_and_dx_at_offset(world, rng, dtype, offset):
    """The mean that is subtracted must not be rounded to x's precision."""
    shape = SHAPES["4d"]
    x, dy = random_array(rng, shape, dtype, offset=offset), random_array(rng, shape, dtype)
    reference, arrays = make_layer(rng, shape[1], dtype, dtype=np.longdouble)
    part = world.part(len(x), "empty")
    y, saved = sync_batch_norm(x[part], **arrays)
    # The mean of float64 data is known to float64's precision, no better.
    tolerance = 1e-6 if dtype == "float32" else 1e-15 * offset
    assert_close(y, reference(x), part, tolerance=tolerance)
    gradients = sync_batch_norm_backward(dy[part], saved)
    assert_close(gradients.x, reference.backward(dy), part, tolerance=tolerance)
    for name in "weight", "bias":
        total = world.sum(getattr(gradients, name)).astype(dtype)
        assert_close(total, getattr(reference, f"{name}_grad"), tolerance=tolerance)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_out(world, rng, dtypes):
    dtype, parameter_dtype = DTYPES[dtypes]
    shape = SHAPES["4d"]
    x = random_batch(rng, shape, dtype)[world.part(shape[0], "empty")]
    _, arrays = make_layer(rng, shape[1], parameter_dtype)
    expected, _ = sync_batch_norm(x, arrays["weight"], arrays["bias"])
    out = np.full(x.shape, 7, dtype)
    y, saved = sync_batch_norm(x, arrays["weight"], arrays["bias"], out=out)
    assert y is out
    assert_identical(out, expected)
    # The backward must not depend on what becomes of out.
    out[...] = 0
    _, other = sync_batch_norm(x, arrays["weight"], arrays["bias"])
    dy = random_array(rng, x.shape, dtype)
    assert_identical(sync_batch_norm_backward(dy, saved).x, sync_batch_norm_backward(dy, other).x)


def test_backward_keeps_its_inputs(world, rng):
    """Inputs are not written to, and a weight changed after the forward does not change the backward."""
    shape = SHAPES["3d"]
    part = world.part(shape[0], "uneven")
    x, dy, residual = (random_array(rng, shape)[part] for _ in range(3))
    weight, bias = random_channels(rng, shape[1])
    copies = [a.copy() for a in (x, dy, residual, weight, bias)]
    gradients = []
    for change in False, True:
        _, saved = sync_batch_norm(x, weight, bias, activation="relu", residual=residual)
        for a, copy in zip((x, residual, weight, bias), (copies[i] for i in (0, 2, 3, 4)), strict=True):
            assert_identical(a, copy)
        if change:
            weight *= -3
            bias += 1
        gradients.append(sync_batch_norm_backward(dy, saved))
        assert_identical(dy, copies[1])
    for first, second in zip(*gradients, strict=True):
        assert_identical(second, first)


def test_bitwise_repeatability(world, rng):
    for dtype, parameter_dtype in DTYPES.values():
        x, dy = (random_array(rng, (40, 7, 33), dtype)[world.part(40, "empty")] for _ in range(2))
        results = []
        for _ in range(2):
            running = np.zeros(7, parameter_dtype), np.ones(7, parameter_dtype)
            y, saved = sync_batch_norm(x, None, None, *running)
            results.append([y, sync_batch_norm_backward(dy, saved).x, *running])
        for first, second in zip(*results, strict=True):
            assert_identical(second, first)


class SilentGroup(ProcessGroup):
    """A group of two that must not be used."""

    rank, size, timeout = 0, 2, 1.0

    def allreduce(self, buffer):
        raise AssertionError("communicated")

    def broadcast(self, buffer, root=0):
        raise AssertionError("communicated")


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_eval_does_not_communicate(rng, statistics):
    running = (np.zeros(5, "f4"), np.ones(5, "f4")) if statistics == "running" else (None, None)
    x = random_array(rng, SHAPES["2d"])
    _, saved = sync_batch_norm(x, None, None, *running, training=False, process_group=SilentGroup())
    sync_batch_norm_backward(x, saved)
    with pytest.raises(AssertionError, match="communicated"):
        sync_batch_norm(x, None, None, *running, process_group=SilentGroup())


class TwinGroup(SilentGroup):
    """A group whose other rank has the same data."""

    def __init__(self):
        self.messages = []

    def allreduce(self, buffer):
        self.messages.append((buffer.dtype, buffer.size))
        buffer *= 2
        return buffer


@pytest.mark.parametrize("dtypes", DTYPES)
def test_one_allreduce_each_way(rng, dtypes):
    """One float64 vector per direction; for float64 data a second in the forward."""
    dtype, parameter_dtype = DTYPES[dtypes]
    x, dy = (random_array(rng, (8, 6, 5), dtype) for _ in "12")
    reference, arrays = make_layer(rng, 6, parameter_dtype)
    group = TwinGroup()
    y, saved = sync_batch_norm(x, **arrays, process_group=group)
    gradients = sync_batch_norm_backward(dy, saved)
    lengths = [4 * 6 + 6, *([6 + 5] if dtype == np.float64 else []), 2 * 6 + 5]
    assert group.messages == [(np.float64, length) for length in lengths]
    assert_close(y, reference(np.concatenate([x, x])), slice(8))
    assert_close(gradients.x, reference.backward(np.concatenate([dy, dy])), slice(8))
    assert_close(arrays["running_var"], reference.running_var)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_grad_reduction(rng, reduction):
    x, dy = (random_array(rng, (8, 6, 5)) for _ in "12")
    reference, arrays = make_layer(rng, 6, "float32")
    group = TwinGroup()
    _, saved = sync_batch_norm(x, **arrays, process_group=group)
    gradients = sync_batch_norm_backward(dy, saved, grad_reduction=reduction)
    reference(np.concatenate([x, x]))
    reference.backward(np.concatenate([dy, dy]))
    share = 1 if reduction == "sum" else 2
    assert_close(gradients.weight, reference.weight_grad / share)
    assert_close(gradients.bias, reference.bias_grad / share)
    assert len(group.messages) == 2
