"""NumPy arrays of any memory layout through the public functions."""

import numpy as np
import pytest

from cupy_syncbn import SingleProcessGroup, sync_batch_norm, sync_batch_norm_backward
from support.arrays import DTYPES, LAYOUTS, random_array, random_batch, random_channels
from support.compare import assert_close, assert_identical
from support.reference import BatchNorm

pytestmark = pytest.mark.mpi_skip

ALONE = SingleProcessGroup()


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
