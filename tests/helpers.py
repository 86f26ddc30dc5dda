"""What several test modules share: the world, splits of a batch, memory layouts, comparisons."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
from mpi4py import MPI

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

# What each rank gets of a batch, repeated to any world size.
SPLITS = {"even": (1,), "uneven": (5, 1, 2, 4), "empty": (3, 0, 5, 1), "first_empty": (0, 2)}

SHAPES = {"2d": (18, 5), "3d": (18, 3, 7), "4d": (18, 4, 3, 5), "5d": (18, 2, 3, 2, 3)}

# Relative to the largest magnitude of the array.
TOLERANCE = {np.dtype("float32"): 1e-6, np.dtype("float64"): 1e-12}
TORCH_TOLERANCE = {np.dtype("float32"): 3e-6, np.dtype("float64"): 1e-11}


REPOSITORY = Path(__file__).parents[1]


def clean_environment(**variables):
    """Return the environment without what an MPI launcher or MPI_Init added to it, for a child process."""
    launchers = ("OMPI_COMM_", "OMPI_MCA_ess", "PMI_", "PMIX_", "PRTE_", "MV2_COMM_", "PALS_", "HYDI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return kept | variables


class World:
    """MPI.COMM_WORLD: all the ranks that run the tests together, or this process alone."""

    def __init__(self):
        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size

    def part(self, n, split="even"):
        """Return the slice of n samples that belongs to this rank."""
        pattern = SPLITS[split]
        shares = [pattern[rank % len(pattern)] for rank in range(self.size)]
        if not sum(shares):
            shares = [1]
        ends = np.rint(n * np.cumsum([0, *shares]) / sum(shares)).astype(int)
        return slice(*ends[self.rank : self.rank + 2])

    def sum(self, array):
        return self.comm.allreduce(np.asarray(array).astype(np.float64))

    def assert_same(self, *arrays):
        """Check that every rank has bit-identical arrays."""
        everyones = self.comm.allgather([(array.dtype.str, array.shape, array.tobytes()) for array in arrays])
        assert all(ranks == everyones[0] for ranks in everyones)


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


def randomize(layer, reference, rng):
    """Give a layer and its reference the same random weight and bias."""
    if layer.weight is None:
        return
    weight, bias = random_channels(rng, layer.weight.data.size, layer.weight.data.dtype)
    layer.weight.data[...], layer.bias.data[...] = weight, bias
    reference.weight, reference.bias = weight.astype(reference.dtype), bias.astype(reference.dtype)


def relative_error(actual, expected, scale=None):
    """Return the largest deviation, relative to `scale`, by default the largest magnitude expected."""
    expected = np.asarray(expected)
    expected = expected.astype(np.promote_types(expected.dtype, np.float64))
    actual = np.asarray(actual).astype(expected.dtype)
    assert actual.shape == expected.shape
    if not actual.size:
        return 0.0
    scale = np.max(np.abs(expected)) if scale is None else scale
    error = np.max(np.abs(actual - expected))
    return float(error / scale) if scale else float(error)


def assert_close(actual, expected, part=..., *, tolerance=None):
    """Check an array, or this rank's part of it, against the whole one expected.

    16-bit types must be within one step of the expected value rounded once, except near zero, where what
    float32 arithmetic cancels is more than a step.
    """
    actual, whole = np.asarray(actual), np.asarray(expected)
    expected = whole[part]
    assert actual.shape == expected.shape
    scale = np.max(np.abs(whole.astype(np.float64))) if whole.size else 0.0
    if actual.dtype.itemsize == 2 and tolerance is None:
        steps = np.abs(_ordinal(actual) - _ordinal(expected.astype(actual.dtype)))
        error = np.abs(actual.astype(np.float64) - expected)
        wrong = (steps > 1) & ~(error <= TOLERANCE[np.dtype("float32")] * scale)
        assert not wrong.any(), f"{wrong.sum()} of {wrong.size} values are {steps.max()} steps off"
    else:
        native = actual.dtype.newbyteorder("=")
        tolerance = TOLERANCE[native] if tolerance is None else tolerance
        error = relative_error(actual, expected, scale)
        assert error <= tolerance


def _ordinal(array):
    """Number the values of a 16-bit floating-point type in their order."""
    bits = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def snapshot(layer):
    """Return copies of all that a call may change."""
    arrays = {name: array.copy() for name, array in layer.state_dict().items()}
    grads = {f"{name}.grad": p.grad for name, p in layer.named_parameters()}
    return arrays | {name: None if grad is None else grad.copy() for name, grad in grads.items()}


def assert_unchanged(layer, before):
    after = snapshot(layer)
    assert after.keys() == before.keys()
    for name, array in before.items():
        assert_identical(after[name], array)


def assert_identical(actual, expected):
    """Check for the same bits; None equals None."""
    assert (actual is None) == (expected is None)
    if expected is not None:
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.tobytes() == expected.tobytes()


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
