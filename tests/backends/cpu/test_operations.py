"""The operations on a CPU by themselves, against the reference in float64 and the formulas bit by bit."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cupy_syncbn.backends.interface import Affine, Running
from cupy_syncbn.backends.vector import moments
from support.arrays import BFLOAT16, LAYOUTS, random_array, random_batch, random_channels
from support.cases import sweep
from support.compare import assert_identical, relative_error
from support.operations import TRAILER, backward, check_step, forward, local_batch

pytestmark = pytest.mark.mpi_skip

TYPES = {
    "float64": np.dtype("f8"),
    "float32": np.dtype("f4"),
    "float16": np.dtype("f2"),
    "bfloat16": BFLOAT16,
}
SLOPES = [None, 0.0, 0.25]


def some_running(rng, channels, dtype="f4"):
    return Running(rng.normal(size=channels).astype(dtype), rng.uniform(0.5, 2, channels).astype(dtype))


# ---- Steps ----


@sweep(("dtype", "slope", "has_residual", "training"), TYPES, SLOPES, [False, True], [True, False])
def test_step(rng, operations, dtype, slope, has_residual, training):
    shape, dtype = (18, 5, 7), TYPES[dtype]
    x, dy, residual = random_batch(rng, shape, dtype), *(random_array(rng, shape, dtype) for _ in "12")
    running = None if training else some_running(rng, 5)
    check_step(operations, x, dy, residual=residual if has_residual else None, slope=slope, running=running)


@sweep(("C", "S", "dtype"), [1, 3, 31, 33, 257], [1, 3, 31, 33, 257], TYPES)
def test_odd_sizes(rng, operations, C, S, dtype):
    shape, dtype = (5, C, S), TYPES[dtype]
    x, dy, residual = random_batch(rng, shape, dtype), *(random_array(rng, shape, dtype) for _ in "12")
    check_step(operations, x, dy, residual=residual, slope=0.0)


LARGE = [(2, 3, 70000), (70000, 3, 1), (1, 1, 200003), (3, 2, 9001), (3, 9001, 2), (24, 257, 49)]
LARGE += [(300, 5, 7), (6000, 1, 2), (30001, 1, 1), (64, 128, 1), (8, 64, 1), (2, 2048, 49)]


@sweep(("shape", "dtype"), LARGE, TYPES)
def test_large_sizes(rng, operations, shape, dtype):
    dtype = TYPES[dtype]
    x, dy = random_batch(rng, shape, dtype), random_array(rng, shape, dtype)
    check_step(operations, x, dy, slope=0.25)


@pytest.mark.parametrize("shape", [(0, 4, 1), (0, 4, 3), (2, 4, 0), (0, 4, 0)], ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_no_values(rng, operations, shape, dtype):
    """A rank without values adds nothing, and computes with what the others have."""
    dtype = TYPES[dtype]
    x = np.empty(shape, dtype)
    own = local_batch(operations, x)
    assert_identical(own.vector, np.array([0.0] * 17 + list(TRAILER)))
    alone = forward(operations, x, batch=own, running=Running(np.ones(4), np.ones(4), np.array(3), None))
    assert alone.writes == []
    others = local_batch(operations, random_batch(rng, (9, 4, 3), dtype))
    for slope in SLOPES:
        done = forward(operations, x, batch=others, residual=x, slope=slope)
        gradients = backward(operations, done, x)
        assert done.y.shape == gradients.dx.shape == gradients.dresidual.shape == shape
        assert not gradients.sums[:8].any()
        assert not gradients.dweight.any()
        assert not gradients.dbias.any()


# ---- Memory: orders, views, bytes ----


def layouts_of(dtype):
    # NumPy has no other byte order for the types of ml_dtypes.
    return [name for name in LAYOUTS if name != "big_endian" or dtype != "bfloat16"]


@pytest.mark.parametrize("shape", [(6, 5, 12), (3, 37, 99), (600, 5, 1)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "layout"), [(dtype, layout) for dtype in TYPES for layout in layouts_of(dtype)]
)
def test_layouts(rng, operations, shape, dtype, layout):
    """Each layout for x, dy, the residual and y, beside others."""
    names = layouts_of(dtype)
    change = [LAYOUTS[names[(names.index(layout) + i) % len(names)]] for i in range(4)]
    dtype = TYPES[dtype]
    x, dy, residual = random_batch(rng, shape, dtype), *(random_array(rng, shape, dtype) for _ in "12")
    x, dy, residual = (f(a) for f, a in zip(change, (x, dy, residual), strict=False))
    y = change[3](np.full(shape, 7, dtype))
    y = y if y.flags.writeable else None
    check_step(operations, x, dy)
    done, _ = check_step(operations, x, dy, residual=residual, slope=0.0, y=y)
    assert y is None or done.y is y


def test_what_lies_between_the_values_of_y_stays(rng, operations):
    x, dy = random_batch(rng, (6, 5, 12)), random_array(rng, (6, 5, 12))
    for name in "sliced", "transposed", "negative":
        y = LAYOUTS[name](np.zeros(x.shape, "f4"))
        whole = y if y.base is None else y.base
        whole[...] = 77
        check_step(operations, x, dy, y=y)
        assert (whole == 77).sum() == whole.size - y.size


def test_broadcast_values(rng, operations):
    """Gradients of sums and means have strides of zero; a batch may have as well."""
    shape = (7, 5, 6)
    x = random_batch(rng, shape)
    for dy in np.float32(0.25), random_array(rng, (5, 1)), random_array(rng, (7, 1, 1)):
        check_step(operations, x, np.broadcast_to(dy, shape), slope=0.0)
    check_step(operations, np.broadcast_to(x[:1], shape), random_array(rng, shape))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "big_endian"])
def test_layouts_of_channels(rng, operations, layout):
    """weight and bias may be views, and the running statistics, which are written to."""
    x = random_batch(rng, (6, 5, 4))
    arrays = [*random_channels(rng, 5), np.zeros(5, "f4"), np.ones(5, "f4")]
    views = [LAYOUTS[layout](np.stack([a, a], 1))[:, 1] for a in arrays]
    if layout == "read_only":
        views[2:] = [a.copy() for a in arrays[2:]]
    results = []
    for weight, bias, mean, var in (arrays, views):
        running = Running(mean, var, None, 0.1)
        batch = local_batch(operations, x)
        done = forward(operations, x, batch=batch, running=running, affine=Affine(weight, bias))
        for write in done.writes:
            write()
        results.append(done.y)
    assert_identical(*results)
    for view, array in zip(views, arrays, strict=True):
        assert_identical(np.ascontiguousarray(view), array)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "misaligned"])
def test_y_over_x(rng, operations, dtype, layout):
    """Evaluation may write its result over its input."""
    for shape in (6, 5, 12), (600, 5, 1), (3, 2, 9001):
        x = LAYOUTS[layout](random_batch(rng, shape, TYPES[dtype]))
        running, residual = some_running(rng, shape[1]), random_array(rng, shape, TYPES[dtype])
        for slope in SLOPES:
            expected = forward(operations, x, running=running, residual=residual, slope=slope).y
            same = LAYOUTS[layout](x.copy())
            forward(operations, same, running=running, residual=residual, slope=slope, y=same)
            assert_identical(same, expected)


def bits_of_step(operations, x, dy, **arguments):
    running = Running(np.zeros(x.shape[1]), np.ones(x.shape[1]), None, 0.1)
    done = forward(operations, x, batch=local_batch(operations, x), running=running, **arguments)
    for write in done.writes:
        write()
    gradients = backward(operations, done, dy)
    of_channels = {"mean": running.mean, "var": running.var, "dweight": gradients.dweight}
    return {"y": done.y, "dx": gradients.dx, "dbias": gradients.dbias, **of_channels}


def test_alignment_does_not_change_the_bits(rng, operations):
    x = random_array(rng, (50, 7, 33))
    first = bits_of_step(operations, x, x, slope=0.0)
    for name, array in bits_of_step(operations, LAYOUTS["misaligned"](x), x, slope=0.0).items():
        assert_identical(array, first[name])


@pytest.mark.parametrize("shape", [(64, 64, 784), (8192, 512, 1), (70000, 3, 1)], ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_repeatability(rng, operations, shape, dtype):
    x, dy = (random_array(rng, shape, TYPES[dtype]) for _ in "12")
    first = bits_of_step(operations, x, dy, slope=0.0)
    operations.empty(shape, np.dtype("f8"))[...] = np.nan  # what memory has held before does not matter
    for name, again in bits_of_step(operations, x, dy, slope=0.0).items():
        assert_identical(again, first[name])


def test_threads(rng, operations):
    batches = [random_array(rng, (64, 32, 196)) for _ in range(4)]
    expected = [bits_of_step(operations, x, x, slope=0.0) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda x: bits_of_step(operations, x, x, slope=0.0), batches * 3))
    for results, wanted in zip(actual, expected * 3, strict=True):
        for name, array in results.items():
            assert_identical(array, wanted[name])


# ---- Statistics ----


def variance(operations, x):
    _, m2, count = moments(operations.statistics(x, TRAILER)[0], x.shape[1])
    return m2 / count


# Two million values per channel in the shapes that may be summed in different ways.
MILLIONS = {
    "pixels": (2, 1, 1 << 20),
    "rows": (200, 1, 10240),
    "maps": (41000, 1, 49),
    "pairs": (1 << 20, 1, 2),
    "samples": (1 << 21, 1, 1),
    "features": (1 << 21, 2, 1),
}


@sweep(("shape", "offset"), MILLIONS, [0, 1e2, 1e3, 1e4, -1e5])
def test_variance_at_offset(rng, operations, shape, offset):
    x = rng.standard_normal(MILLIONS[shape], np.float32) + np.float32(offset)
    expected = np.var(x.astype(np.float64), axis=(0, 2))
    assert relative_error(variance(operations, x), expected) <= 1e-6


def outlier_first(x):
    x.flat[0] += 1e4


def outlier_last(x):
    x.flat[-1] -= 1e4


def outliers_everywhere(x):
    x.reshape(-1)[:: 1 << 14] += 1e4


def jump(x):
    x[len(x) // 2 :] += 1e4


def ramp(x):
    x += np.linspace(0, 1e4, x.size, dtype=x.dtype).reshape(x.shape)


@sweep(
    ("shape", "offset", "disturb"),
    ["pixels", "maps", "samples"],
    [0, 1e3],
    [outlier_first, outlier_last, outliers_everywhere, jump, ramp],
)
def test_variance_of_disturbed_data(rng, operations, shape, offset, disturb):
    """No single value is a good shift for all of these."""
    x = rng.standard_normal(MILLIONS[shape], np.float32) + np.float32(offset)
    disturb(x)
    assert relative_error(variance(operations, x), [np.var(x.astype(np.float64))]) <= 1e-6


# 127 and 509 are prime.
SMALL = [(512, 1, 3), (512, 3, 1), (509, 31, 1), (500, 10, 1), (400, 31, 1), (128, 63, 1), (127, 128, 1)]
SMALL += [(64, 10, 1), (600, 5, 1)]


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_variance_of_small_batches(rng, operations, shape):
    """Beside an outlier all squares are rounded in one direction: long chains of float32 add that up."""
    for _ in range(50):
        x = np.full(shape, rng.uniform(0.1, 10), "f4")
        x[::2] *= -1
        x[0] = 10 ** rng.uniform(0, 3)
        expected = np.var(x.astype(np.float64), axis=(0, 2))
        assert relative_error(variance(operations, x), expected) <= 1e-6


@pytest.mark.parametrize("shape", [(400, 3, 50), (9000, 3, 1), (2, 3, 70000)], ids=str)
@pytest.mark.parametrize("offset", [0, 1e5, -1e8])
def test_variance_at_offset_float64(rng, operations, shape, offset):
    x = rng.normal(offset, 1, shape)
    expected = np.var(x.astype(np.longdouble), axis=(0, 2))
    batch = local_batch(operations, x)
    count = shape[0] * shape[2]
    assert relative_error(batch.squares[:3] / count, expected) <= 1e-12


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_variance_at_offset_16_bits(rng, operations, dtype):
    """Where 16 bits have a few steps a deviation left."""
    x = random_array(rng, (2000, 2, 64), TYPES[dtype], offset=1000 if dtype == "float16" else 100)
    values = x.astype(np.float64)
    mean, m2, count = moments(local_batch(operations, x).vector, 2)
    assert relative_error(mean, np.mean(values, axis=(0, 2))) <= 1e-6
    assert relative_error(m2 / count, np.var(values, axis=(0, 2))) <= 1e-6


def test_variances_of_different_channels(rng, operations):
    """Far from zero, around it, huge, tiny: each channel has its own accuracy."""
    for shape in (300, 1, 49), (9000, 1, 1), (3, 1, 9001):
        scales = [(1e5, 1), (0, 1), (0.5e30, 1e30), (1e-19, 1e-19), (-3e4, 1), (1e-30, 1e-30), (1, 0)]
        x = np.concatenate([random_array(rng, shape, offset=o, scale=s) for o, s in scales], 1)
        expected = np.var(x.astype(np.longdouble), axis=(0, 2)).astype("f8")
        actual = variance(operations, x)
        assert np.all(np.abs(actual - expected) <= 1e-6 * expected)


@pytest.mark.parametrize("scale", [1e-4, 60000 / 4])
def test_float16_beyond_its_squares(rng, operations, scale):
    """Squares and sums of float16 data leave float16's range at once."""
    x = np.clip(random_array(rng, (64, 3, 49), "f8", scale=scale), -65504, 65504).astype("f2")
    check_step(operations, x, random_array(rng, x.shape, "f2"))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offset", [0, 30])
def test_sums_of_ranks(rng, operations, dtype, offset):
    """The vectors of parts add up to that of the whole."""
    x = random_array(rng, (50, 3, 7), TYPES[dtype], offset=offset)
    parts = [x[:1], x[1:20], x[20:20], x[20:]]
    vector = sum(operations.statistics(part, TRAILER)[0] for part in parts)
    assert_identical(vector[-5:], 4 * np.array(TRAILER))
    mean, m2, count = moments(vector, 3)
    values = x.astype(np.longdouble)
    assert count == 350
    scale = max(1, offset)  # of the deviation, or the mean
    assert relative_error(mean, values.mean(axis=(0, 2)), scale) <= 1e-7
    assert relative_error(m2 / count, values.var(axis=(0, 2))) <= 1e-6
    if x.dtype.itemsize == 8:
        each = [
            operations.centered_squares(operations.statistics(p, TRAILER)[1], vector, (), 0) for p in parts
        ]
        assert relative_error(sum(each) / count, values.var(axis=(0, 2))) <= 1e-13


def test_sum_of_opposite_pivots(rng, operations):
    """What two ranks add up: the mean is zero, as is the sum of the pivots, but not the pivots."""
    x = random_array(rng, (50, 3, 7), offset=1e3)
    sum_ = operations.statistics(x, TRAILER)[0] + operations.statistics(-x, TRAILER)[0]
    mean, m2, count = moments(sum_, 3)
    assert count == 700
    assert (mean == 0).all()
    assert relative_error(m2 / count, np.square(x.astype("f8")).mean(axis=(0, 2))) <= 1e-7


def test_pivots_have_12_bits(rng, operations):
    """Else their products with the count would be rounded, and would not cancel."""
    for dtype in TYPES.values():
        x = random_batch(rng, (50, 64, 7), dtype) + dtype.type(40)
        vector = operations.statistics(x, TRAILER)[0]
        pivot, square = vector[:64] / 350, vector[64:128] / 350
        mantissa, _ = np.frexp(pivot)
        assert pivot.all()
        assert_identical(mantissa * 2**12, np.round(mantissa * 2**12))
        assert_identical(square, pivot * pivot)


# ---- Sums of the backward ----


@sweep(("shape", "offset"), MILLIONS, [0, 1e3])
def test_sums_of_gradients(rng, operations, shape, offset):
    """Terms of one sign: a long chain of float32 would lose a part of the sum, and not of its noise alone."""
    x = rng.standard_normal(MILLIONS[shape], np.float32) + np.float32(offset)
    centred = x.astype("f8") - x.astype("f8").mean(axis=(0, 2), keepdims=True)
    for dy in np.full(x.shape, 1.1, "f4"), (0.7 * np.sign(centred)).astype("f4"):
        done = forward(operations, x, batch=local_batch(operations, x))
        sum_dy, sum_dy_xmu = backward(operations, done, dy).sums[:-5].reshape(2, -1)
        wide = dy.astype("f8")
        scale = np.abs(wide).sum(axis=(0, 2))
        assert np.all(np.abs(sum_dy - wide.sum(axis=(0, 2))) <= 1e-6 * scale)
        products = wide * centred
        assert np.all(
            np.abs(sum_dy_xmu - products.sum(axis=(0, 2))) <= 1e-6 * np.abs(products).sum(axis=(0, 2))
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [1e2, 1e5])
def test_step_at_offset(rng, operations, dtype, offset):
    shape = (40, 3, 33)
    x = random_array(rng, shape, dtype, offset=offset)
    # The mean of float64 data is known to float64's precision, no better.
    tolerance = 1e-6 if dtype == "float32" else 1e-15 * offset
    check_step(operations, x, random_array(rng, shape, dtype), tolerance=tolerance)


# ---- NaN, infinities, zeros, subnormal values ----

SPECIAL = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("dtype", TYPES)
def test_special_values_stay_in_their_channel(rng, operations, dtype, value):
    for shape in (12, 5, 5), (9000, 5, 1), (2, 5, 9001):
        clean, dy = random_batch(rng, shape, TYPES[dtype]), random_array(rng, shape, TYPES[dtype])
        dirty = clean.copy()
        dirty[-1, 1, -1] = value
        expected, actual = (bits_of_step(operations, x, dy, slope=0.25) for x in (clean, dirty))
        others = [0, 2, 3, 4]
        for name, wanted in expected.items():
            a, b = (v[:, others] if v.ndim == 3 else v[others] for v in (actual[name], wanted))
            assert_identical(a, b)
        for name in "y", "dx":
            assert np.isnan(actual[name][:, 1].astype("f8")).all()
        assert np.isnan(actual["var"][1])
        assert np.isnan(actual["dweight"][1])
        np.testing.assert_equal(actual["mean"][1], 0.1 * value)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("has_residual", [False, True])
def test_activation_of_special_values(operations, dtype, has_residual):
    """ReLU gives +0 below zero, for -inf too, and lets NaN pass; so do their gradients."""
    dtype = TYPES[dtype]
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 2.0, -2.0], dtype)
    zeros, ones = np.zeros(7), np.ones(7)
    running = Running(zeros.astype("f8"), ones.astype("f8"))
    x = values.reshape(1, 7, 1)
    residual = np.zeros_like(x) if has_residual else None
    affine = Affine(None, None, 0.0)
    results = {}
    for slope in SLOPES:
        for dy in [*SPECIAL, 3.0, -3.0]:
            done = forward(operations, x, running=running, affine=affine, residual=residual, slope=slope)
            gradients = backward(operations, done, np.full(x.shape, dy, dtype))
            if has_residual:
                assert_same(gradients.dresidual, gradients.dx)
            results[slope, dy] = done.y.ravel().astype("f8"), gradients.dx.ravel().astype("f8")
    nan, inf = np.nan, np.inf
    for dy in [*SPECIAL, 3.0, -3.0]:
        y, dx = results[None, dy]
        np.testing.assert_array_equal(y, [nan, inf, -inf, 0, 0, 2, -2])
        np.testing.assert_array_equal(dx, [dy] * 7)
        y, dx = results[0.0, dy]
        np.testing.assert_array_equal(y, [nan, inf, 0, 0, 0, 2, 0])
        assert not np.signbit(y[[2, 3, 4, 6]]).any()
        np.testing.assert_array_equal(dx, [dy, dy, 0, 0, 0, dy, 0])
        assert not np.signbit(dx[[2, 3, 4, 6]]).any()
        y, dx = results[0.25, dy]
        np.testing.assert_array_equal(y, [nan, inf, -inf, 0, 0, 2, -0.5])
        small = 0.25 * dy
        np.testing.assert_array_equal(dx, [small, dy, small, small, small, dy, small])


@pytest.mark.parametrize("dtype", TYPES)
def test_constants_keep_special_values_out_of_dx(rng, operations, dtype):
    """Where the statistics are constants dx does not depend on x."""
    dtype = TYPES[dtype]
    x, dy = random_batch(rng, (6, 5, 7), dtype), random_array(rng, (6, 5, 7), dtype)
    running = some_running(rng, 5)
    expected = backward(operations, forward(operations, x, running=running), dy).dx
    for value in SPECIAL:
        actual = backward(operations, forward(operations, np.full_like(x, value), running=running), dy).dx
        assert_identical(actual, expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_subnormal_values_are_kept(rng, operations, dtype):
    """y = x and dx = dy where the statistics are 0 and 1."""
    dtype = TYPES[dtype]
    integer = np.dtype(f"u{dtype.itemsize}")
    mantissa = {8: 52, 4: 23, 2: 10 if dtype == np.float16 else 7}[dtype.itemsize]
    bits = rng.integers(1, 1 << mantissa, (6, 5, 700), dtype=np.uint64).astype(integer)
    x = bits.view(dtype)
    assert (np.abs(x.astype("f8")) > 0).all()
    running = Running(np.zeros(5), np.ones(5))
    for slope in SLOPES:
        done = forward(operations, x, running=running, affine=Affine(None, None, 0.0), slope=slope)
        assert_identical(done.y, x)
        assert_identical(backward(operations, done, x).dx, x)


@pytest.mark.parametrize("scale", [1e30, 1e15, 1e-15, 1e-19, 1e-38])
def test_squares_beyond_float32(rng, operations, scale):
    """Squares over- or underflow in float32, the results do not."""
    for shape in (18, 5, 12), (9000, 5, 1):
        x = random_array(rng, shape, offset=0.5 * scale, scale=scale)
        check_step(operations, x, random_array(rng, shape), eps=0.0 if scale > 1e-38 else 1e-5)


@sweep(("slope", "has_residual", "shape"), SLOPES, [False, True], [(5, 3, 37), (40, 3, 1)])
def test_products_beyond_float32(rng, operations, slope, has_residual, shape):
    """Each gradient and each value is within the range, and the product of two is not."""
    x, dy = random_array(rng, shape, "f4"), random_array(rng, shape, "f4")
    x[1, 0], dy[1, 0] = 1e37, 3e3
    residual = random_array(rng, shape, "f4") if has_residual else None
    done = forward(operations, x, batch=local_batch(operations, x), residual=residual, slope=slope)
    sums = backward(operations, done, dy).sums[:6].reshape(2, 3)
    wide = x.astype("f8")
    centered = wide - wide.mean(axis=(0, 2), keepdims=True)
    g = dy.astype("f8")
    if slope is not None:
        g = np.where(done.y > 0, g, slope * g)
    of_terms = np.abs(g * centered).sum(axis=(0, 2))
    assert of_terms[0] > 1e40
    assert np.all(np.abs(sums[1] - (g * centered).sum(axis=(0, 2))) <= 1e-6 * of_terms)


@pytest.mark.parametrize("dtype", TYPES)
def test_constant_channel(rng, operations, dtype):
    x = random_batch(rng, (18, 3, 7), TYPES[dtype])
    x[:, 1] = 3.3
    mean, m2, count = moments(local_batch(operations, x).vector, 3)
    assert abs(mean[1] - float(x[0, 1, 0])) <= 1e-15 * mean[1]
    assert abs(m2[1]) / count < 1e-12
    bias = np.array([0, 1.5, 0], "f4")
    done = forward(operations, x, batch=local_batch(operations, x), affine=Affine(None, bias))
    assert relative_error(done.y[:, 1].astype("f8"), np.full((18, 7), 1.5)) <= 1e-4
    assert np.isfinite(backward(operations, done, x).dx.astype("f8")).all()


# ---- The formulas, bit by bit ----


def assert_same(actual, expected):
    """Check for the same bits; NaN may have others."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    nan = np.isnan(expected.astype("f8"))
    np.testing.assert_array_equal(np.isnan(actual.astype("f8")), nan)
    zero = np.zeros((), actual.dtype)
    assert_identical(np.where(nan, zero, actual), np.where(nan, zero, expected))


def by_formulas(x, dy, residual, sums, count, mean, var, weight, bias, slope, eps):
    """Return y, dx, dresidual of a channel: one operation a line, each rounded in the accumulator's type."""
    A = np.float64 if x.dtype.itemsize == 8 else np.float32
    invstd = 1 / np.sqrt(var + eps)
    factor = invstd * float(weight)
    shift, scale = A(mean), A(factor)
    offset = A(float(bias) - (mean - float(shift)) * factor)

    value = x.astype(A) - shift
    value = value * scale
    value = value + offset
    if residual is not None:
        value = value + residual.astype(A)
    g = dy.astype(A)
    if slope is not None:
        blocked = value <= 0 if slope == 0 else ~(value > 0)
        below = np.zeros_like(value) if slope == 0 else A(slope) * value
        below_g = np.zeros_like(g) if slope == 0 else A(slope) * g
        value, g = np.where(blocked, below, value), np.where(blocked, below_g, g)
    dx = g
    if sums is not None:
        sum_dy, sum_dy_xmu = sums
        step = invstd * invstd * sum_dy_xmu / -count
        constant = A(sum_dy / -count - (mean - float(shift)) * step)
        change = x.astype(A) - shift
        change = change * A(step)
        change = change + constant
        dx = g + change
    dx = dx * scale
    return value.astype(x.dtype), dx.astype(x.dtype), g.astype(x.dtype)


@sweep(
    ("dtype", "slope", "has_residual", "training", "shape"),
    TYPES,
    SLOPES,
    [False, True],
    [True, False],
    [(12, 5, 7), (2, 5, 2049), (700, 5, 1)],
)
@np.errstate(all="ignore")
def test_bits_of_the_formulas(rng, operations, dtype, slope, has_residual, training, shape):
    """What is done at each element is the same in all implementations."""
    dtype = TYPES[dtype]
    x = random_batch(rng, shape, dtype) + np.array([0, 3, 1000, -0.1, 0], "f4")[:, None].astype(dtype)
    dy, residual = (random_array(rng, shape, dtype) for _ in "12")
    dy[0, 0], dy[-1, 1], x[0, 4, 0] = 0, -1e-7, np.inf
    running = None if training else some_running(rng, 5)
    weight, bias = random_channels(rng, 5)
    batch = local_batch(operations, x) if training else None
    done = forward(
        operations, x, batch=batch, running=running, affine=Affine(weight, bias, 1e-3),
        residual=residual if has_residual else None, slope=slope,
    )  # fmt: skip
    gradients = backward(operations, done, dy, scale=1 / 3)
    sum_dy, sum_dy_xmu = gradients.sums[:10].reshape(2, 5)
    if training:
        mean, m2, count = moments(batch.vector, 5)
        var = np.where(m2 < 0, 0, m2 if batch.squares is None else batch.squares[:5]) / count
    else:
        mean, var, count = running.mean.astype("f8"), running.var.astype("f8"), 0
    for c in range(5):
        y, dx, dresidual = by_formulas(
            x[:, c], dy[:, c], residual[:, c] if has_residual else None,
            (sum_dy[c], sum_dy_xmu[c]) if training else None,
            count, mean[c], var[c], weight[c], bias[c], slope, 1e-3,
        )  # fmt: skip
        assert_same(done.y[:, c], y)
        assert_same(gradients.dx[:, c], dx)
        if has_residual:
            assert_same(gradients.dresidual[:, c], dresidual)
    assert_same(gradients.dweight, sum_dy_xmu * (1 / np.sqrt(var + 1e-3)) * (1 / 3))
    assert_same(gradients.dbias, sum_dy * (1 / 3))


# ---- Parameters and running statistics ----


def test_gradients_that_are_not_wanted(rng, operations):
    x = random_batch(rng, (6, 5, 7))
    done = forward(operations, x, batch=local_batch(operations, x))
    whole = backward(operations, done, x)
    assert whole.dweight.dtype == whole.dbias.dtype == np.float64
    only = backward(operations, done, x, weight_type=None, bias_type=np.dtype("f4"))
    assert only.dweight is None
    assert_identical(only.dbias, whole.dbias.astype("f4"))
    only = backward(operations, done, x, weight_type=np.dtype("f2"), bias_type=None, scale=0.5)
    assert only.dbias is None
    assert_identical(only.dweight, (whole.dweight * 0.5).astype("f2"))


@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_parameter(rng, operations, has_weight, has_bias):
    x, dy = random_batch(rng, (6, 5, 7)), random_array(rng, (6, 5, 7))
    weight, bias = random_channels(rng, 5)
    batch = local_batch(operations, x)
    given = Affine(weight if has_weight else None, bias if has_bias else None)
    same = Affine(weight if has_weight else np.ones(5, "f4"), bias if has_bias else np.zeros(5, "f4"))
    results = [forward(operations, x, batch=batch, affine=affine) for affine in (given, same)]
    assert_identical(results[0].y, results[1].y)
    assert_identical(*(backward(operations, done, dy).dx for done in results))


@sweep(("momentum", "dtype", "buffer"), [None, 0.0, 0.1, 1.0], TYPES, ["f8", "f4", "f2"])
def test_running_statistics(rng, operations, momentum, dtype, buffer):
    x = random_batch(rng, (18, 5, 7), TYPES[dtype])
    values = x.astype("f8")
    mean, var = values.mean(axis=(0, 2)), values.var(axis=(0, 2), ddof=1)
    running = Running(*some_running(rng, 5, buffer)[:2], np.array(3), momentum)
    before = [a.copy() for a in running[:3]]
    done = forward(operations, x, batch=local_batch(operations, x), running=running)
    for array, copy in zip(running[:3], before, strict=True):
        assert_identical(array, copy)
    for write in done.writes:
        write()
    assert running.num_batches_tracked == 4
    share = 0.25 if momentum is None else momentum
    step = np.finfo(buffer).eps
    for array, old, value in zip(running[:2], before, (mean, var), strict=False):
        expected = (1 - share) * old.astype("f8") + share * value
        assert array.dtype == buffer
        assert np.all(np.abs(array - expected) <= (0.51 * step + 1e-6) * np.abs(expected).max())


def test_a_momentum_of_1_forgets(rng, operations):
    """0 * inf would keep an infinity for ever."""
    x = random_batch(rng, (18, 2, 7))
    running = Running(np.array([np.inf, np.nan]), np.array([np.nan, np.inf]), None, 1.0)
    for write in forward(operations, x, batch=local_batch(operations, x), running=running).writes:
        write()
    assert np.isfinite(running.mean).all()
    assert np.isfinite(running.var).all()


def test_unbiased_variance_of_one_value(operations):
    """There is none: the biased one, of zero, is taken."""
    x = np.full((1, 2, 1), 3, "f4")
    running = Running(np.zeros(2), np.ones(2), None, 0.5)
    for write in forward(operations, x, batch=local_batch(operations, x), running=running).writes:
        write()
    assert_identical(running.mean, np.full(2, 1.5))
    assert_identical(running.var, np.full(2, 0.5))


def test_writes_allocate_nothing(rng, operations):
    """They follow the messages: an error there would leave the ranks apart."""
    C = 1 << 16
    running = Running(np.zeros(C, "f4"), np.ones(C, "f4"), np.array(0), 0.1)
    x = random_array(rng, (2, C, 1))
    writes = forward(operations, x, batch=local_batch(operations, x), running=running).writes
    assert writes
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for write in writes:
            write()
        assert tracemalloc.get_traced_memory()[1] - before <= 1024
    finally:
        tracemalloc.stop()
    assert running.mean.all()
    assert running.num_batches_tracked == 1


# ---- Workspace ----


def peak_of(function):
    """Return the most memory that a call takes, and its result."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        result = function()
        return tracemalloc.get_traced_memory()[1] - before, result
    finally:
        tracemalloc.stop()


@sweep(
    ("shape", "layout", "dtype", "slope", "has_residual"),
    [(64, 64, 784), (8192, 512, 1), (16, 1024, 196)],
    ["contiguous", "channels_last"],
    TYPES,
    SLOPES,
    [False, True],
)
def test_workspace(rng, operations, workspace, shape, layout, dtype, slope, has_residual):
    """A pass takes known memory beside its results."""
    dtype = TYPES[dtype]
    x = operations.as_kernel_input(LAYOUTS[layout](random_array(rng, shape, dtype)))
    most = workspace * x.size * max(4, dtype.itemsize) + (1 << 20)
    if slope is not None:
        most += x.size * 9 // 4  # bytes of masks, and bits
    residual = x if has_residual else None
    peak, batch = peak_of(lambda: local_batch(operations, x))
    assert peak <= most
    peak, done = peak_of(lambda: forward(operations, x, batch=batch, residual=residual, slope=slope))
    assert peak <= most + x.nbytes
    peak, _ = peak_of(lambda: backward(operations, done, x))
    assert peak <= most + x.nbytes * (1 + has_residual)
