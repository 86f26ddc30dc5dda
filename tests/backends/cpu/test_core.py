"""The compiled core: against the specification, itself at other levels, the CUDA kernels, and wrong calls."""

import contextlib
import functools
import gc
import itertools
import sys
import threading
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cupy_syncbn.backends.cpu import loading, specification
from cupy_syncbn.backends.interface import Affine, BatchSums, Epilogue, ParameterSums, Running
from cupy_syncbn.backends.vector import moments
from support.cases import sweep
from support.compare import assert_identical
from support.core import (
    STREAMED,
    TRAILER,
    TYPES,
    Case,
    Memory,
    assert_same_bits,
    check_case,
    compute,
    draw_case,
    inputs_of,
)

pytestmark = pytest.mark.mpi_skip

if loading.choice().core is None:
    pytest.skip(f"the compiled core {loading.choice().why_none}", allow_module_level=True)

from cupy_syncbn.backends.cpu import _core, native  # noqa: E402

# ---- Against the specification ----

FUZZ = 240


@pytest.mark.parametrize("dtype", TYPES)
def test_drawn_cases(dtype):
    for seed in range(FUZZ // len(TYPES)):
        check_case(native, draw_case(seed, dtype))


@pytest.mark.long
@pytest.mark.parametrize("part", range(8))
def test_more_drawn_cases(part):
    for seed in range(1000 * (part + 1), 1000 * (part + 2)):
        check_case(native, draw_case(seed, most=2_000_000 if seed % 50 == 0 else 300_000))


def elements_streamed(dtype):
    return STREAMED // TYPES[dtype].itemsize


# Outputs that go past the caches, in the walks there are. C and S for a batch of the size n.
LARGE = {
    "rows of odd length": (3, 1037),
    "rows of whole lines": (4, 1024),
    "short rows": (7, 33),
    "small maps": (5, 7),
    "narrow": (3, 1),
    "a tile": (512, 1),
    "beyond a tile": (2049, 1),
}


@sweep(("dtype", "walk", "slope", "residual", "shift"), TYPES, LARGE, [None, 0.0, 0.3], [False, True], [0, 5])
def test_large_outputs(dtype, walk, slope, residual, shift):
    C, S = LARGE[walk]
    shape = (elements_streamed(dtype) // (C * S) + 1, C, S)
    check_case(native, Case(dtype, shape, slope, residual, shift=shift, place="anywhere"))


@sweep(
    ("dtype", "C", "S", "N", "place"),
    TYPES,
    [1, 2, 3, 7, 1023, 1025],
    [1, 2, 7, 31, 32, 33, 40],
    [1, 2, 3, 4, 5, 33, 70],
    ["at the end", "at the beginning"],
)
def test_edges_of_memory(dtype, C, S, N, place):
    """Around the limits of the walks; a stray access ends the process."""
    case = Case(dtype, (N, C, S), 0.0, True, parameters="wide", place=place)
    check_case(native, case)
    check_case(native, case._replace(slope=0.3, residual=False, training=False))


@sweep(("dtype", "place"), TYPES, ["at the end", "at the beginning"])
def test_tiny_tensors(dtype, place):
    """Shorter than a vector or a little longer, whole or as the rest of narrow rows."""
    shapes = [*itertools.product(range(1, 6), (1, 2, 3), (1, 2, 3))]
    shapes += [(N, C, 1) for C in (3, 11) for N in range(88, 97)]
    for shape in shapes:
        case = Case(dtype, shape, 0.0, True, place=place)
        check_case(native, case)
        check_case(native, case._replace(slope=0.3, residual=False))


@sweep(
    ("dtype", "shape", "place"),
    TYPES,
    [(2, 3, S) for S in (511, 513, 516, 519, 520, 1023, 1025, 1031)]
    + [(21, C, 1) for C in (64, 513, 517, 1029, 2050)],
    ["anywhere", "at the end", "at the beginning"],
)
def test_edges_of_pieces(dtype, shape, place):
    """Rows and columns a little longer than their pieces; 64 columns go by four rows in any type."""
    for slope, residual in itertools.product((None, 0.0, 0.3), (False, True)):
        check_case(native, Case(dtype, shape, slope, residual, place=place))


# ---- Values that rounding, signs or overflow depend on ----


@pytest.mark.parametrize("shape", [(1, 2, 200_000), (200_000, 3, 1), (40_000, 5, 7), (3000, 601, 1)], ids=str)
def test_sums_of_what_rounds_one_way(shape):
    """A chain of hundreds in float32 would lose what each value has beyond 1, and what its square has."""
    one = np.float32(1 + 2.0**-16 - 2.0**-23)
    sign = np.where(np.arange(np.prod(shape)) % 2, np.float32(1), np.float32(-1)).reshape(shape)
    check_case(native, Case("float32", shape), x=sign * one, dy=np.full(shape, one))


ZERO_SHAPES = [(3, 5, 37), (9, 64, 1), (30, 3, 1), (5, 40, 3)]


@sweep(("dtype", "slope", "residual", "shape"), TYPES, [None, 0.0, 0.3, -0.5], [False, True], ZERO_SHAPES)
def test_zeros_before_the_activation(dtype, slope, residual, shape):
    """Zeros of both signs, and NaN, with running statistics that leave them as they are."""
    rng, C = np.random.default_rng(7), shape[1]
    x, added = (rng.choice([-1, -0.0, 0, 0, 1, np.nan], shape).astype(TYPES[dtype]) for _ in "12")
    changes = {"mean": np.zeros(C, "f4"), "var": np.ones(C, "f4")}
    case = Case(dtype, shape, slope, residual, training=False, parameters=None)
    check_case(native, case, x=x, **changes, **({"residual": added} if residual else {}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", ZERO_SHAPES, ids=str)
def test_squares_beyond_float32(dtype, shape):
    check_case(native, Case(dtype, shape, 0.3, scale=1e25))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("slope", [None, 0.3])
@pytest.mark.parametrize("shape", ZERO_SHAPES, ids=str)
def test_products_beyond_float32(dtype, slope, shape):
    """In place: of gradients with what the activation had."""
    case = Case(dtype, shape, slope, inplace=True)
    inputs = inputs_of(case)
    weight, dy = inputs.weight * np.float32(1e18), inputs.dy * np.float32(1e25)
    check_case(native, case, weight=weight.astype(inputs.x.dtype), dy=dy.astype(inputs.x.dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(40, 3, 49), (40, 9, 1), (9, 64, 2)], ids=str)
def test_a_guess_of_the_pivot_that_is_far_off(dtype, shape):
    """The values that it is made of are zeros, as of padding, and all others are far from zero."""
    N, _, S = shape
    x = inputs_of(Case(dtype, shape, offset=100.0, scale=0.5)).x.copy()
    if S == 1:
        x[:: N // 8] = 0
    else:
        x[0, :, :4] = x[-1, :, S // 2 : S // 2 + 4] = 0
    check_case(native, Case(dtype, shape), x=x)


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
@pytest.mark.parametrize("dtype", TYPES)
def test_running_statistics_that_are_not_finite(dtype, momentum):
    """Of the batch, those before it, or both: a momentum of one forgets what was."""
    case = Case(dtype, (6, 8, 5), momentum=momentum, parameters="wide")
    inputs = inputs_of(case)
    inputs.mean[:4], inputs.var[:4] = [np.nan, np.inf, -np.inf, 1], [1, np.inf, np.nan, np.inf]
    inputs.x[2, 3:7, 1] = [np.nan, np.inf, -np.inf, np.nan]
    check_case(native, case, x=inputs.x, mean=inputs.mean, var=inputs.var)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x7FC00000], ids=hex)
def test_parameters_that_are_nan(dtype, bits):
    """Whatever the bits of a NaN are, those of its shorter type are a NaN's."""
    for case in Case(dtype, (6, 8, 5), parameters="wide"), Case(dtype, (40, 9, 1), 0.1, parameters="wide"):
        inputs = inputs_of(case)
        if inputs.weight.dtype.itemsize == 4:
            inputs.weight.view("u4")[::2] = inputs.bias.view("u4")[1::3] = bits
        else:
            inputs.weight.view("u8")[::2] = inputs.bias.view("u8")[1::3] = bits << 32 | 0xFFFFFFFF
        check_case(native, case, weight=inputs.weight, bias=inputs.bias)


# ---- Views of the arrays of channels ----


@sweep(("dtype", "layout"), TYPES, ["strided", "reversed", "misaligned", "swapped"])
def test_views_of_channels(dtype, layout):
    """Parameters and running statistics may lie in memory as they like, and get the same bits."""
    if layout == "swapped" and dtype == "bfloat16":
        pytest.skip("NumPy has no other byte order for the types of ml_dtypes")
    case = Case(dtype, (6, 37, 5), seed=3)

    def view_of(a):
        if layout == "strided":
            return np.stack([a, a, a], 1)[:, 1]
        if layout == "reversed":
            return a[::-1].copy()[::-1]
        if layout == "swapped":
            return a.astype(a.dtype.newbyteorder())
        view = np.ndarray(a.shape, a.dtype, bytearray(a.nbytes + 1), 1)
        view[...] = a
        return view

    inputs = inputs_of(case)
    results = []
    for change in np.array, view_of:
        weight, bias, mean, var = map(change, inputs[3:])
        batch = BatchSums(native.statistics(inputs.x, TRAILER)[0])
        y = np.empty_like(inputs.x)
        running = Running(mean, var, None, 0.1)
        _, writes = native.normalize(inputs.x, y, batch, running, Affine(weight, bias), Epilogue())
        for write in writes:
            write()
        results.append((y, *(a.astype(inputs.x.dtype) for a in (mean, var))))
    for actual, expected in zip(*results, strict=True):
        assert_identical(actual, expected)


# ---- Instruction sets ----


@pytest.fixture
def use():
    """Return `_core.use`, and go back afterwards to the level that was."""
    yield _core.use
    chosen, levels = loading.choice().isa, _core.levels()
    usual = [level for level in loading.TAKEN_UNASKED if levels.get(level)][-1]
    _core.use(usual if chosen == "numpy" else chosen)


@pytest.mark.parametrize("level", [level for level in loading.LEVELS if level != "baseline"])
def test_levels_give_the_same_bits(use, level):
    levels = _core.levels()
    assert levels["baseline"]
    if not levels.get(level):
        pytest.skip(f"{level} " + ("cannot run on this processor" if level in levels else "was not compiled"))
    cases = [draw_case(seed) for seed in range(60)]
    cases += [Case(dtype, (40, 260, 33), 0.0, True) for dtype in TYPES]
    for dtype in TYPES:
        cases += [Case(dtype, (elements_streamed(dtype) // 7259 + 1, 7, 1037), 0.3, True, shift=3)]
    for case in cases:
        inputs = inputs_of(case)
        use("baseline")
        expected = compute(native, case, inputs)
        use(level)
        for name, array in compute(native, case, inputs).items():
            assert_same_bits(array, expected[name], f"{name} at {level}", case)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_16_bits_at_every_level(use, dtype):
    """What is loaded, scaled by a power of two and stored: as NumPy rounds it."""
    if TYPES[dtype].itemsize != 2:
        pytest.skip("of 16 bits there are few enough")
    x = np.arange(1 << 16, dtype=np.uint16).view(TYPES[dtype]).reshape(1, 1, -1)
    for level in [level for level, runs in _core.levels().items() if runs]:
        use(level)
        for var in 1.0, 2.0**-20, 2.0**4, 2.0**24, 3.0:
            running = Running(np.zeros(1), np.full(1, var))
            results = []
            for operations in native, specification:
                y = np.empty_like(x)
                with np.errstate(all="ignore"):
                    operations.normalize(x, y, None, running, Affine(None, None, 0.0), Epilogue())
                results.append(y)
            assert_same_bits(*results, f"y at {level}", var)


def test_use_refuses_other_levels():
    with pytest.raises(ValueError, match="levels"):
        _core.use("v9")
    for level, runs in _core.levels().items():
        if not runs:
            with pytest.raises(ValueError, match="levels"):
                _core.use(level)


# ---- The CUDA kernels, on the emulator, which contracts nothing ----


EPILOGUES = [
    *itertools.product([None, 0.0, 0.3], [False, True], [False]),
    (None, False, True),
    (0.3, False, True),
]
"""Slope, residual, and whether it is in place."""


@sweep(("dtype", "shape", "epilogue", "training"), TYPES, [(5, 3, 37), (40, 9, 1)], EPILOGUES, [True, False])
@np.errstate(all="ignore")
def test_bits_of_the_cuda_kernels(cupy, dtype, shape, epilogue, training):
    """Given the same sums, both engines compute the same: their formulas are common."""
    if not hasattr(cupy.RawModule, "prebuild"):
        pytest.skip("a GPU contracts products and sums")
    from cupy_syncbn.backends.cuda import operations as cuda

    trailer = (0.0, 7.0, 49.0, 5.0, 25.0)  # of a sound sum
    slope, residual, inplace = epilogue
    case = Case(
        dtype, shape, slope, residual, training, offset=3.0, special=True, parameters="wide", seed=5,
        inplace=inplace,
    )  # fmt: skip
    inputs = inputs_of(case)
    C = shape[1]
    vector, local = native.statistics(inputs.x, trailer)
    squares = native.centered_squares(local, vector, trailer, 0) if dtype == "float64" else None
    results, given = [], None
    for operations, take, host in (native, np.array, np.asarray), (cuda, cupy.asarray, lambda a: a.get()):
        x, dy, added, weight, bias, mean, var = (None if a is None else take(a) for a in inputs)
        tracked = take(np.array(4))
        batch = BatchSums(take(vector), None if squares is None else take(squares)) if training else None
        y, dx = (operations.empty(shape, x.dtype) for _ in "12")
        running = Running(mean, var, tracked, 0.1)
        normalization, writes = operations.normalize(
            x, y, batch, running, Affine(weight, bias), Epilogue(added, slope, inplace)
        )
        for write in writes:
            write()
        dresidual = operations.empty(shape, x.dtype) if residual else None
        if inplace:
            x, dx = y, dy
        sums, _, gradient = operations.reduce_gradients(dy, x, normalization, dresidual, trailer)
        given = host(sums) if given is None else given
        parameters = ParameterSums(take(given), 1 / 3, weight.dtype, bias.dtype)
        used = take(given) if training else None
        dweight, dbias = operations.input_gradient(gradient, x, normalization, dx, used, parameters, 0)
        found = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "mean": mean, "var": var}
        found |= {"tracked": tracked} | ({"dresidual": dresidual} if residual else {})
        results.append({name: host(array) for name, array in found.items()})
    assert results[0]["y"].size == np.prod((shape[0], C, shape[2]))
    for name, array in results[0].items():
        assert_same_bits(results[1][name], array, name, case)


# ---- Wrong calls ----

ANY = (3, 3.5, "text", b"bytes", [1.0, 2.0], {}, object(), (), (1, 2, 3, 4, 5, 6, 7), np.float32(3), Ellipsis)


class AsArray:
    """Not an array, but NumPy would make one of it."""

    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__


def reinterpreted(a, dtype):
    return np.zeros(a.shape, dtype)


def wrong_tensors(a, is_output):
    """Return what must not stand for a tensor."""
    memory = Memory()
    yield from (None, AsArray(a), a.tolist(), a[0], a[None], a[:, :, 0], a.reshape(-1), a[()].T)
    yield from (
        reinterpreted(a, t) for t in ("i4", "u1", "?", "c8", "O", "f2,f2", "M8[s]", "S4", "i8", np.longdouble)
    )
    yield from (reinterpreted(a, t) for t in TYPES.values() if t != a.dtype)
    yield reinterpreted(a, ml_dtypes.float8_e5m2)
    yield from (
        np.zeros((n, c, s), a.dtype) for n, c, s in [(4, 3, 5), (3, 4, 6), (5, 3, 3), (0, 3, 5), (3, 3, 0)]
    )
    yield from (
        np.repeat(a, 2, axis)[tuple([slice(None)] * axis + [slice(None, None, 2)])] for axis in range(3)
    )
    yield from (a[::-1].copy()[::-1], a.copy(order="F"), np.broadcast_to(a[:1], a.shape))
    if a.dtype != TYPES["bfloat16"]:
        yield a.astype(a.dtype.newbyteorder())
    view = np.ndarray(a.shape, a.dtype, bytearray(a.nbytes + 1), 1)
    yield view
    if is_output:
        fixed = memory.put(a)
        fixed.flags.writeable = False
        yield fixed


def wrong_vectors(a):
    yield from (None, AsArray(a), a.tolist(), a[:0], a[:-1][: a.size - 4], a[None], a[:, None], a[0])
    yield from (a.astype(t) for t in ("f4", "i8", "c16", "O"))
    yield from (np.stack([a, a], 1)[:, 0], a.astype(">f8"), np.broadcast_to(a[:1], a.shape))
    view = np.ndarray(a.shape, a.dtype, bytearray(a.nbytes + 1), 1)
    view[...] = a
    yield view


def wrong_channels(a):
    yield from (
        AsArray(a),
        a.tolist(),
        a[:-1],
        a[None],
        a[:, None],
        a[0],
        a[:0],
        np.zeros(a.size + 1, a.dtype),
    )
    yield from (a.astype(t) for t in ("i4", "i8", "c8", "O", np.longdouble))


def wrong_buffers(a):
    yield from wrong_channels(a)
    fixed = a.copy()
    fixed.flags.writeable = False
    yield from (fixed, np.broadcast_to(a[:1], a.shape))


def wrong_counters(a):
    yield from (
        AsArray(a),
        3,
        a.astype("i4"),
        a.astype("f8"),
        np.array([1, 2]),
        np.zeros(0, "i8"),
        a.astype(">i8"),
    )
    fixed = a.copy()
    fixed.flags.writeable = False
    yield fixed


def wrong_masks(a):
    yield from (AsArray(a), a[:-1], np.append(a, a[:1]), a.astype("i1"), a.astype("?"), a.astype("f8"), a[:0])
    yield from (np.stack([a, a], 1)[:, 0], np.broadcast_to(a[:1], a.shape))


WRONG_TRAILERS = (None, [1.0], 1.0, ("a",), (None,), (1.0, 1j), (object(),), {1.0: 2})
WRONG_FLAGS = (None, 0, 1, "True", (), np.True_)
WRONG_NUMBERS = (None, "1", 1j, object(), [1.0], np.zeros(2), 10**400)
WRONG_TYPES = (
    "f2,f2",
    "no type",
    3,
    object(),
    "i4",
    "c8",
    "O",
    ">f4",
    "S4",
    np.longdouble,
    np.dtype((np.float32, (2,))),
)


@pytest.fixture(params=TYPES)
def calls(request):
    return calls_of(request.param)


def calls_of(dtype):
    """Return right calls: the name of the function, its arguments, and what must not stand for each.

    A place is the path to an argument: its number, and that within tuples.
    """
    case = Case(dtype, (3, 3, 5), 0.0, residual=True, seed=1)
    x, dy, residual, weight, bias, mean, var = inputs_of(case)
    vector, local = _core.statistics(x, TRAILER)
    squares = np.ones(3)
    tracked = np.array(3)
    y, dresidual, dx = (np.full_like(x, 7) for _ in "123")
    batch, running = (vector, squares, 1, 0), (mean, var, tracked, 0.1)
    affine, epilogue = (weight, bias, 1e-5), (residual, 0.0, False)
    record, _ = _core.normalize(x, np.empty_like(x), batch, running, affine, epilogue)
    sums, _, gradient = _core.reduce_gradients(dy, x, record, np.empty_like(x), TRAILER)
    parameters = (sums, 1.0, np.dtype("f4"), np.dtype("f8"))

    def tensor(a, output=False):
        return list(wrong_tensors(a, output))

    def others(a, b):  # which may be absent, or of another shape if alone
        return [wrong for wrong in tensor(a, b) if wrong is not None]

    saved = [*wrong_vectors(record[0])]
    of_record = {
        (): [None, [*record], record[:3], (*record, 1)],
        (0,): saved,
        (1,): [None, *wrong_masks(record[1])],
        (3,): [wrong for wrong in WRONG_NUMBERS if wrong is not None],
        (2,): WRONG_FLAGS,
        (4,): [*WRONG_FLAGS, True],  # in place there is neither residual nor ReLU
    }
    of_trailer = {(): WRONG_TRAILERS}
    overlapping_y = np.concatenate([x.ravel(), x.ravel()])
    shifted = [overlapping_y[i : i + x.size].reshape(x.shape) for i in (1, x.size - 1)]
    front = overlapping_y[: x.size].reshape(x.shape)
    calls = {
        "statistics": ((x, TRAILER), {0: {(): [w for w in tensor(x) if not is_right(w)]}, 1: of_trailer}),
        "centered_squares": (
            (local, vector, TRAILER, 0),
            {0: {(): wrong_vectors(local)}, 1: {(): wrong_vectors(vector)}, 2: of_trailer},
        ),
        "normalize": (
            (x, y, batch, running, affine, epilogue),
            {
                0: {(): tensor(x)},
                1: {(): [*tensor(y, True), residual]},
                2: {
                    (): [3, [*batch], batch[:2], (*batch, 1)],
                    (0,): wrong_vectors(vector),
                    (1,): [a for a in wrong_vectors(squares) if a is not None],
                },
                3: {
                    (): [3, [*running], running[:3], (*running, 1)],
                    (0,): [None, *wrong_buffers(mean)],
                    (1,): [None, *wrong_buffers(var)],
                    (2,): wrong_counters(tracked),
                    (3,): [wrong for wrong in WRONG_NUMBERS if wrong is not None],
                },
                4: {
                    (): [None, [*affine], affine[:2], (*affine, 1)],
                    (0,): wrong_channels(weight),
                    (1,): wrong_channels(bias),
                    (2,): WRONG_NUMBERS,
                },
                5: {
                    (): [None, [*epilogue], epilogue[:1], (*epilogue, 1)],
                    (0,): [*others(residual, False), y],
                    (1,): [wrong for wrong in WRONG_NUMBERS if wrong is not None],
                    (2,): WRONG_FLAGS,
                },
            },
        ),
        "reduce_gradients": (
            (dy, x, record, dresidual, TRAILER),
            {
                0: {(): tensor(dy)},
                1: {(): tensor(x)},
                2: of_record,
                3: {(): [*tensor(dresidual, True), x, dy]},
                4: of_trailer,
            },
        ),
        "input_gradient": (
            (gradient, x, record, dx, sums, parameters, 0),
            {
                0: {(): tensor(gradient)},
                1: {(): tensor(x)},
                2: of_record,
                3: {(): [*tensor(dx, True), x]},
                4: {(): [a for a in wrong_vectors(sums) if a is not None]},
                5: {
                    (): [None, [*parameters], parameters[:3], (*parameters, 1)],
                    (0,): wrong_vectors(sums),
                    (1,): WRONG_NUMBERS,
                    (2,): WRONG_TYPES,
                    (3,): WRONG_TYPES,
                },
            },
        ),
        "as_kernel_input": ((x,), {0: {(): [None, AsArray(x), x.tolist()]}}),
        "update": (
            (mean, var, tracked, np.ones(6)),
            {
                0: {(): [None, *wrong_buffers(mean)]},
                1: {(): [None, *wrong_buffers(var)]},
                2: {(): wrong_counters(tracked)},
                3: {(): wrong_vectors(np.ones(6))},
            },
        ),
        "use": (("baseline",), {0: {(): [None, 3, b"baseline", "", "no level", "v\udcff"]}}),
    }
    overlaps = [
        ("normalize", (front, y, batch, running, affine, epilogue), 1, shifted),
        ("normalize", (x, y, batch, running, affine, (front, 0.0, False)), 1, [front, *shifted]),
        ("reduce_gradients", (front, x, record, dresidual, TRAILER), 3, [front, *shifted]),
        ("reduce_gradients", (dy, front, record, dresidual, TRAILER), 3, [front, *shifted]),
        ("input_gradient", (front, x, record, dx, sums, parameters, 0), 3, shifted),
        ("input_gradient", (gradient, front, record, dx, sums, parameters, 0), 3, [front, *shifted]),
    ]
    return calls, overlaps


def is_right(tensor):
    """Whether a tensor is right where there is no other to compare it with."""
    return (
        isinstance(tensor, np.ndarray)
        and tensor.ndim == 3
        and tensor.dtype in TYPES.values()
        and tensor.flags.c_contiguous
        and tensor.flags.aligned
    )


def replaced(value, path, other):
    """Return a tuple with another value at a path."""
    if not path:
        return other
    first, *rest = path
    return (*value[:first], replaced(value[first], rest, other), *value[first + 1 :])


def arrays_in(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from arrays_in(each)


def assert_refused(name, arguments, what):
    arrays = [*arrays_in(arguments)]
    before = [a.tobytes() if a.dtype != object else None for a in arrays]
    error = None
    with contextlib.suppress(TypeError, ValueError):
        error = f"{name} took {what}: {getattr(_core, name)(*arguments)}"
    assert error is None, error
    for array, copy in zip(arrays, before, strict=True):
        assert copy is None or array.tobytes() == copy, f"{name} has written, and refused {what}"


def test_wrong_arguments(calls, use):
    count = 0
    for name, (right, wrongs) in calls[0].items():
        getattr(_core, name)(*right)
        for number, of_argument in wrongs.items():
            for path, values in of_argument.items():
                for value in values:
                    arguments = replaced(right, (number, *path), value)
                    assert_refused(name, arguments, f"{value!r} at {(number, *path)}")
                    count += 1
    assert count > 400


def test_overlapping_memory(calls):
    for name, right, number, values in calls[1]:
        getattr(_core, name)(*right)
        for value in values:
            assert_refused(name, replaced(right, (number,), value), f"an overlapping argument {number}")


def leaves(value, path=()):
    yield path
    if isinstance(value, tuple):
        for i, each in enumerate(value):
            yield from leaves(each, (*path, i))


def test_anything_anywhere(calls):
    """Any object at any place, also where it may be right: an error, or a result, and no crash."""
    refused = taken = 0
    for name, (right, _) in calls[0].items():
        every = [*arrays_in(right)]
        for path in [*leaves(right)][1:]:
            for value in (*ANY, None, True, *every):
                try:
                    getattr(_core, name)(*replaced(right, path, value))
                    taken += 1
                except (TypeError, ValueError):
                    refused += 1
    _core.use("baseline")
    assert refused > 4 * taken > 0


@pytest.fixture(autouse=True)
def same_level(use):
    """Leave the level as it was."""


def test_number_of_arguments(calls):
    for name, (right, _) in calls[0].items():
        function = getattr(_core, name)
        for arguments in (right[:-1], (*right, None), ()):
            with pytest.raises(TypeError, match="arguments"):
                function(*arguments)
        with pytest.raises(TypeError, match="keyword"):
            function(*right[:-1], last=right[-1])
    with pytest.raises(TypeError, match="arguments"):
        _core.levels(1)


def test_errors_of_numbers_are_errors():
    class Angry:
        def __float__(self):
            raise RuntimeError("not a number")

    with pytest.raises(TypeError, match="expected a number"):
        _core.statistics(np.zeros((2, 2, 2)), (Angry(),))


@pytest.mark.parametrize("shape", [(0, 1 << 56, 1), (0, 1 << 60, 1)], ids=str)
def test_sizes_beyond_memory(shape):
    """Of tensors without elements, which NumPy has in any size."""
    x = np.empty(shape, np.float16)
    one = np.ones(1)
    running = (one, one, None, 0.1)
    vector = np.zeros(20)
    for call in (
        lambda: _core.statistics(x, TRAILER),
        lambda: _core.normalize(x, x, None, running, (None, None, 0.0), (None, 0.0, False)),
        lambda: _core.normalize(x, x, (vector, None, 1, 0), None, (None, None, 0.0), (x[:], 0.0, False)),
        lambda: _core.reduce_gradients(x, x, (vector, None, False, None, False), None, TRAILER),
    ):
        try:
            call()
        except (MemoryError, ValueError):
            assert shape[1] > 3
        else:
            assert shape[1] <= 3


# ---- The global lock, and memory ----


def test_the_lock_is_released():
    """A thread that runs during a pass runs since the pass has released the lock."""
    x = np.ones((64, 64, 3136), np.float32)
    interval = sys.getswitchinterval()

    def runs_during(function):
        """Tell whether a thread that waits for its turn gets it while the function runs."""
        ready, turn, has_run = threading.Event(), threading.Lock(), []
        turn.acquire()

        def wait():
            ready.set()
            turn.acquire()
            has_run.append(True)

        thread = threading.Thread(target=wait)
        thread.start()
        ready.wait()
        turn.release()
        function()
        result = bool(has_run)
        thread.join()
        return result

    sys.setswitchinterval(1000)
    try:
        y = np.empty_like(x)
        vector, _ = _core.statistics(x, TRAILER)
        batch, affine = (vector, None, 1, 0), (None, None, 1e-5)
        record, _ = _core.normalize(x, y, batch, None, affine, (None, 0.0, False))
        sums, _, g = _core.reduce_gradients(x, x, record, None, TRAILER)
        passes = {
            "statistics": lambda: _core.statistics(x, TRAILER),
            "normalize": lambda: _core.normalize(x, y, batch, None, affine, (None, 0.0, False)),
            "reduce_gradients": lambda: _core.reduce_gradients(x, x, record, None, TRAILER),
            "input_gradient": lambda: _core.input_gradient(g, x, record, y, sums, (sums, 1.0, None, None), 0),
        }
        # On a busy machine the thread may not come in time: it has many turns.
        for name, function in passes.items():
            assert any(runs_during(function) for _ in range(100)), f"no thread runs during {name}"
        assert not any(runs_during(lambda: [_core.levels() for _ in range(1000)]) for _ in range(20))
    finally:
        sys.setswitchinterval(interval)


def resident():
    """Return the bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def each_kind_of_call(dtype):
    """Yield what calls the core, rightly or in each wrong way, with the error that it is to raise or None."""
    right_and_wrong, overlaps = calls_of(dtype)
    for name, (right, wrongs) in right_and_wrong.items():
        function = getattr(_core, name)
        yield name, functools.partial(function, *right), right, False
        if name == "normalize":
            yield "the updates", lambda f=function, a=right: [write() for write in f(*a)[1]], right, False
        for number, of_argument in wrongs.items():
            for path, values in of_argument.items():
                for i, value in enumerate(values):
                    arguments = replaced(right, (number, *path), value)
                    label = f"{name} with wrong value {i} at {(number, *path)}"
                    yield label, functools.partial(function, *arguments), arguments, True
        for arguments in (right[:-1], (*right, None)):
            yield f"{name} of {len(arguments)}", functools.partial(function, *arguments), arguments, True
    for name, right, number, values in overlaps:
        arguments = replaced(right, (number,), values[0])
        yield f"{name} that overlaps", functools.partial(getattr(_core, name), *arguments), arguments, True


def repeat(call, times, is_wrong):
    if not is_wrong:
        for _ in range(times):
            call()
        return
    for _ in range(times):
        try:
            call()
        except (TypeError, ValueError):
            continue
        raise AssertionError("it was taken")


def left_behind(call, times, is_wrong, watched):
    """Tell what there is more of after some calls: of Python's memory, references, the process's memory."""
    counts = [sys.getrefcount(each) for each in watched]
    gc.collect(0)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        repeat(call, min(times, 200), is_wrong)
        left = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    if left >= 2000:
        return f"leaves {left} bytes behind"
    in_use = resident()
    repeat(call, times, is_wrong)
    # Of None and types, this loop itself takes some.
    more = [sys.getrefcount(each) - count for each, count in zip(watched, counts, strict=True)]
    if max(map(abs, more)) >= 8:
        return f"changes references by {more}"
    grown = resident() - in_use
    return f"has {grown} bytes more in use" if grown > 256 << 10 else ""  # 10,000 times 32 bytes are 312 KiB


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("most", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_calls_leave_nothing_behind(dtype, most, same_level):
    """Neither references nor memory, and errors neither: each kind of call is repeated by itself."""
    for label, call, arguments, is_wrong in each_kind_of_call(dtype):
        times = 50 if is_wrong and most < 10_000 else most  # there are hundreds of wrong ones
        repeat(call, 3, is_wrong)
        watched = [*arguments, *arrays_in(arguments), TYPES[dtype], None, True, TypeError, ValueError, tuple]
        # The thread of what is compiled ahead leaves some as well, but not each time. Planted bugs meet none.
        for _ in range(1 if threading.active_count() == 1 else 4):
            found = left_behind(call, times, is_wrong, watched)
            if not found:
                break
        assert not found, f"{label} {found}"


def test_calls_leave_no_memory_behind():
    """The core's own, of which Python does not know: some 20 KiB a call."""
    x = np.zeros((1, 900, 2), np.float32)
    running = (np.zeros(900), np.ones(900), None, 0.1)
    y = np.empty_like(x)

    def call_all():
        vector, _ = _core.statistics(x, TRAILER)
        record, _ = _core.normalize(
            x, y, (vector, None, 1, 0), running, (None, None, 0.1), (None, None, False)
        )
        sums, _, g = _core.reduce_gradients(x, x, record, None, TRAILER)
        _core.input_gradient(g, x, record, y, sums, (sums, 1.0, None, None), 0)
        for wrong in ("i4", "O"):
            with pytest.raises(TypeError):
                _core.input_gradient(g, x, record, y, sums, (sums, 1.0, wrong, None), 0)
            with pytest.raises(TypeError):
                _core.normalize(x, y, (vector, None, 1, 0), running, (None, None, 0.1), (None, wrong, False))

    for _ in range(50):
        call_all()
    before = resident()
    for _ in range(1250):
        call_all()
    assert resident() - before < 8 << 20  # 1250 times that would be 24 MiB and more


# ---- More than 2^31 elements ----


def need_memory(needed):
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) << 10
    if available < needed:
        pytest.skip(f"it takes {needed >> 20} MiB of memory, and {available >> 20} MiB are free")


@pytest.mark.long
@pytest.mark.parametrize(
    "shape", [(2, 2, (1 << 29) + 7), ((1 << 21) + 3, 1024, 1), (3, 33, 22_000_001)], ids=str
)
def test_more_than_2_to_the_31_elements(shape):
    N, C, S = shape
    size = N * C * S
    assert size > 1 << 31
    need_memory(2 * 2 * size + size // 8 + (1 << 30))
    rng = np.random.default_rng(1)
    x, y = np.empty(shape, np.float16), np.empty(shape, np.float16)
    block = (rng.standard_normal((1 << 20) + 7) + 2).astype(np.float16)  # 2^31 is no multiple of its size
    flat = x.reshape(-1)
    for start in range(0, size, block.size):
        flat[start : start + block.size] = block[: size - start]
    vector, _ = native.statistics(x, TRAILER)
    mean, m2, count = moments(vector, C)
    assert count == N * S
    np.testing.assert_allclose(mean, block.mean(dtype="f8"), atol=0.01)
    np.testing.assert_allclose(m2 / count, block.var(dtype="f8"), rtol=0.01)
    batch, affine = BatchSums(vector), Affine(None, rng.normal(size=C).astype("f4"))
    normalization, _ = native.normalize(x, y, batch, None, affine, Epilogue(x, 0.0))
    # Of some samples and channels, or of some rows; the last ones among them.
    parts = [np.s_[:1], np.s_[-1:]] if S == 1 else [np.s_[:1, :, :1000], np.s_[-1:, :, -1000:]]
    parts = [np.s_[:1000], np.s_[-1000:]] if S == 1 else parts
    cuts = [np.ascontiguousarray(x[part]) for part in parts]
    wanted, records = [], []
    for cut in cuts:
        out = np.empty_like(cut)
        records.append(specification.normalize(cut, out, batch, None, affine, Epilogue(cut, 0.0))[0])
        wanted.append(out)
    for part, out in zip(parts, wanted, strict=True):
        assert_identical(np.ascontiguousarray(y[part]), out)
    dresidual = y
    sums, _, gradient = native.reduce_gradients(x, x, normalization, dresidual, TRAILER)
    for part, cut, record in zip(parts, cuts, records, strict=True):
        out = np.empty_like(cut)
        specification.reduce_gradients(cut, cut, record, out, TRAILER)
        assert_identical(np.ascontiguousarray(dresidual[part]), out)
    del dresidual, gradient
    plain, _ = native.normalize(x, y, batch, None, affine, Epilogue())
    sums, _, gradient = native.reduce_gradients(x, x, plain, None, TRAILER)
    np.testing.assert_allclose(sums[:C], mean * count, rtol=1e-4)
    parameters = ParameterSums(sums, 1.0, None, None)
    native.input_gradient(gradient, x, plain, y, sums, parameters, 0)
    for part, cut in zip(parts, cuts, strict=True):
        out, unused = np.empty_like(cut), np.empty_like(cut)
        record = specification.normalize(cut, unused, batch, None, affine, Epilogue())[0]
        given = specification.reduce_gradients(cut, cut, record, None, TRAILER).gradient
        specification.input_gradient(given, cut, record, out, sums, parameters, 0)
        assert_identical(np.ascontiguousarray(y[part]), out)


# By walk: one row of more than 2^31, many channels, wide and narrow columns, small maps.
BEYOND = {
    "a long row": (1, 1, (1 << 31) + 9),
    "many channels": (2, (1 << 21) + 1, 513),
    "channels last": ((1 << 21) + 3, 1027, 1),
    "narrow": ((1 << 29) - 5, 5, 1),
    "small maps": ((1 << 23) + 1, 9, 29),
}


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("walk", BEYOND)
@np.errstate(all="ignore")
def test_few_values_among_2_to_the_31_zeros(walk, dtype):
    """Zeros but for some values about 2^31 and at the ends; each element of the results is looked at.

    Zeros that nobody writes take no memory.
    """
    N, C, S = shape = BEYOND[walk]
    size, kind = N * C * S, TYPES[dtype]
    assert size > 1 << 31
    need_memory(2 * size + size // 8 + (1 << 30))
    places = np.array([0, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, size - 2, size - 1])
    x, dy, y = np.zeros(shape, kind), np.zeros(shape, kind), np.empty(shape, kind)
    x.reshape(-1)[places] = [3, -5, 7, 2, -9, 11]
    dy.reshape(-1)[places] = [-2, 4, 1, -6, 8, 3]
    channels = places // S % C

    # The same values, channel by channel, behind a row of zeros: what the specification takes.
    few_x, few_dy = (np.zeros((1 + places.size, C, 1), kind) for _ in "12")
    rows = np.arange(places.size) + 1
    few_x[rows, channels, 0], few_dy[rows, channels, 0] = x.reshape(-1)[places], dy.reshape(-1)[places]
    rng = np.random.default_rng(3)
    affine = Affine(*(rng.uniform(0.5, 2, C).astype("f4") for _ in "12"))

    def check(tensor, few, name):
        """Compare a whole tensor with what stands for it; the places are overwritten."""
        flat, of_zero = tensor.reshape(-1), np.ascontiguousarray(few[0, :, 0]).view("u2")
        assert_identical(flat[places], few[rows, channels, 0])
        flat.view("u2")[places] = of_zero[channels]
        bits = tensor.view("u2")
        step = max(1, (1 << 24) // (C * S))
        for n in range(0, N, step):
            if S < 1 << 24:
                wrong = (bits[n : n + step] != of_zero[:, None]).sum()
            else:
                wrong = sum(
                    (flat.view("u2")[s : s + (1 << 24)] != of_zero[0]).sum() for s in range(0, size, 1 << 24)
                )
            assert wrong == 0, f"{name}: {wrong} of samples {n} to {n + step} differ"

    vector, _ = native.statistics(x, TRAILER)
    mean, m2, count = moments(vector, C)
    assert count == N * S
    total, squares = (
        np.bincount(channels, few_x[rows, channels, 0].astype("f8") ** power, C) for power in (1, 2)
    )
    np.testing.assert_allclose(mean, total / count, rtol=1e-12, atol=1e-20)
    np.testing.assert_allclose(m2, squares - total**2 / count, rtol=1e-9, atol=1e-20)

    batch = BatchSums(vector)
    for residual, slope in ((False, 0.0), (True, 0.3), (False, None)):
        y.fill(np.nan)
        few_y, few_g, few_dx = (np.empty_like(few_x) for _ in "123")
        record, _ = native.normalize(x, y, batch, None, affine, Epilogue(x if residual else None, slope))
        few_record, _ = specification.normalize(
            few_x, few_y, batch, None, affine, Epilogue(few_x if residual else None, slope)
        )
        check(y, few_y, "y")
        y.fill(np.nan)
        sums, _, gradient = native.reduce_gradients(dy, x, record, y if residual else None, TRAILER)
        few_sums, _, few_gradient = specification.reduce_gradients(
            few_dy, few_x, few_record, few_g if residual else None, TRAILER
        )
        np.testing.assert_allclose(sums, few_sums, rtol=1e-6, atol=1e-20)
        if residual:
            check(y, few_g, "dresidual")
            assert gradient is dy  # of 16 bits behind a leaky ReLU: y can be written over
        y.fill(np.nan)
        parameters = ParameterSums(few_sums, 1.0, None, None)
        native.input_gradient(gradient, x, record, y, few_sums, parameters, 0)
        specification.input_gradient(few_gradient, few_x, few_record, few_dx, few_sums, parameters, 0)
        check(y, few_dx, "dx")
