"""Bugs planted in the kernels and in their launches, one at a time: the checks of test_kernels.py find each.

Those that are about memory or the order of threads would show seldom on a GPU, if at all: the emulator has to
name them.
"""

import collections
import functools
import math
from typing import NamedTuple

import numpy as np
import pytest
from test_kernels import (
    LAUNCHES,
    UNSOUND,
    aligned,
    assert_mailboxes,
    assert_step,
    assert_unchanged_by,
    assert_vector,
    assert_walk,
    assert_zeros_block,
    compute,
    expected_of,
    launched_with,
    make_step,
    misaligned,
    needs_emulator,
    recorded,
    schedules,
    variance,
)

from cuda_emulator import EmulatorError, schedule
from cupy_syncbn.backends.cuda import kernels
from support.compare import assert_close, assert_identical
from support.graphs import check_capture_by_hand, check_captured_step
from support.operations import TRAILER

pytestmark = pytest.mark.mpi_skip


# ---- The checks: each is of one or two instances ----


def check_statistics(cupy, *, shape, launch="many_splits", dtypes="float32", put=aligned):
    """Twice each, since a launch may leave something behind for the next."""
    x = make_step(shape, dtypes).x
    with launched_with(**LAUNCHES[launch]):
        for chosen in schedules(cupy) * 2:
            with schedule(chosen):
                assert_vector(cupy, x, put)


def check_step(cupy, *, shape, launch="many_splits", dtypes="float32", put=aligned, **settings):
    with launched_with(**LAUNCHES[launch]):
        assert_step(cupy, make_step(shape, dtypes, **settings), put)


def check_offset(cupy):
    reads = []
    for offset in 0, 1e4:
        x = make_step((40, 3, 49)).x + np.float32(offset)
        with recorded() as done, launched_with(items=1 << 20):
            np.testing.assert_allclose(variance(cupy, x), np.var(x.astype("f8"), (0, 2)), rtol=1e-6)
        reads.append(done[0].read)
    assert reads[0] == reads[1], "some threads have summed again"


def check_outliers_first(cupy):
    x = make_step((1, 2, 1 << 14)).x
    x[:, :, [0, 1024]] = 1e4  # two of a thread's first three values
    with launched_with(items=16):
        np.testing.assert_allclose(variance(cupy, x), np.var(x.astype("f8"), (0, 2)), rtol=1e-6)


def check_large_values(cupy):
    step = make_step((600, 8, 1))
    step.x[...] *= np.float32(1e25)
    with np.errstate(all="ignore"):
        assert_close(compute(cupy, step)["y"], expected_of(step)["y"])


def check_weights_close_to_zero(cupy):
    """They count as 1e-5 with their sign."""
    weight = np.array([0, -0.0, 1e-7, -1e-9])
    used = np.copysign(1e-5, weight)
    steps = [make_step((40, 4, 9), "float64", inplace=True, weight=each) for each in (weight, used)]
    results, expected = (compute(cupy, step) for step in steps)
    for name, array in expected.items():
        assert_identical(results[name], array)


def check_faults(cupy):
    for trailers in (UNSOUND[0], TRAILER), (TRAILER, UNSOUND[0]):
        assert_unchanged_by(cupy, "float64", *trailers)


def check_mailboxes(cupy):
    with launched_with(items=1):
        assert_mailboxes(cupy, "float64", (40, 33, 5))


CHECKS = {
    "rows": functools.partial(check_statistics, shape=(3, 3, 1025)),
    "columns": functools.partial(check_statistics, shape=(56, 36, 1)),
    "whole vectors": functools.partial(check_statistics, shape=(20, 6, 36)),
    "small maps": functools.partial(check_statistics, shape=(40, 8, 3)),
    "many splits": functools.partial(check_statistics, shape=(960, 40, 1)),
    "clipped": functools.partial(check_statistics, shape=(21, 264, 1), launch="one_split"),
    "short rows": functools.partial(check_statistics, shape=(20, 2, 133), launch="one_split"),
    "misaligned": functools.partial(check_statistics, shape=(3, 3, 257), put=misaligned),
    "step rows": functools.partial(check_step, shape=(3, 2, 1025)),
    "step columns": functools.partial(check_step, shape=(40, 8, 3)),
    "idle threads": functools.partial(check_step, shape=(100, 8, 3), launch="one_split"),
    "counted": functools.partial(check_step, shape=(5, 33, 7), momentum=None),
    "masked rows": functools.partial(check_step, shape=(3, 2, 1025), residual=True, activation="relu"),
    "masked short rows": functools.partial(
        check_step, shape=(20, 2, 133), launch="one_split", residual=True, activation="relu"
    ),
    "masked columns": functools.partial(check_step, shape=(70, 36, 1), residual=True, activation="relu"),
    "wide parameters": functools.partial(check_step, shape=(40, 8, 3), dtypes="float16-float32"),
    "columns beyond 32 bits": functools.partial(assert_walk, name="columns"),
    "rows beyond 32 bits": functools.partial(assert_walk, name="many_rows"),
    "a wide step": functools.partial(assert_walk, name="short_rows"),
    "in place": functools.partial(
        check_step, shape=(40, 8, 3), inplace=True, activation=("leaky_relu", 0.25)
    ),
    "in place evaluation": functools.partial(
        check_step, shape=(40, 8, 3), inplace=True, activation="leaky_relu", training=False
    ),
    "weights close to zero": check_weights_close_to_zero,
    "offset": check_offset,
    "large values": check_large_values,
    "outliers first": check_outliers_first,
    "zeros": functools.partial(assert_zeros_block, residual=False),
    "faults": check_faults,
    "mailboxes": check_mailboxes,
}


# ---- Bugs in the kernels ----


class Bug(NamedTuple):
    """`old` is there once in `file`, headers included, and becomes `new`; `check` is to find it.

    `error` is what the emulator says. Without one the results are wrong, and nothing else.
    """

    file: str
    old: str
    new: str
    check: str
    error: str | None = None


RACE = "data race"
OUTSIDE = "out-of-bounds"

IN_KERNELS = {
    # Trailers
    "a number too many for the host": Bug(
        "statistics.cu", "i < TRAILER_LENGTH;", "i <= TRAILER_LENGTH;", "mailboxes", OUTSIDE
    ),
    "every group tells the host": Bug(
        "normalize.cu",
        "if (part.split == 0 && c == 0) {",
        "if (part.split == 0 && k == 0) {",
        "mailboxes",
        RACE,
    ),
    "every group of the backward tells the host": Bug(
        "gradients.cu", "if (c == 0) tell_host", "if (k == 0) tell_host", "mailboxes", RACE
    ),
    "the first trailer in place of the second": Bug(
        "normalize.cu",
        "tell_host(mailbox, squares ? squares + g.C : vector + 4 * g.C + 1)",
        "tell_host(mailbox, vector + 4 * g.C + 1)",
        "mailboxes",
    ),
    "a trailer that begins early": Bug(
        "gradients.cu",
        "tell_host(mailbox, sums + 2 * g.C)",
        "tell_host(mailbox, sums + 2 * g.C - 1)",
        "mailboxes",
    ),
    "a trailer that nobody tells the host": Bug(
        "statistics.cu", "tell_host(mailbox, vector + 4 * C + 1);", "", "mailboxes"
    ),
    "the second sum is not looked at": Bug(
        "normalize.cu", " && (!squares || is_sound(squares + C, ranks))", "", "faults"
    ),
    "the first sum is not looked at": Bug(
        "normalize.cu", "is_sound(vector + 4 * C + 1, ranks) && (!squares ||", "(!squares ||", "faults"
    ),
    # Barriers, fences, counters
    "no barrier after the entries": Bug(
        "statistics.cu", "__syncthreads();  // publishes the entries", "", "rows", f"{RACE}|uninitialised"
    ),
    "no barrier after the pivots": Bug(
        "statistics.cu", "__syncthreads();  // publishes the pivots", "", "columns", f"{RACE}|uninitialised"
    ),
    "no barrier after the pivots are read": Bug(
        "statistics.cu", "__syncthreads();  // all have read the pivots", "", "columns", RACE
    ),
    "the pivots of the group's first channels alone": Bug(
        "statistics.cu",
        "if (threadIdx.x < part.channels) staged",
        "if (threadIdx.x < 8) staged",
        "columns",
        "uninitialised",
    ),
    "no barrier after the partials": Bug(
        "statistics.cu", "__syncthreads();  // publishes the partials within the block", "", "columns", RACE
    ),
    "the last block is told without a barrier": Bug(
        "statistics.cu",
        "if (!__syncthreads_or(is_last)) return false;",
        "__shared__ bool told; if (threadIdx.x == 0) told = is_last; if (!told) return false;",
        "rows",
        f"{RACE}|uninitialised",
    ),
    "each thread takes itself for the last": Bug(
        "statistics.cu",
        "if (!__syncthreads_or(is_last)) return false;",
        "__syncthreads(); if (!is_last) return false;",
        "rows",
        "exited",
    ),
    "no fence before the block counts as done": Bug(
        "statistics.cu",
        "__threadfence();  // the block's partials are",
        "// the block's partials are",
        "rows",
        RACE,
    ),
    "no fence after it": Bug(
        "statistics.cu",
        "if (is_last) __threadfence();  // the other blocks'",
        "// the other blocks'",
        "rows",
        RACE,
    ),
    "a barrier that some threads do not reach": Bug(
        "gradients.cu",
        "__syncthreads();  // publishes the constants",
        "if (threadIdx.x >= part.channels) return; __syncthreads();",
        "step columns",
        "exited",
    ),
    "no barrier after the constants": Bug(
        "gradients.cu",
        "__syncthreads();  // publishes the constants",
        "",
        "step columns",
        f"{RACE}|uninitialised",
    ),
    "no barrier after the constants of the forward": Bug(
        "gradients.cu",
        "__syncthreads();  // publishes what was staged",
        "",
        "step columns",
        f"{RACE}|uninitialised",
    ),
    "the counter is not reset": Bug(
        "statistics.cu", "if (threadIdx.x == 0) counters[part.index] = 0;", "", "rows"
    ),
    "the partials of all splits in one place": Bug(
        "statistics.cu", "(part.split * g.C + part.channel + k) * 2", "(part.channel + k) * 2", "rows", RACE
    ),
    "no barrier between the rounds of the last block": Bug(
        "statistics.cu",
        "__syncthreads();  // publishes the sums; what",
        "// publishes the sums; what",
        "many splits",
        f"{RACE}|uninitialised",
    ),
    "all threads write in all rounds of the last block": Bug(
        "statistics.cu",
        "if (number < threads) shared[threadIdx.x] =",
        "shared[threadIdx.x] =",
        "many splits",
        RACE,
    ),
    "the last block takes half of the splits": Bug(
        "statistics.cu",
        "left -= AT_ONCE * threads, from +=",
        "left -= 2 * AT_ONCE * threads, from +=",
        "many splits",
    ),
    "the last block reads behind the splits": Bug(
        "statistics.cu", "if (i * threads < left)", "if (left > 0)", "many splits", f"{OUTSIDE}|uninitialised"
    ),
    "an odd number of threads loses one in the last block": Bug(
        "statistics.cu", "rest = (threads + 1) / 2;", "rest = threads / 2;", "many splits"
    ),
    "num_batches_tracked goes up before all have read it": Bug(
        "normalize.cu", "== g.groups - 1)", "== 0)", "counted", RACE
    ),
    "the counter of groups is off by one": Bug(
        "normalize.cu", "== g.groups - 1)", "== g.groups)", "counted", "uninitialised"
    ),
    "no fence before a group counts as done": Bug(
        "normalize.cu", "__threadfence();\n        if (atomicAdd", "if (atomicAdd", "counted", RACE
    ),
    "no fence before num_batches_tracked goes up": Bug(
        "normalize.cu", "__threadfence();\n            *counter = 0", "*counter = 0", "counted", RACE
    ),
    # The walk
    "a row too many": Bug(
        "statistics.cu",
        "(end - row + height - 1) / height",
        "(end - row + height) / height",
        "columns",
        OUTSIDE,
    ),
    "the last vectors left out": Bug(
        "normalize.cu", "(end - first + THREADS - 1) / THREADS", "(end - first) / THREADS", "step rows"
    ),
    "the last group is not clipped": Bug(
        "statistics.cu",
        "static_cast<int>(min(g.group, g.C - part.channel))",
        "static_cast<int>(g.group)",
        "clipped",
        OUTSIDE,
    ),
    "idle threads are not idle": Bug(
        "normalize.cu",
        "idle = y >= height || x * V >= part.channels * g.S",
        "idle = false",
        "idle threads",
        f"{RACE}|{OUTSIDE}",
    ),
    "the reversed block is off by one": Bug(
        "normalize.cu",
        "(g.splits) - 1 - blockIdx.y",
        "(g.splits) - blockIdx.y",
        "step rows",
        f"{OUTSIDE}|uninitialised",
    ),
    "no edges": Bug("normalize.cu", "if (g.S % V == 0) return;", "return;", "step rows"),
    "an edge too many": Bug(
        "normalize.cu", "k < V ? s >= head : s >= g.S", "k < V ? s > head : s >= g.S", "step rows", RACE
    ),
    "vectors from where a row begins": Bug(
        "statistics.cu", "V == 1 ? 0 : static_cast<int>(-element_ & (V - 1))", "0", "rows", "misaligned"
    ),
    "a product in 32 bits": Bug(
        "common.cuh",
        "element_ = row * width + column;",
        "element_ = static_cast<int>(row) * static_cast<int>(width) + column;",
        "columns beyond 32 bits",
        r"overflow of \*",
    ),
    "an element's number in 32 bits": Bug(
        "common.cuh",
        "return {element_ + head(), mask_};",
        "return {static_cast<unsigned int>(element_) + head(), mask_};",
        "rows beyond 32 bits",
    ),
    "a step in 32 bits": Bug(
        "common.cuh",
        "rows * (g.C * g.S) + static",
        "static_cast<int>(rows * (g.C * g.S)) + static",
        "a wide step",
    ),
    "the wrap to the next row is forgotten": Bug(
        "statistics.cu", "element_ += element_wrap_;", ";", "short rows"
    ),
    "the mask stays in its row": Bug("normalize.cu", "mask_ += mask_wrap_;", ";", "masked short rows", RACE),
    "a vector across the end of a row": Bug("statistics.cu", "|| head() <= rest_", "|| true", "short rows"),
    "columns of a vector are of one channel": Bug(
        "gradients.cu", "if (++s == S) {", "if (false) {", "step columns"
    ),
    "a vector begins at the next channel": Bug(
        "normalize.cu", "int k = quotient(first, S), s", "int k = quotient(first + 1, S), s", "step columns"
    ),
    # Sums
    "a column is summed without its next row": Bug(
        "statistics.cu",
        "                s -= S;\n                ++y;",
        "                s -= S;",
        "small maps",
        f"{OUTSIDE}|uninitialised",
    ),
    "the lanes of a channel are not all added up": Bug(
        "statistics.cu", "distance >= jobs;", "distance > jobs;", "columns"
    ),
    "channels have more lanes than there are": Bug(
        "statistics.cu",
        "- __clz(THREADS - 1), 5) : 5;",
        "- __clz(THREADS - 1) + 1, 5) : 5;",
        "clipped",
        "uninitialised",
    ),
    "channels are not side by side": Bug(
        "statistics.cu", "(in_warp & jobs - 1)", "lane % jobs", "columns", RACE
    ),
    "an entry is not where its thread has put it": Bug(
        "statistics.cu", "return all[i ^ (i / 8 % W)];", "return all[i];", "columns"
    ),
    "a thread leaves out one of its entries": Bug(
        "statistics.cu",
        "for (int w = 1; w < W; ++w) {\n            sum.x",
        "for (int w = 2; w < W; ++w) {\n            sum.x",
        "whole vectors",
    ),
    "entries of a thread are added up twice": Bug(
        "statistics.cu",
        "S = is_whole ? columns / W : columns;",
        "S = columns;",
        "whole vectors",
        f"{OUTSIDE}|uninitialised",
    ),
    "half a warp is added up": Bug("statistics.cu", "distance = WARP / 2;", "distance = WARP / 4;", "rows"),
    "half a warp takes part": Bug(
        "statistics.cu",
        "sums[0] += __shfl_xor_sync(0xffffffffu",
        "sums[0] += __shfl_xor_sync(0xffffu",
        "rows",
        "not in its own mask",
    ),
    "no shift": Bug("statistics.cu", "shift[w] = finite_or_zero(shift[w]);", "shift[w] = 0;", "offset"),
    "no second look at outliers": Bug(
        "statistics.cu",
        "while (sizeof(Accumulator<T>) == 4 && moments.recentre());",
        "while (false);",
        "outliers first",
    ),
    "no second look at large values": Bug(
        "statistics.cu", "sizeof(Accumulator<T>) == 4 && !finite", "false", "large values"
    ),
    # In place
    "a weight close to zero is used": Bug(
        "normalize.cu", "if (flags & IN_PLACE) factor = invertible(factor);", "", "weights close to zero"
    ),
    "a weight close to zero loses its sign": Bug(
        "normalize.cu", "copysign(least, weight)", "least", "weights close to zero"
    ),
    "the mean of z is that of x": Bug(
        "normalize.cu", "saved[c] = flags & IN_PLACE ? constant : mean;", "saved[c] = mean;", "in place"
    ),
    "the weight of z is that of x": Bug(
        "normalize.cu", "flags & IN_PLACE ? 1 / factor : step.invstd", "step.invstd", "in place"
    ),
    "y is not inverted": Bug(
        "gradients.cu", "if constexpr (INVERTS) return before_leaky_relu", "if (false) return", "in place"
    ),
    "y is not read where there are no sums": Bug(
        "gradients.cu",
        "body.reads_x = sums || body.COMPUTES_MASK || body.INVERTS;",
        "body.reads_x = sums || body.COMPUTES_MASK;",
        "in place evaluation",
    ),
    # Indices past a thread's own arrays
    "the last block adds up a load too many": Bug(
        "statistics.cu",
        "for (int i = 0; i < AT_ONCE; ++i) {",
        "for (int i = 0; i <= AT_ONCE; ++i) {",
        "rows",
        "index out-of-bounds",
    ),
    "the last block loads one too many": Bug(
        "statistics.cu",
        "for (int i = 0; i < AT_ONCE; ++i)\n                if",
        "for (int i = 0; i <= AT_ONCE; ++i)\n                if",
        "many splits",
        "index out-of-bounds",
    ),
    "a sum too many is begun again": Bug(
        "statistics.cu",
        "for (int e = 0; e < V; ++e) sum[e] = square[e] = 0;",
        "for (int e = 0; e <= V; ++e) sum[e] = square[e] = 0;",
        "outliers first",
        "index out-of-bounds",
    ),
    # Elements
    "the residual is dropped": Bug(
        "normalize.cu", "value += widen(loaded.residual.values[e]);", ";", "masked columns"
    ),
    "a mask byte an element": Bug(
        "normalize.cu",
        "return {element_, element_ / V};",
        "return {element_, element_};",
        "masked columns",
        OUTSIDE,
    ),
    "a mask byte for all vectors of a row": Bug(
        "normalize.cu", "mask_slots + slot_;", "mask_slots;", "masked rows", RACE
    ),
    "edges share their mask bytes with vectors": Bug(
        "normalize.cu",
        "row * (slots + 2 * V) + slots + k",
        "row * (slots + 2 * V) + k",
        "masked rows",
        f"{RACE}|uninitialised",
    ),
    "the backward looks at another bit of the mask": Bug(
        "gradients.cu", "loaded.blocked >> e & 1", "loaded.blocked >> (e ^ 1) & 1", "masked columns"
    ),
    "a gradient passes where the activation's input is zero": Bug(
        "gradients.cu", "return value <= 0;", "return value < 0;", "zeros"
    ),
    "float32 parameters are read as 16 bits": Bug(
        "normalize.cu",
        "if (sizeof(T) == 2 && is_float) return static_cast<const float*>(values)[i];",
        "",
        "wide parameters",
        RACE,
    ),
    "the mean's share of the gradient is dropped": Bug(
        "gradients.cu",
        "return (g + ((x - shift) * factor + constant))",
        "return (g + ((x - shift) * factor))",
        "step columns",
    ),
}


@pytest.fixture
def emulated(cupy):
    needs_emulator(cupy, "tells what is wrong: a GPU might hang, or show nothing")
    return cupy


@pytest.fixture
def plant(monkeypatch, emulated):
    """Return a function that plants a bug in a kernel's source."""

    def plant_bug(file, old, new):
        source, prebuild = kernels.source, emulated.RawModule.prebuild
        text = source(file)
        if text.count(old) != 1:
            raise LookupError(f"{old!r} is {text.count(old)} times in {file}: update this test")
        changed = text.replace(old, new)

        def build(code, names):
            return names if changed in code else prebuild(code, names)  # just the instances in use

        monkeypatch.setattr(emulated.RawModule, "prebuild", staticmethod(build))
        monkeypatch.setattr(kernels, "source", lambda name: changed if name == file else source(name))

    return plant_bug


def expected_failure(error):
    return pytest.raises(EmulatorError if error else AssertionError, match=error)


@pytest.mark.parametrize("name", IN_KERNELS)
def test_bug_in_a_kernel(emulated, plant, name):
    file, old, new, check, error = IN_KERNELS[name]
    plant(file, old, new)
    with expected_failure(error):
        CHECKS[check](emulated)


# ---- Bugs in the launches ----


def passes_changed_by(change, backend):
    def passes(*arguments):
        result = backend._Passes(*arguments)
        change(result)
        return result

    return "_passes", passes


def claim_alignment(backend):
    return "_passes", lambda shape, dtype, aligned, device: backend._Passes(shape, dtype, True, device)


def pass_32_bits(backend):
    def change(passes):
        passes.geometry = tuple(map(np.int32, passes.geometry))

    return passes_changed_by(change, backend)


def pass_an_argument_too_many(backend):
    def change(passes):
        passes.geometry = (*passes.geometry, 1)

    return passes_changed_by(change, backend)


def allocate_partials_of_one_split(backend):
    class Workspace(backend._Workspace):
        def reserve(self, launch, channels):
            return super().reserve(launch._replace(splits=1), channels)

    return "_Workspace", Workspace


def leave_the_counters_as_they_are(backend):
    class Workspace(backend._Workspace):
        def reserve(self, launch, channels):
            self.counters = backend.cupy.empty(launch.groups, "uint32")
            return super().reserve(launch, channels)

    return "_Workspace", Workspace


def forget_the_edges_in_the_mask(backend):
    def change(passes):
        passes.mask_size = math.prod(passes.geometry[:3]) // passes.launch.width

    return passes_changed_by(change, backend)


def take_float32_for_16_bits(backend):
    return "_flags", lambda *arguments: 0


IN_LAUNCHES = [
    (claim_alignment, "misaligned", "misaligned"),
    (pass_32_bits, "rows", r"argument \d+ is int32 \d+; expected int64"),
    (pass_an_argument_too_many, "rows", r"19 arguments for 18 parameters"),
    (allocate_partials_of_one_split, "rows", f"{OUTSIDE} write"),
    (leave_the_counters_as_they_are, "rows", "atomic of uninitialised memory"),
    (forget_the_edges_in_the_mask, "masked rows", f"{OUTSIDE} write"),
    (take_float32_for_16_bits, "wide parameters", None),
]


@pytest.mark.parametrize(
    ("bug", "check", "error"), IN_LAUNCHES, ids=[bug.__name__ for bug, *_ in IN_LAUNCHES]
)
def test_bug_in_a_launch(emulated, monkeypatch, bug, check, error):
    from cupy_syncbn.backends.cuda import operations as cuda_operations

    monkeypatch.setattr(cuda_operations, *bug(cuda_operations))
    with expected_failure(error):
        CHECKS[check](emulated)


# ---- Bugs in what a graph keeps ----


def test_workspaces_that_a_captured_step_releases_early(emulated, monkeypatch):
    from cupy_syncbn.backends.cuda import operations as cuda_operations

    usual = cuda_operations.workspaces_in
    monkeypatch.setattr(cuda_operations, "workspaces_in", lambda found: usual({}))
    with pytest.raises((AssertionError, EmulatorError)) as raised:
        check_captured_step(emulated)
    assert "tests nothing" not in str(raised.value)


def test_workspaces_that_a_capture_by_hand_releases_early(emulated, monkeypatch):
    from cupy_syncbn.backends.cuda import operations as cuda_operations

    monkeypatch.setattr(cuda_operations, "_of_graphs", collections.deque(maxlen=0))
    with pytest.raises(AssertionError, match="writes to what others have"):
        check_capture_by_hand(emulated)


# ---- That it is the bugs that fail ----


@pytest.mark.parametrize("name", CHECKS)
def test_check_passes_without_a_bug(emulated, name):
    CHECKS[name](emulated)


def test_an_unchanged_text_passes(emulated, plant):
    plant("statistics.cu", "__syncthreads();  // publishes the entries", "__syncthreads();")
    CHECKS["rows"](emulated)


def test_a_bug_that_cannot_be_planted_is_an_error(emulated, plant):
    for old in "no such line", "THREADS":
        with pytest.raises(LookupError):
            plant("statistics.cu", old, "")
