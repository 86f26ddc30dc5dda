"""The operations in NumPy, through the public functions: shapes, memory layouts, accuracy, memory."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cupy_syncbn import SingleProcessGroup, sync_batch_norm, sync_batch_norm_backward
from cupy_syncbn.backends.cpu import memory
from cupy_syncbn.backends.cpu import operations as cpu_operations
from cupy_syncbn.backends.vector import moments
from support.arrays import DTYPES, LAYOUTS, random_array, random_batch, random_channels
from support.cases import sweep
from support.compare import assert_close, assert_identical, relative_error
from support.reference import BatchNorm

pytestmark = pytest.mark.mpi_skip

ALONE = SingleProcessGroup()
MIB = 1 << 20


def step(x, dy, *, channel_axis=1, residual=None, out=None, expected=None, **arguments):
    """Compare a training step with parameters with the reference; return y and the gradients."""
    rng = np.random.default_rng(1)
    channels = x.shape[channel_axis]
    parameter_dtype = np.dtype("f8") if x.dtype.itemsize == 8 else np.dtype("f4")
    weight, bias = random_channels(rng, channels, parameter_dtype)
    running_mean, running_var = np.zeros(channels, parameter_dtype), np.ones(channels, parameter_dtype)
    reference = BatchNorm(channels, channel_axis=channel_axis, activation=arguments.get("activation"))
    reference.weight, reference.bias = weight.astype("f8"), bias.astype("f8")

    y, saved = sync_batch_norm(
        x, weight, bias, running_mean, running_var, process_group=ALONE, residual=residual, out=out,
        channels_last=channel_axis == -1, **arguments,
    )  # fmt: skip
    assert_close(y, reference(x, residual))
    gradients = sync_batch_norm_backward(dy, saved)
    dx = reference.backward(dy)
    if residual is not None:
        dx, dresidual = dx
        assert_close(gradients.residual, dresidual)
    assert_close(gradients.x, dx)
    assert_close(gradients.weight, reference.weight_grad)
    assert_close(gradients.bias, reference.bias_grad)
    assert_close(running_mean, reference.running_mean)
    assert_close(running_var, reference.running_var)
    return y, gradients


@sweep(("C", "S", "channel_axis"), [1, 3, 31, 33, 257], [1, 3, 31, 33, 257], [1, -1])
def test_odd_sizes(rng, C, S, channel_axis):
    shape = (5, C, S) if channel_axis == 1 else (5, S, C)
    x, dy = random_batch(rng, shape, channel_axis=channel_axis), random_array(rng, shape)
    step(x, dy, channel_axis=channel_axis)


LARGE = [(2, 3, 70000), (70000, 3), (1, 1, 200003), (3, 2, 9001)]
LARGE += [(300, 5, 7), (24, 257, 49), (6000, 1, 2), (30001, 1)]


@sweep(("shape", "dtype", "channel_axis"), LARGE, ["float32", "float64", "float16"], [1, -1])
def test_large_sizes(rng, shape, dtype, channel_axis):
    if channel_axis == -1:
        shape = (shape[0], *shape[2:], shape[1])
    x, dy = random_batch(rng, shape, dtype, channel_axis), random_array(rng, shape, dtype)
    step(x, dy, channel_axis=channel_axis, activation="leaky_relu")


def layouts_of(dtype):
    # NumPy has no other byte order for the dtypes of ml_dtypes.
    return [name for name in LAYOUTS if name != "big_endian" or dtype != "bfloat16-float32"]


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (3, 37, 9, 11), (600, 5)], ids=str)
@pytest.mark.parametrize(
    ("dtypes", "layout"), [(dtypes, layout) for dtypes in list(DTYPES)[:4] for layout in layouts_of(dtypes)]
)
def test_layouts(rng, shape, dtypes, layout):
    """Each layout for x, dy and the residual, beside another one."""
    dtype, _ = DTYPES[dtypes]
    names = layouts_of(dtypes)
    following = [LAYOUTS[names[(names.index(layout) + i) % len(names)]] for i in range(3)]
    x, dy, residual = random_batch(rng, shape, dtype), *(random_array(rng, shape, dtype) for _ in "12")
    arrays = x, dy, residual = [change(a) for change, a in zip(following, (x, dy, residual), strict=True)]
    copies = [a.copy() for a in arrays]
    step(x, dy)
    step(x, dy, residual=residual, activation="relu")
    for a, copy in zip(arrays, copies, strict=True):
        assert_identical(a, copy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_channels_last(rng, layout):
    shape = (6, 4, 3, 5)
    x, dy = random_batch(rng, shape, channel_axis=-1), random_array(rng, shape)
    step(LAYOUTS[layout](x), dy, channel_axis=-1)
    step(x, LAYOUTS[layout](dy), channel_axis=-1)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "read_only"])
def test_layouts_of_out(rng, layout):
    shape = (6, 5, 4, 3)
    x, dy = random_batch(rng, shape), random_array(rng, shape)
    out = LAYOUTS[layout](np.full(shape, 7, "f4"))
    y, _ = step(x, dy, out=out)
    assert y is out


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "big_endian"])
def test_layouts_of_parameters(rng, layout):
    """weight and bias may be views as well, and the running statistics, which are written to."""
    x = random_batch(rng, (6, 5, 4))
    arrays = [*random_channels(rng, 5), np.zeros(5, "f4"), np.ones(5, "f4")]

    views = [LAYOUTS[layout](np.stack([a, a], 1))[:, 1] for a in arrays]
    if layout == "read_only":
        views[2:] = [a.copy() for a in arrays[2:]]
    expected, _ = sync_batch_norm(x, *arrays, process_group=ALONE)
    y, _ = sync_batch_norm(x, *views, process_group=ALONE)
    assert_identical(y, expected)
    for view, array in zip(views, arrays, strict=True):
        assert_identical(view, array)


def test_broadcast_gradient(rng):
    """Gradients of sums and means have strides of zero."""
    shape = (7, 5, 6)
    x = random_batch(rng, shape)
    for dy in np.float32(0.25), random_array(rng, (5, 1)), random_array(rng, (7, 1, 1)):
        step(x, np.broadcast_to(dy, shape), activation="relu")


def test_broadcast_input(rng):
    x = np.broadcast_to(random_batch(rng, (1, 5, 6)), (7, 5, 6))
    step(x, random_array(rng, x.shape))


def is_channels_last(array):
    return np.moveaxis(array, 1, -1).flags.c_contiguous


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 3), (6, 5, 4, 3, 2)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_memory_format_is_kept(rng, shape, dtypes):
    dtype, _ = DTYPES[dtypes]
    x, dy = random_batch(rng, shape, dtype), random_array(rng, shape, dtype)
    results = {}
    for x_layout in "contiguous", "channels_last":
        for dy_layout in "contiguous", "channels_last":
            y, saved = sync_batch_norm(LAYOUTS[x_layout](x), process_group=ALONE)
            dx = sync_batch_norm_backward(LAYOUTS[dy_layout](dy), saved).x
            for array in y, dx:
                assert is_channels_last(array) == (x_layout == "channels_last")
                assert array.flags.c_contiguous == (x_layout == "contiguous")
            results[x_layout, dy_layout] = y, dx
        # dy's format changes nothing but the speed.
        pairs = zip(results[x_layout, "contiguous"], results[x_layout, "channels_last"], strict=True)
        for a, b in pairs:
            assert_close(a, b.astype("f8"))


def test_channels_last_equals_channels_first(rng):
    """The argument and the strides say the same: the same bits come out."""
    x, dy = (random_array(rng, (6, 4, 3, 5)) for _ in "12")
    y, saved = sync_batch_norm(x, channels_last=True, process_group=ALONE)
    dx = sync_batch_norm_backward(dy, saved).x
    y_view, saved = sync_batch_norm(np.moveaxis(x, -1, 1), process_group=ALONE)
    dx_view = sync_batch_norm_backward(np.moveaxis(dy, -1, 1), saved).x
    assert_identical(np.moveaxis(y_view, 1, -1), y)
    assert_identical(np.moveaxis(dx_view, 1, -1), dx)


def variance(x, channel_axis=1):
    channels = x.shape[channel_axis]
    running_mean, running_var = np.zeros(channels, x.dtype), np.ones(channels, x.dtype)
    arrays = (None, None, running_mean, running_var)
    sync_batch_norm(x, *arrays, momentum=1.0, process_group=ALONE, channels_last=channel_axis == -1)
    count = x.size // channels
    return running_var.astype(np.float64) * (count - 1) / count


def wide(x):
    return np.float64 if x.dtype == np.float32 else np.longdouble


# Two million values a channel in the shapes that are summed in different ways.
MILLIONS = {
    "pixels": (2, 1, 1 << 20),
    "rows": (200, 1, 10240),
    "maps": (41000, 1, 49),
    "pairs": (1 << 20, 1, 2),
    "samples": (1 << 21, 1),
    "features": (1 << 21, 2),
}


@pytest.mark.parametrize("shape", MILLIONS)
@pytest.mark.parametrize("offset", [0, 1e2, 1e3, 1e4, -1e5])
def test_variance_at_offset(rng, shape, offset):
    x = rng.standard_normal(MILLIONS[shape], np.float32) + np.float32(offset)
    expected = np.var(x.astype(np.float64), axis=(0, *range(2, x.ndim)))
    assert relative_error(variance(x), expected) <= 1e-6


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
def test_variance_of_disturbed_data(rng, shape, offset, disturb):
    """No single value is a good shift for all of these."""
    x = rng.standard_normal(MILLIONS[shape], np.float32) + np.float32(offset)
    disturb(x)
    assert relative_error(variance(x), [np.var(x.astype(np.float64))]) <= 1e-6


# 127 and 509 are prime.
SMALL = [(512, 1, 3), (512, 3), (509, 31), (500, 10), (400, 31), (128, 63), (127, 128), (64, 10), (600, 5)]


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_variance_of_small_batches(rng, shape):
    """Beside an outlier all squares are rounded in one direction: long chains of float32 add that up."""
    for _ in range(50):
        x = np.full(shape, rng.uniform(0.1, 10), "f4")
        x[::2] *= -1
        x[0] = 10 ** rng.uniform(0, 3)
        expected = np.var(x.astype(np.float64), axis=(0, *range(2, x.ndim)))
        assert relative_error(variance(x), expected) <= 1e-6


@pytest.mark.parametrize("shape", [(400, 3, 50), (9000, 3), (2, 3, 70000)], ids=str)
@pytest.mark.parametrize("offset", [0, 1e5, -1e8])
def test_variance_at_offset_float64(rng, shape, offset):
    x = rng.normal(offset, 1, shape)
    expected = np.var(x.astype(np.longdouble), axis=(0, *range(2, x.ndim)))
    assert relative_error(variance(x), expected) <= 1e-12


def test_sum_of_opposite_pivots(rng):
    """What two ranks add up: the mean is zero, as is the sum of the pivots, but not the pivots."""
    x = random_array(rng, (50, 3, 7), offset=1e3)
    trailer = (0.0, 0.0, 0.0)
    sum_ = cpu_operations.statistics(x, trailer)[0] + cpu_operations.statistics(-x, trailer)[0]
    mean, m2, count = moments(sum_, 3)
    assert count == 700
    assert (mean == 0).all()
    assert relative_error(m2 / count, np.square(x.astype("f8")).mean(axis=(0, 2))) <= 1e-7


@pytest.mark.parametrize("dtype", ["float16", "bfloat16-float32"])
def test_variance_at_offset_16_bit(rng, dtype):
    """Where 16 bits have a few steps a deviation left."""
    dtype, _ = DTYPES.get(dtype) or (np.dtype(dtype), None)
    offset = 1000 if dtype == np.float16 else 100
    x = random_array(rng, (2000, 2, 64), dtype, offset=offset)
    running = np.zeros(2, "f4"), np.ones(2, "f4")
    sync_batch_norm(x, None, None, *running, momentum=1.0, process_group=ALONE)
    values = x.astype(np.float64)
    assert relative_error(running[0], np.mean(values, axis=(0, 2))) <= 1e-6
    assert relative_error(running[1], np.var(values, axis=(0, 2), ddof=1)) <= 1e-6


@pytest.mark.parametrize("scale", [1e-4, 60000 / 4])
def test_float16_beyond_its_squares(rng, scale):
    """Squares and sums of float16 data leave float16's range at once."""
    x = np.clip(random_array(rng, (64, 3, 49), "f8", scale=scale), -65504, 65504).astype("f2")
    step(x, random_array(rng, x.shape, "f2"), eps=1e-5)


def peak_of(function):
    """Return the most memory that a call takes when there is neither workspace nor an output to use again."""
    memory._free.clear()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        with ThreadPoolExecutor(1) as new_thread:  # workspace belongs to a thread
            new_thread.submit(function).result()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_released_outputs_are_used_again(rng):
    x = random_array(rng, (8, 64, 100))
    memory._free.clear()
    y, _ = sync_batch_norm(x, process_group=ALONE)
    expected, address = y.copy(), y.ctypes.data
    part = y[3:, ::2]
    del y, _
    z, _ = sync_batch_norm(x + 1, process_group=ALONE)
    assert not np.shares_memory(z, part)  # a view keeps the memory of the whole
    assert_identical(part, expected[3:, ::2])
    del part
    z, _ = sync_batch_norm(x, process_group=ALONE)
    assert z.ctypes.data == address
    for size in range(2, 20):
        sync_batch_norm(random_array(rng, (size, 64)), process_group=ALONE, out=None)
    assert len(memory._free) <= memory.KEPT_OUTPUTS


@sweep(
    ("shape", "layout", "dtypes"),
    [(64, 64, 28, 28), (8192, 512), (16, 1024, 7, 7, 4)],
    ["contiguous", "channels_last"],
    list(DTYPES)[:4],
)
def test_forward_needs_no_memory_but_the_output(rng, shape, layout, dtypes):
    dtype, parameter_dtype = DTYPES[dtypes]
    x = LAYOUTS[layout](random_array(rng, shape, dtype))
    arrays = (*random_channels(rng, shape[1], parameter_dtype), np.zeros(shape[1], parameter_dtype))
    arrays = (*arrays, np.ones(shape[1], parameter_dtype))

    def forward(activation=None, out=None):
        sync_batch_norm(x, *arrays, activation=activation, process_group=ALONE, out=out)

    out = np.empty_like(x)
    assert peak_of(forward) <= x.nbytes + MIB
    assert peak_of(lambda: forward(out=out)) <= MIB
    if dtype.itemsize > 2:  # 16-bit data need a box of float32 as well
        bits = x.size // 8  # of the activation
        assert peak_of(lambda: forward("relu")) <= x.nbytes + bits + MIB
        assert peak_of(lambda: forward("relu", out)) <= bits + MIB


@pytest.mark.parametrize("shape", [(64, 64, 28, 28), (8192, 512)], ids=str)
def test_backward_needs_no_memory_but_dx(rng, shape):
    x, dy = (random_array(rng, shape) for _ in "12")
    _, saved = sync_batch_norm(x, process_group=ALONE)
    sync_batch_norm_backward(dy, saved)
    assert peak_of(lambda: sync_batch_norm_backward(dy, saved)) <= x.nbytes + MIB


@pytest.mark.parametrize("shape", [(64, 64, 28, 28), (8192, 512), (70000, 3)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_bitwise_repeatability(rng, shape, dtypes):
    dtype, parameter_dtype = DTYPES[dtypes]
    x, dy = (random_array(rng, shape, dtype) for _ in "12")
    results = []
    for _ in range(2):
        running = np.zeros(shape[1], parameter_dtype), np.ones(shape[1], parameter_dtype)
        y, saved = sync_batch_norm(x, None, None, *running, process_group=ALONE)
        results.append([y, sync_batch_norm_backward(dy, saved).x, *running])
    for first, second in zip(*results, strict=True):
        assert_identical(second, first)


def test_threads(rng):
    """Scratch memory is each thread's own."""
    batches = [random_array(rng, (64, 32, 14, 14)) for _ in range(4)]

    def train(x):
        y, saved = sync_batch_norm(x, activation="relu", process_group=ALONE)
        return y, sync_batch_norm_backward(x, saved).x

    expected = [train(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(train, batches * 3))
    for results, pair in zip(actual, expected * 3, strict=True):
        for a, b in zip(results, pair, strict=True):
            assert_identical(a, b)


def test_alignment_does_not_change_the_bits(rng):
    x = random_array(rng, (50, 7, 33))
    expected, _ = sync_batch_norm(x, process_group=ALONE)
    y, _ = sync_batch_norm(LAYOUTS["misaligned"](x), process_group=ALONE)
    assert_identical(y, expected)


def test_scratch_memory_keeps_nothing_of_earlier_calls(rng):
    """Buffers are used again: a NaN of an earlier, larger call must not reach a smaller one."""
    small = random_array(rng, (3, 5, 4))
    expected, _ = sync_batch_norm(small, process_group=ALONE)
    sync_batch_norm(np.full((40, 50, 60), np.nan, "f4"), process_group=ALONE)
    y, _ = sync_batch_norm(small, process_group=ALONE)
    assert_identical(y, expected)
