"""Conversions of float16 agree with NumPy's, bit for bit."""

import numpy as np
import pytest

from cupy_syncbn.backends.cpu import numpy_float16

pytestmark = pytest.mark.mpi_skip

EVERY_FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def assert_same_bits(actual, expected):
    """NaN may have other bits."""
    integer = f"u{expected.dtype.itemsize}"
    differ = actual.view(integer) != expected.view(integer)
    assert not (differ & ~(np.isnan(actual) & np.isnan(expected))).any()


def test_load():
    values = np.empty(EVERY_FLOAT16.shape, np.float32)
    numpy_float16.load(EVERY_FLOAT16, values)
    assert_same_bits(values, EVERY_FLOAT16.astype(np.float32))


def float32_of(kind, rng):
    if kind == "any bits":
        return rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint32).view(np.float32)
    # Each float16 and each midpoint of two, and the float32 next to them
    neighbours = EVERY_FLOAT16[np.isfinite(EVERY_FLOAT16)].astype(np.float64)
    neighbours = np.unique(np.append(neighbours, [65536.0, -65536.0]))  # what rounds to infinity
    midpoints = (neighbours[1:] + neighbours[:-1]) / 2
    exact = np.concatenate([neighbours, midpoints, [-0.0, np.inf, -np.inf]]).astype(np.float32)
    return np.concatenate([exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, exact * 2)])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("kind", ["any bits", "ties and their neighbours"])
def test_store(rng, kind):
    with np.errstate(all="ignore"):
        values = float32_of(kind, rng)
        result = np.empty(values.shape, np.float16)
        numpy_float16.store(values, result)
        assert_same_bits(result, values.astype(np.float16))


def test_store_in_place_of_a_strided_array(rng):
    values = rng.normal(0, 1e-5, (3, 20_000)).astype(np.float32)
    memory = np.ones((20_000, 6), np.float16)
    numpy_float16.store(values, memory.T[::2])
    assert_same_bits(memory.T[::2], values.astype(np.float16))
    assert (memory.T[1::2] == 1).all()
