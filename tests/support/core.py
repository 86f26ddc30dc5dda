"""Drawn steps by the compiled core and by the specification, in memory where stray accesses show."""

import ctypes
import mmap
from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn.backends.cpu import specification
from cupy_syncbn.backends.interface import Affine, BatchSums, Epilogue, ParameterSums, Running
from cupy_syncbn.backends.vector import moments, round_to_12_bits
from support.arrays import BFLOAT16

TRAILER = (1.0, 2.0, 3.0)
TYPES = {
    "float16": np.dtype("f2"),
    "bfloat16": BFLOAT16,
    "float32": np.dtype("f4"),
    "float64": np.dtype("f8"),
}
STREAMED = 16 << 20
"""Bytes of an output from which on it is written past the caches."""

# ---- Memory ----

PAGE = mmap.PAGESIZE
CANARY = 0x5A
PLACES = ("anywhere", "at the end", "at the beginning")


class Memory:
    """Memory for arrays: with canaries around each, or beside pages that nobody may touch, by `place`."""

    def __init__(self, place="anywhere", shift=0):
        self._place, self._shift = place, shift
        self._around = []

    def empty(self, shape, dtype):
        """Return a contiguous array: `shift` elements behind a cache line, or beside a forbidden page."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        inner = -(-size // PAGE) * PAGE
        if self._place == "anywhere":
            buffer = np.full(inner + 3 * PAGE, CANARY, np.uint8)
            start = -buffer.ctypes.data % PAGE + PAGE // 2 + self._shift * dtype.itemsize
        else:
            pages = mmap.mmap(-1, inner + 2 * PAGE)
            buffer = np.frombuffer(pages, np.uint8)
            for page in 0, inner + PAGE:
                _forbid(buffer.ctypes.data + page)
            buffer = buffer[PAGE : PAGE + inner]
            buffer[:] = CANARY
            start = inner - size if self._place == "at the end" else 0
        self._around.append((buffer[:start], buffer[start + size :]))
        return buffer[start : start + size].view(dtype).reshape(shape)

    def put(self, array):
        """Return a copy of an array; None stays None."""
        if array is None:
            return None
        copy = self.empty(array.shape, array.dtype)
        copy[...] = array
        return copy

    def check(self):
        """Check that nobody has written beside the arrays."""
        for before, behind in self._around:
            assert (before == CANARY).all(), "something was written before an array"
            assert (behind == CANARY).all(), "something was written behind an array"


def _forbid(address):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")


# ---- Cases ----


class Case(NamedTuple):
    """What is drawn."""

    dtype: str
    shape: tuple[int, int, int]
    slope: float | None = None
    residual: bool = False
    training: bool = True
    offset: float = 0.0
    scale: float = 1.0
    special: bool = False
    parameters: str | None = "same"
    """The type of parameters and running statistics: "same" or "wide"; None for no weight and bias."""
    momentum: float | None = 0.1
    place: str = PLACES[0]
    shift: int = 0
    seed: int = 0
    inplace: bool = False
    """Whether the backward gets y, and writes dx over dy."""


def draw_case(seed, dtype=None, most=300_000):
    """Draw a case of at most so many elements."""
    rng = np.random.default_rng([14, seed])
    dtype = dtype or rng.choice(list(TYPES))
    N = int(
        rng.choice(
            [0, rng.integers(1, 9), rng.integers(1, 40), rng.integers(1, 1000)], p=[0.02, 0.2, 0.6, 0.18]
        )
    )
    C = int(rng.choice([1, 2, 3, 5, 7, 8, 16, 31, 64, 100, 129, 300, 1500, rng.integers(1, 3000)]))
    sizes = [1, rng.integers(2, 32), rng.integers(32, 1100), rng.integers(1000, 5000), 0]
    S = int(rng.choice(sizes, p=[0.35, 0.25, 0.3, 0.09, 0.01]))
    while most < N * C * S:
        N, C = (max(1, N // 2), C) if rng.random() < 0.5 else (N, max(1, C // 2))
        S = S if N * C > 1 else most
    offset = float(rng.choice([0, 0, 1, -3, 100, 1e4]))
    case = Case(
        dtype=str(dtype),
        shape=(N, C, S),
        slope=[None, 0.0, 0.01, 0.3, -0.5][rng.integers(5)],
        residual=bool(rng.random() < 0.5),
        training=bool(rng.random() < 0.75),
        offset=min(offset, 100.0) if dtype in ("float16", "bfloat16") else offset,
        scale=float(rng.choice([1, 1, 1e-3, 30, 1e-6])),
        special=bool(rng.random() < 0.2),
        parameters=[None, "same", "wide"][rng.integers(3)],
        momentum=[None, 0.1, 1.0, 0.0][rng.integers(4)],
        place=str(rng.choice(PLACES)),
        shift=int(rng.integers(64)),
        seed=seed,
    )  # fmt: skip
    can_be = not case.residual and case.slope in (None, 0.01, 0.3)
    return case._replace(inplace=bool(can_be and rng.random() < 0.5))


SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 6e-8, 65504.0, 65520.0, 3.4e38)


class Inputs(NamedTuple):
    """The arrays of a case."""

    x: Any
    dy: Any
    residual: Any
    weight: Any
    bias: Any
    mean: Any
    var: Any


@np.errstate(all="ignore")
def inputs_of(case):
    """Draw the arrays of a case."""
    rng = np.random.default_rng([15, case.seed])
    dtype, C = TYPES[case.dtype], case.shape[1]

    def tensor(offset=0.0, scale=1.0):
        values = (rng.standard_normal(case.shape) * scale + offset).astype(dtype)
        if case.special and values.size and rng.random() < 0.7:
            values.reshape(-1)[rng.integers(0, values.size, 3)] = rng.choice(SPECIAL, 3).astype(dtype)
        return values

    x, dy, residual = tensor(case.offset, case.scale), tensor(), tensor() if case.residual else None
    wide = np.dtype("f8" if dtype.itemsize == 8 else "f4")
    of_channels = wide if case.parameters == "wide" else dtype
    weight, bias, mean, var = (
        a.astype(of_channels) for a in (*(rng.standard_normal(C) for _ in range(3)), rng.uniform(0.5, 2, C))
    )
    if case.inplace:
        weight[::7] *= 1e-6  # closer to zero than is used
    if case.parameters is None:
        weight = bias = None
    return Inputs(x, dy, residual, weight, bias, mean, var)


# ---- Steps ----


@np.errstate(all="ignore")
def compute(operations, case, inputs, given=None):
    """Return the results of a step by their names.

    What ranks would add up is taken from `given`, the results of another implementation, if there are any.
    """
    memory = Memory(case.place, case.shift)
    x, dy, residual, weight, bias, *buffers = (memory.put(array) for array in inputs)
    mean, var = buffers
    before = [None if a is None else a.copy() for a in (x, dy, residual, weight, bias)]
    vector, local = operations.statistics(x, TRAILER)
    results = {"vector": vector}
    batch = None
    if case.training:
        of_ranks, squares = (given or results)["vector"].copy(), None
        if x.dtype.itemsize == 8:
            results["squares"] = operations.centered_squares(local, of_ranks, TRAILER, 0)
            squares = (given or results)["squares"].copy()
        batch = BatchSums(of_ranks, squares)
    tracked = np.array(case.seed % 9)
    running = Running(mean, var, tracked, case.momentum)
    affine, epilogue = Affine(weight, bias, 1e-5), Epilogue(residual, case.slope, case.inplace)

    y = memory.empty(x.shape, x.dtype)
    normalization, writes = operations.normalize(x, y, batch, running, affine, epilogue)
    same = memory.put(x)
    operations.normalize(same, same, batch, running, affine, epilogue)
    results |= {"y": y, "y over x": same}
    for write in writes:
        write()
    results |= {"running_mean": mean, "running_var": var, "num_batches_tracked": tracked}

    dresidual = memory.empty(x.shape, x.dtype) if case.residual else None
    kept, given_dy = (same, memory.put(dy)) if case.inplace else (x, dy)
    sums, own, gradient = operations.reduce_gradients(given_dy, kept, normalization, dresidual, TRAILER)
    assert own.tobytes() == sums[: own.size].tobytes()
    results["sums"] = sums
    if dresidual is not None:
        results["dresidual"] = dresidual
    of_ranks = (given or results)["sums"].copy()
    types = (None, None) if weight is None else (weight.dtype, bias.dtype)
    dx = given_dy if case.inplace else memory.empty(x.shape, x.dtype)
    dweight, dbias = operations.input_gradient(
        gradient,
        kept,
        normalization,
        dx,
        of_ranks if case.training else None,
        ParameterSums(of_ranks, 1 / 3, *types),
        0,
    )  # fmt: skip
    results |= {"dx": dx} | ({} if weight is None else {"dweight": dweight, "dbias": dbias})
    memory.check()
    for array, copy in zip((x, dy, residual, weight, bias), before, strict=True):
        assert array is None or array.tobytes() == copy.tobytes(), "an input was written to"
    return results


def check_case(core, case, **changes):
    """Compare a step by the core with one by the specification, which gives the sums.

    `changes` are arrays in place of those that are drawn.
    """
    inputs = inputs_of(case)._replace(**changes)
    expected = compute(specification, case, inputs)
    actual = compute(core, case, inputs, given=expected)
    assert actual.keys() == expected.keys(), case
    for name, array in expected.items():
        if name not in ("vector", "squares", "sums"):
            assert_same_bits(actual[name], array, name, case)
    check_sums(actual, expected, case, inputs)


def assert_same_bits(actual, expected, name, case):
    """Check for the same bits, of NaN as well as NaN has any."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), (name, case)
    kind = f"u{actual.dtype.itemsize}"
    if actual.tobytes() == expected.tobytes():
        return
    both = actual.astype("f8"), expected.astype("f8")
    same = np.ascontiguousarray(actual).view(kind) == np.ascontiguousarray(expected).view(kind)
    wrong = ~(same | (np.isnan(both[0]) & np.isnan(both[1])))
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        message = f"{name}: {wrong.sum()} of {wrong.size} differ, {at} is {both[0][at]} for {both[1][at]}"
        raise AssertionError(f"{message}, of {case}")


@np.errstate(all="ignore")
def check_sums(actual, expected, case, inputs):
    """Compare what ranks would add up: to the accuracy that is promised, and for what is not finite."""
    N, C, S = case.shape
    for name in ("vector", "squares", "sums"):
        if name in expected:
            assert actual[name].shape == expected[name].shape, (name, case)
            np.testing.assert_array_equal(actual[name][-3:], TRAILER)
    is_double = case.dtype == "float64"
    pivot = actual["vector"][:C] / max(N * S, 1)
    np.testing.assert_array_equal(pivot, round_to_12_bits(pivot), f"a pivot has more than 12 bits, of {case}")
    np.testing.assert_array_equal(actual["vector"][C : 2 * C], N * S * pivot * pivot)
    (mean, m2, count), (mean2, m22, count2) = (moments(r["vector"], C) for r in (actual, expected))
    assert count == count2 == N * S
    if not N * S:
        return
    deviation = np.sqrt(np.abs(m22) / count)
    allowed = (1e-13 if is_double else 1e-6) * deviation + 1e-9 * np.abs(mean2)
    assert_within(mean, mean2, allowed, "mean", case)
    variance = (1e-12 if is_double else 1e-6) * np.abs(m22) + 1e-15 * count * mean2**2
    assert_within(m2, m22, variance, "variance", case)
    if "squares" in expected:
        assert_within(actual["squares"][:C], expected["squares"][:C], variance, "squares", case)
    x, dy = inputs.x.astype("f8"), np.abs(inputs.dy.astype("f8"))
    center = inputs.mean.astype("f8") if not case.training else mean2
    if case.inplace:  # of what the activation had
        x = expected["y"].astype("f8")
        x = x if case.slope is None else np.where(x > 0, x, x / case.slope)
        center = np.zeros(C) if inputs.bias is None else inputs.bias.astype("f8")
    of_dy = dy.sum(axis=(0, 2))
    of_products = (dy * np.abs(x - center[:, None])).sum(axis=(0, 2)) + 1e-7 * np.abs(center) * of_dy
    step = 1e-12 if is_double else 1e-6
    sums = [results["sums"][: 2 * C].reshape(2, C) for results in (actual, expected)]
    assert_within(sums[0][0], sums[1][0], step * of_dy, "sum_dy", case)
    assert_within(sums[0][1], sums[1][1], step * of_products, "sum_dy_xmu", case)


def assert_within(actual, expected, most, name, case):
    is_finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(actual), is_finite, f"{name} of {case}")
    most = np.where(np.isfinite(most), most, 1e-6 * np.abs(expected))  # of what a ReLU blocks, say
    wrong = is_finite & ~(np.abs(actual - expected) <= most + 1e-300)
    if wrong.any():
        c = int(np.argmax(wrong))
        raise AssertionError(f"{name}[{c}] is {actual[c]}, not {expected[c]} within {most[c]}, of {case}")
