"""Comparisons: of arrays within a tolerance or by bits, of a layer with what it was before."""

import ml_dtypes
import numpy as np

# Relative to the largest magnitude of the array.
TOLERANCE = {np.dtype("float32"): 1e-6, np.dtype("float64"): 1e-12}
IN_PLACE_TOLERANCE = TOLERANCE | {np.dtype("float16"): 2.0**-9, np.dtype(ml_dtypes.bfloat16): 2.0**-6}
"""Of the gradients of a normalization in place, where 16-bit x has the precision of y: four units of it."""
TORCH_TOLERANCE = {np.dtype("float32"): 3e-6, np.dtype("float64"): 1e-11}


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
        bits = [np.frombuffer(each.tobytes(), np.uint8) for each in (actual, expected)]
        different = np.unique(np.flatnonzero(bits[0] != bits[1]) // actual.dtype.itemsize)
        assert not different.size, f"{different.size} of {actual.size} differ, the first at {different[0]}"
