"""What the arrays of tests are of: types, shapes, memory layouts, random values."""

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# id: (dtype of x, dtype of the parameters)
DTYPES = {
    "float64": (np.dtype("float64"), np.dtype("float64")),
    "float32": (np.dtype("float32"), np.dtype("float32")),
    "float16-float32": (np.dtype("float16"), np.dtype("float32")),
    "bfloat16-float32": (BFLOAT16, np.dtype("float32")),
    "float16": (np.dtype("float16"), np.dtype("float16")),
    "bfloat16": (BFLOAT16, BFLOAT16),
}

SHAPES = {"2d": (18, 5), "3d": (18, 3, 7), "4d": (18, 4, 3, 5), "5d": (18, 2, 3, 2, 3)}


def random_array(rng, shape, dtype="float32", *, offset=0.0, scale=1.0):
    return (offset + scale * rng.normal(size=shape)).astype(dtype)


def random_channels(rng, channels, dtype="float32"):
    """Return a weight of both signs and a bias."""
    weight = rng.uniform(0.5, 1.5, channels) * rng.choice([-1, 1], channels)
    return weight.astype(dtype), rng.normal(size=channels).astype(dtype)


def random_batch(rng, shape, dtype="float32", channel_axis=1):
    """Return values whose channels differ in mean and deviation."""
    per_channel = [1] * len(shape)
    per_channel[channel_axis] = shape[channel_axis]
    offset, scale = rng.normal(0, 2, per_channel), rng.uniform(0.3, 3, per_channel)
    return random_array(rng, shape, dtype, offset=offset, scale=scale)


def on_host(array):
    return array if isinstance(array, np.ndarray) else array.get()


def randomize(layer, reference, rng):
    """Give a layer and its reference the same random weight and bias."""
    if layer.weight is None:
        return
    weight, bias = random_channels(rng, layer.weight.data.size, layer.weight.data.dtype)
    layer.weight.data[...], layer.bias.data[...] = weight, bias
    reference.weight, reference.bias = weight.astype(reference.dtype), bias.astype(reference.dtype)


def _channels_last(a):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)


def _sliced(a):
    larger = np.full([2 * n + 1 for n in a.shape], 77, a.dtype)
    view = larger[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def _transposed(a):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, -1)), -1, 0)


def _misaligned(a):
    view = np.ndarray(a.shape, a.dtype, buffer=bytearray(a.nbytes + 1), offset=1)
    view[...] = a
    return view


def _read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


# name: a function that returns an equal array of another memory layout
LAYOUTS = {
    "contiguous": np.ascontiguousarray,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "transposed": _transposed,
    "negative": lambda a: np.flip(np.flip(a).copy()),
    "fortran": lambda a: a.copy(order="F"),
    "misaligned": _misaligned,
    "read_only": _read_only,
    "big_endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
}
