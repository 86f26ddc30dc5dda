"""The CUDA emulator itself: right kernels run right under every schedule, and planted bugs are reported."""

import dataclasses
import functools
import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cuda_emulator as emulator
from cuda_emulator import EmulatorError, build, prepass
from support.arrays import BFLOAT16
from support.launcher import TESTS, clean_environment

pytestmark = pytest.mark.mpi_skip

if emulator.available() and "CUPY_SYNCBN_REQUIRE_ALL" not in os.environ:
    pytest.skip(emulator.available(), allow_module_level=True)

KERNELS = Path(__file__).parent / "kernels"
BUGS = [
    "MISSING_BARRIER",
    "MISSING_RELEASE",
    "MISSING_ACQUIRE",
    "LATE_ACQUIRE",
    "ONE_TOO_MANY",
    "SHUFFLE_WIDTH",
]
SUMS = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}

every_schedule = pytest.mark.parametrize("schedule", emulator.SCHEDULES, ids=str)


def sum_kernel(dtype="float32", vector=1, bug="NONE"):
    return f"sum_channels<{SUMS[dtype]}, {vector}, {bug}>"


GOOD_TEMPLATES = [
    *(sum_kernel(dtype, vector) for dtype in SUMS for vector in (1, 4)),
    *(sum_kernel(bug=bug) for bug in BUGS),
    *(f"scale_vectors<{c_type}, {vector}>" for c_type in SUMS.values() for vector in (1, 2, 4)),
    *(f"scale_vectors<{c_type}, 8>" for c_type in ("__half", "__nv_bfloat16")),
    *(f"shuffles<{c_type}>" for c_type in ("int", "float", "double")),
]


@functools.cache
def module(file, mode="checked"):
    """Return one of the files of test kernels as a module that has all of its kernels."""
    code = (KERNELS / file).read_text()
    templates = GOOD_TEMPLATES if file == "good.cu" else ["at_most<64>"]
    names = [*templates, *prepass.extern_c_kernels(code)]
    return emulator.make_cupy(mode).RawModule(code=code, name_expressions=names)


def good(name, mode="checked"):
    return module("good.cu", mode).get_function(name)


def faulty(name):
    return module("faulty.cu").get_function(name)


@pytest.fixture
def cupy():
    emulator.stats.reset()
    return emulator.make_cupy()


def test_available_where_it_must_be():
    assert emulator.available() is None


# ---- Right kernels ----


def run_sums(cupy, rng, kernel, dtype, shape=(3, 500), blocks=4, threads=64):
    """Run sum_channels; return the totals and what they should be."""
    x = rng.integers(-8, 8, shape).astype(dtype)
    partial, total = cupy.empty((shape[0], blocks)), cupy.empty(shape[0])
    arrived = cupy.zeros(shape[0], "uint32")
    kernel((blocks, shape[0]), (threads,), (cupy.asarray(x), shape[1], partial, arrived, total))
    assert not arrived.any()
    return total.get(), x.astype("float64").sum(1)


@every_schedule
@pytest.mark.parametrize("vector", [1, 4])
@pytest.mark.parametrize("dtype", SUMS)
def test_reduction_over_blocks(cupy, rng, schedule, dtype, vector):
    for shape, blocks, threads in [((3, 500), 4, 64), ((1, 1), 1, 32), ((2, 70), 3, 64 * vector)]:
        with emulator.schedule(schedule):
            got, expected = run_sums(
                cupy, rng, good(sum_kernel(dtype, vector)), dtype, shape, blocks, threads
            )
        np.testing.assert_array_equal(got, expected)


def test_fast_mode(rng):
    cupy = emulator.make_cupy("fast")
    emulator.stats.reset()
    got, expected = run_sums(cupy, rng, good(sum_kernel(), "fast"), "float32")
    np.testing.assert_array_equal(got, expected)
    assert emulator.stats.barriers > 0
    assert emulator.stats.reads == 0


def test_what_a_fast_kernel_wrote_counts_as_written(cupy):
    x, y = cupy.ones(32, "float32"), cupy.empty(32, "float32")
    good("scale_vectors<float, 1>", "fast")((1,), (32,), (x, y, np.float32(2), 32))
    z = cupy.empty(32, "float32")
    faulty("add_one")((1,), (32,), (y, z))
    np.testing.assert_array_equal(z.get(), np.full(32, 3))


@pytest.mark.parametrize(
    ("dtype", "vector"),
    [*((dtype, vector) for dtype in SUMS for vector in (1, 2, 4)), ("float16", 8), ("bfloat16", 8)],
)
def test_vectors(cupy, rng, dtype, vector):
    dtype, c_type = np.dtype(dtype) if dtype != "bfloat16" else BFLOAT16, SUMS[dtype]
    x = rng.normal(size=104).astype(dtype)
    y = cupy.empty(104, dtype)
    good(f"scale_vectors<{c_type}, {vector}>")((2,), (32,), (cupy.asarray(x), y, np.float32(1.7), 104))
    np.testing.assert_array_equal(y.get(), (x.astype("float32") * np.float32(1.7)).astype(dtype))


def test_vector_types_of_cuda(cupy, rng):
    x = rng.normal(size=4 * 33).astype("float32")
    y = cupy.empty(x.shape, "float32")
    good("scale_float4")((2,), (32,), (cupy.asarray(x), y, np.float32(2), np.int32(33)))
    np.testing.assert_array_equal(y.get(), 2 * x)

    x = x.astype("float16")
    y = cupy.empty(x.shape, "float16")
    good("scale_half2")((3,), (32,), (cupy.asarray(x), y, np.float32(3), np.int32(66)))
    np.testing.assert_array_equal(y.get(), (3 * x.astype("float32")).astype("float16"))


def test_rounding_to_16_bits(cupy, rng):
    x = np.concatenate(
        [rng.normal(size=200) * 10.0 ** rng.integers(-8, 9, 200), [0, -0.0, 65519, 65520, np.inf]]
    )
    x = x.astype("float32")
    as_half, as_bfloat16 = cupy.empty(x.size, "float16"), cupy.empty(x.size, BFLOAT16)
    good("round_to_16_bits")((1,), (x.size,), (cupy.asarray(x), as_half, as_bfloat16))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(as_half.get().view("uint16"), x.astype("float16").view("uint16"))
    np.testing.assert_array_equal(as_bfloat16.get().view("uint16"), x.astype(BFLOAT16).view("uint16"))


def test_mathematics(cupy):
    y = cupy.empty(9, "float32")
    good("mathematics")((1,), (1,), (cupy.asarray(np.array([4, 9], "float32")), y))
    np.testing.assert_array_equal(y.get(), [37, 0.5, 0.5, 3, 9, 4, 3, 3, 37])


@every_schedule
def test_barriers_and_votes(cupy, schedule):
    x, y = cupy.arange(256, dtype="float32"), cupy.empty(256, "float32")
    votes, warp_votes, halves, exchanged = (
        cupy.empty(n, t) for n, t in [(3, "i"), (3, "I"), (32, "i"), (32, "i")]
    )
    with emulator.schedule(schedule):
        good("reverse_blocks")((2,), (128,), (x, y), shared_mem=128 * 4)
        good("block_votes")((1,), (64,), (votes,))
        good("warp_votes")((1,), (32,), (warp_votes,))
        good("half_warps")((1,), (32,), (halves,))
        good("exchange_in_warp")((1,), (32,), (exchanged,))
    np.testing.assert_array_equal(y.get(), np.arange(256).reshape(2, 128)[:, ::-1].ravel())
    np.testing.assert_array_equal(votes.get(), [40, 1, 0])
    np.testing.assert_array_equal(warp_votes.get(), [sum(1 << lane for lane in range(0, 32, 3)), 1, 0])
    np.testing.assert_array_equal(halves.get(), [3] * 16 + [8] * 16)
    np.testing.assert_array_equal(exchanged.get(), np.arange(32)[::-1])


def shuffle_by_ptx(values, mode, b, width):
    """Return what shfl.sync gives each lane, after its pseudocode in NVIDIA's PTX manual."""
    clamp = 0 if mode == "up" else 0x1F
    segment = (32 - width) & 0x1F
    results = []
    for lane in range(32):
        last, first = (lane & segment) | (clamp & ~segment), lane & segment
        if mode == "up":
            source, inside = lane - b, lane - b >= last
        elif mode == "down":
            source, inside = lane + b, lane + b <= last
        elif mode == "bfly":
            source, inside = lane ^ b, (lane ^ b) <= last
        else:
            source = first | (b & ~segment & 0x1F)
            inside = source <= last
        results.append(values[source if inside else lane])
    return np.array(results)


@pytest.mark.parametrize("c_type", ["int", "float", "double"])
def test_shuffles_are_those_of_ptx(cupy, rng, c_type):
    dtype = {"int": "int32", "float": "float32", "double": "float64"}[c_type]
    x = rng.permutation(32).astype(dtype) * 3
    for width in (1, 2, 4, 8, 16, 32):
        for argument in (0, 1, 2, 3, 5, 8, 15, 16, 31):
            results = [cupy.empty(32, dtype) for _ in range(4)]
            arguments = (cupy.asarray(x), *results, np.int32(argument), np.int32(width))
            good(f"shuffles<{c_type}>")((1,), (32,), arguments)
            for mode, result in zip(("idx", "up", "down", "bfly"), results, strict=True):
                np.testing.assert_array_equal(result.get(), shuffle_by_ptx(x, mode, argument, width))


def test_shuffle_from_a_lane_that_is_not_there(cupy):
    kernel, x = good("shuffle_in_part_of_a_warp"), np.arange(40, dtype="float32")
    y = cupy.empty(40, "float32")
    kernel((1,), (40,), (cupy.asarray(x), y))
    np.testing.assert_array_equal(y.get(), [*x[4:32], *x[28:32], *x[36:], *[np.nan] * 4])
    with emulator.schedule(strict_shuffles=True), pytest.raises(EmulatorError, match="takes no part"):
        kernel((1,), (40,), (cupy.asarray(x), y))


@every_schedule
def test_atomics(cupy, schedule):
    counts = [cupy.zeros(1, dtype) for dtype in ("int32", "uint32", "float32", "float64")]
    with emulator.schedule(schedule):
        good("count_threads")((5,), (96,), tuple(counts))
    assert [count.item() for count in counts] == [480] * 4
    assert emulator.stats.atomics == 4 * 480


@every_schedule
def test_waiting_for_other_threads(cupy, schedule):
    x, arrived, y = cupy.empty(256, "float32"), cupy.zeros(1, "uint32"), cupy.empty(256, "float32")
    flag, value, ready, flag_of_block = (
        array(1, "int32") for array in (cupy.empty, cupy.empty, cupy.zeros, cupy.empty)
    )
    with emulator.schedule(dataclasses.replace(schedule, resident=4)):
        good("grid_barrier")((4,), (64,), (x, arrived, y))
        good("flag_in_block")((1,), (64,), (flag,))
        good("flag_between_blocks")((2,), (1,), (value, ready, flag_of_block))
    np.testing.assert_array_equal(y.get(), np.arange(256)[::-1])
    assert flag.item() == flag_of_block.item() == 42


@every_schedule
def test_indices(cupy, schedule):
    y = cupy.empty((24, 24), "int32")
    with emulator.schedule(schedule):
        good("store_index")((2, 3, 4), (4, 3, 2), (y,))
    np.testing.assert_array_equal(y.get(), 1000 * np.arange(24)[:, None] + np.arange(24))


def test_random_schedules_differ_by_seed_and_repeat(cupy):
    def switches(seed):
        emulator.stats.reset()
        with emulator.schedule(order="random", seed=seed, resident=2, preempt=50):
            good("count_threads")((3,), (64,), tuple(cupy.zeros(1, t) for t in ("i", "I", "f", "d")))
        return emulator.stats.switches

    assert switches(1) == switches(1)
    assert len({switches(seed) for seed in range(5)}) > 1


def test_the_checks_are_in_place(cupy):
    """Without its hooks, a checked kernel would find no fault in anything."""
    faulty("add_one")((1,), (32,), (cupy.ones(32, "float32"), cupy.empty(32, "float32")))
    stats = emulator.stats
    assert (stats.reads, stats.writes, stats.read_bytes, stats.write_bytes) == (32, 32, 128, 128)
    assert stats.launches == [("add_one", (1, 1, 1), (32, 1, 1))]


# ---- Planted bugs ----


@pytest.mark.parametrize("bug", BUGS)
def test_bug_in_a_reduction(cupy, rng, bug):
    messages = {
        "MISSING_BARRIER": "(data race|read of uninitialised memory)",
        "ONE_TOO_MANY": "out-of-bounds read of 4 bytes",
        "SHUFFLE_WIDTH": None,  # no fault but in the result
    }
    message = messages.get(bug, "data race")
    for schedule in emulator.SCHEDULES:
        with emulator.schedule(schedule):
            if message is None:
                got, expected = run_sums(cupy, rng, good(sum_kernel(bug=bug)), "float32")
                assert not np.allclose(got, expected)
            else:
                with pytest.raises(EmulatorError, match=f"{message}.*\n  at kernels.cu:"):
                    run_sums(cupy, rng, good(sum_kernel(bug=bug)), "float32")


OUT_OF_BOUNDS = "out-of-bounds (read|write) of 4 bytes"
# name: (blocks, threads, arguments, message); an argument n is an array of n int32
FAULTS = {
    "read_past_the_end": (1, 1, (np.ones(64, "f"), np.int32(64), np.ones(1, "f")), OUT_OF_BOUNDS),
    "write_before_the_beginning": (1, 1, (np.ones(1, "f"),), OUT_OF_BOUNDS),
    "static_shared_overrun": (1, 64, (64,), OUT_OF_BOUNDS + ".*'values' at byte 256 of 256"),
    "static_shared_index": (1, 64, (64,), "index out-of-bounds"),
    "dynamic_shared_overrun": (1, 64, (64,), OUT_OF_BOUNDS + ".*'dynamic shared memory' at byte 256 of 256"),
    "too_much_shared": (1, 32, (32,), "memory' brings the block's shared memory to 49408 bytes, of 49152"),
    "null_pointer": (1, 1, (0, np.ones(1, "f")), "null pointer"),
    "local_of_another_thread": (
        1,
        32,
        (np.ones(32, "Q"), 32),
        "out-of-bounds read of 4 bytes .* near no array",
    ),
    "uninitialised_shared": (1, 32, (np.ones(32, "f"),), "read of uninitialised memory: 'values' at byte"),
    "missing_barrier": (1, 64, (64,), "data race|uninitialised"),
    "reuse_without_barrier": (1, 64, (64,), "data race: this (write and a read|read and a write)"),
    "shuffle_as_barrier": (1, 32, (32,), "data race|uninitialised"),
    "lost_update": (2, 1, (1,), "data race"),
    "same_place_from_two_blocks": (2, 32, (32,), "data race: this write and a write by block"),
    "write_after_read_in_another_block": (
        2,
        32,
        (32, 32),
        "data race: this (write and a read|read and a write)",
    ),
    "one_reader_of_three": (1, 96, (3,), "data race: this (write and a read|read and a write)"),
    "second_of_two_readers": (1, 64, (2,), "data race: this (write and a read|read and a write)"),
    "fence_by_another_warp": (2, 64, (1, np.zeros(1, "I"), 1), "data race"),
    "atomic_and_plain": (1, 64, (1,), "data race: this (atomic|write) and a write"),
    "read_only_load_of_what_is_written": (1, 32, (32, 32), "__ldg of what .* writes in the same launch"),
    "barrier_after_exit": (
        1,
        64,
        (64,),
        "divergent barrier.*62 threads at __syncthreads .*; 2 threads exited",
    ),
    "two_barriers": (1, 64, (64,), "barrier divergence: .* waits in __syncthreads at kernels.cu:"),
    "more_barriers_in_later_warps": (1, 64, (64,), "32 threads at __syncthreads .*; 32 threads exited"),
    "shuffle_in_a_branch": (1, 32, (32,), "exited"),
    "shuffle_and_barrier": (1, 32, (32,), "8 threads at __shfl_xor_sync .*; 24 threads at __syncthreads"),
    "not_in_its_mask": (1, 32, (32,), "is not in its own mask 0000ffff"),
    "shuffle_of_width_12": (1, 32, (32,), "the width is 12"),
    "divide": (1, 1, (np.int32(1), np.int32(0), 1), "undefined behaviour: division by zero"),
    "multiply": (1, 1, (np.int32(1 << 20), np.int32(1 << 20), 1), "undefined behaviour: overflow of \\*"),
    "shift": (1, 1, (np.int32(1), np.int32(32), 1), "undefined behaviour: shift out of bounds"),
    "trap": (1, 1, (), "the kernel called __trap"),
}


def arguments_of(cupy, arguments):
    def make(argument):
        if isinstance(argument, np.ndarray):
            return cupy.asarray(argument)
        if type(argument) is int and argument:
            return cupy.zeros(argument, "int32")
        return argument

    return tuple(map(make, arguments))


@every_schedule
@pytest.mark.parametrize("name", FAULTS)
def test_fault(cupy, name, schedule):
    grid, block, arguments, message = FAULTS[name]
    together = dataclasses.replace(schedule, resident=4)  # some wait for another block
    with emulator.schedule(together), pytest.raises(EmulatorError, match=message) as error:
        faulty(name)((grid,), (block,), arguments_of(cupy, arguments), shared_mem=256)
    text = str(error.value)
    assert text.startswith(f"{name}: ")
    if name not in ("barrier_after_exit", "too_much_shared"):
        source = (KERNELS / "faulty.cu").read_text().splitlines()
        first = next(i for i, line in enumerate(source, 1) if f" {name}(" in line)
        assert any(f"kernels.cu:{line}" in text for line in range(first, first + 20)), text


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("load_16_bytes", "float32", 4),
        ("load_float4", "float32", 4),
        ("load_float", "uint8", 4),
        ("load_double", "float32", 2),
        ("hinted_load", "float32", 4),
        ("hinted_store", "float32", 4),
    ],
)
def test_misaligned(cupy, name, dtype, size):
    x = cupy.ones(64, dtype)
    y = cupy.empty(1, "float64" if name == "load_double" else "float32")
    for offset in range(2 * size):
        if offset % size == 0:
            faulty(name)((1,), (1,), (x, np.int32(offset), y))
        else:
            with pytest.raises(EmulatorError, match=r"misaligned(.|\n)* at kernels\.cu:"):
                faulty(name)((1,), (1,), (x, np.int32(offset), y))


def test_access_that_ends_outside(cupy):
    with pytest.raises(EmulatorError, match=r"out-of-bounds read of 8 bytes: 'float32\[3\]' at byte 8 of 12"):
        faulty("load_double")((1,), (1,), (cupy.ones(3, "float32"), np.int32(2), cupy.empty(1)))


@every_schedule
def test_exited_threads_may_be_allowed(cupy, schedule):
    y = cupy.zeros(64, "int32")
    with emulator.schedule(schedule, allow_exited=True):
        faulty("barrier_after_exit")((1,), (64,), (y,))
        np.testing.assert_array_equal(y.get(), [0, *[1] * 62, 0])
        faulty("shuffle_in_a_branch")((1,), (32,), (y,))
        np.testing.assert_array_equal(y.get()[:8], [1, 0, 3, 2, 5, 4, 7, 6])


def test_livelock(cupy):
    with emulator.schedule(switch_limit=20_000), pytest.raises(EmulatorError, match="livelock"):
        faulty("wait_for_nobody")((1,), (32,), (cupy.zeros(1, "uint32"),))
    # Blocks that wait for one that is not resident.
    arrays = cupy.empty(256, "float32"), cupy.zeros(1, "uint32"), cupy.empty(256, "float32")
    with emulator.schedule(switch_limit=20_000), pytest.raises(EmulatorError, match="livelock"):
        good("grid_barrier")((4,), (64,), arrays)


def test_line_numbers_follow_line_directives(cupy):
    with pytest.raises(EmulatorError, match=r"at named_by_a_directive\.cu:1001 in fault_in_named_file"):
        faulty("fault_in_named_file")((1,), (1,), (cupy.ones(4, "float32"),))


def test_a_launch_works_after_a_failed_one(cupy):
    for _ in range(3):
        with pytest.raises(EmulatorError):
            faulty("two_barriers")((1,), (64,), (cupy.zeros(64, "int32"),))
        y = cupy.empty(32, "int32")
        good("exchange_in_warp")((1,), (32,), (y,))
        np.testing.assert_array_equal(y.get(), np.arange(32)[::-1])


# ---- Device memory ----


def add_one(cupy, x, y=None):
    y = cupy.empty(x.shape, "float32") if y is None else y
    faulty("add_one")((1,), (x.size,), (x, y))
    return y


def test_reading_what_nobody_has_written(cupy):
    x = cupy.empty(32, "float32")
    assert np.isnan(x.get()).all()
    with pytest.raises(
        EmulatorError, match=r"uninitialised memory: 'float32\[32\]' at byte 0 of 128.*\n.*\n.*arg.* 0"
    ):
        add_one(cupy, x)
    x[:31] = 1
    with pytest.raises(EmulatorError, match="at byte 124 of 128"):
        add_one(cupy, x)
    with pytest.raises(EmulatorError, match="at byte 124 of 128"):
        add_one(cupy, x.copy())
    with pytest.raises(EmulatorError, match="atomic of uninitialised memory"):
        faulty("count_up")((1,), (1,), (cupy.empty(1, "uint32"),))
    x[31:] = 2
    add_one(cupy, add_one(cupy, x))  # what a kernel wrote may be read by the next


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.set(np.ones(32, "float32")),
        lambda x: x.fill(1),
        lambda x: x.__setitem__(..., 1),
        lambda x: np.multiply(3, 2, out=x),
        lambda x: x.reshape(2, 4, 4).transpose(2, 0, 1).__setitem__(slice(None), 1),
        lambda x: (x[::2].fill(1), x[::-2].fill(2)),
    ],
)
def test_what_the_host_writes_counts_as_written(cupy, write):
    x = cupy.empty(32, "float32")
    write(x)
    add_one(cupy, x)


def test_views_have_the_bounds_of_their_allocation_and_no_more(cupy):
    x, y = cupy.ones(32, "float32"), cupy.empty(32, "float32")
    assert x.data.ptr % 512 == 0
    assert x.data.ptr % 1024 != 0  # a larger alignment is no more to be relied on than on a GPU
    assert x[3:].data.ptr == x.data.ptr + 12
    faulty("add_one")((1,), (29,), (x[3:], y))
    with pytest.raises(EmulatorError, match="out-of-bounds read"):
        faulty("add_one")((1,), (32,), (x[3:], y))


def test_freed_memory(cupy):
    x = cupy.ones(32, "float32")
    pointer = x.data.ptr
    addresses = cupy.asarray(np.full(32, pointer, "uint64"))
    del x
    with pytest.raises(EmulatorError, match="has been freed"):
        good("read_at")((1,), (1,), (addresses, cupy.empty(1, "float32")))


def test_record_of_memory(cupy):
    gc.collect()
    memory = emulator.memory
    memory.reset_peak()
    count, live = memory.live_count, memory.live_bytes
    x = cupy.empty((4, 8), "float32")
    view = x[1:].T
    assert (memory.live_count, memory.live_bytes) == (count + 1, live + 128)
    y = x + x
    del x, y
    assert (memory.live_count, memory.live_bytes) == (count + 1, live + 128)  # the view keeps it
    del view
    assert (memory.live_count, memory.live_bytes) == (count, live)
    assert memory.peak_bytes == live + 256
    assert cupy.zeros((0, 3)).data.ptr == 0
    assert memory.live_count == count


# ---- Launch arguments ----


def test_parameters(cupy):
    x, y = cupy.asarray(np.array([7], "int32")), cupy.empty(8)
    rest = True, np.int32(-3), np.uint32(4), 1 << 40, np.float32(0.5), 0.25, y
    good("parameters")((1,), (1,), (x, x, *rest))
    np.testing.assert_array_equal(y.get(), [7, 1, 1, -3, 4, 2.0**40, 0.5, 0.25])
    good("parameters")((1,), (1,), (0, np.int64(0), *rest))
    np.testing.assert_array_equal(y.get()[:2], [-1, 0])


@pytest.mark.parametrize(
    ("number", "argument", "message"),
    [
        (0, np.zeros(1, "int64"), r"argument 0 is a pointer to int64; expected a pointer to int32"),
        (0, np.zeros(1, "uint32"), r"argument 0 is a pointer to uint32"),
        (0, 16, r"argument 0 is int64 16, no address; expected a pointer to int32"),
        (0, np.int32(0), r"argument 0 is int32 0, no address"),
        (2, 1, r"argument 2 is int64 1; expected bool"),
        (3, 1, r"argument 3 is int64 1; expected int32"),
        (3, np.uint32(1), r"argument 3 is uint32 1; expected int32"),
        (5, np.int32(1), r"argument 5 is int32 1; expected int64"),
        (6, 0.5, r"argument 6 is float64 0.5; expected float32"),
        (6, np.zeros(1, "float32"), r"argument 6 is a pointer to float32; expected float32"),
        (7, np.float32(0.5), r"argument 7 is float32 0.5; expected float64"),
    ],
)
def test_arguments_of_another_type(cupy, number, argument, message):
    arguments = [0, 0, True, np.int32(-3), np.uint32(4), 1 << 40, np.float32(0.5), 0.25, cupy.empty(8)]
    arguments[number] = cupy.asarray(argument) if isinstance(argument, np.ndarray) else argument
    with pytest.raises(EmulatorError, match=f"parameters: {message}"):
        good("parameters")((1,), (1,), tuple(arguments))


@pytest.mark.parametrize("argument", [None, np.zeros(1, "int32"), "text"])
def test_arguments_that_cupy_does_not_take(cupy, argument):
    rest = True, np.int32(-3), np.uint32(4), 1 << 40, np.float32(0.5), 0.25, cupy.empty(8)
    with pytest.raises(TypeError, match="Unsupported type"):
        good("parameters")((1,), (1,), (argument, 0, *rest))


@pytest.mark.parametrize(
    ("grid", "block", "shared_mem", "message"),
    [
        ((0,), (32,), 0, "grid.x is 0"),
        ((1, 65536), (32,), 0, "grid.y is 65536"),
        ((1, 1, 65536), (32,), 0, "grid.z is 65536"),
        ((2**31,), (32,), 0, "grid.x is 2147483648"),
        ((65535, 65535), (32,), 0, "too much for the emulator"),
        ((1,), (1025,), 0, "block.x is 1025"),
        ((1,), (1, 1, 65), 0, "block.z is 65"),
        ((1,), (32, 33), 0, "more than 1024 threads"),
        ((1,), (32,), 49153, "shared_mem is 49153"),
        ((1,), (96,), 0, "more threads than __launch_bounds__ allows, at kernels.cu:"),
    ],
)
def test_shapes_of_a_launch(cupy, grid, block, shared_mem, message):
    kernel = faulty("at_most<64>")
    kernel((1,), (64,), (cupy.empty(64, "int32"),))
    with pytest.raises(EmulatorError, match=message):
        kernel(grid, block, (cupy.empty(64, "int32"),), shared_mem=shared_mem)


def test_other_mistakes_of_a_launch(cupy):
    kernel = faulty("at_most<64>")
    with pytest.raises(EmulatorError, match="2 arguments for 1 parameters"):
        kernel((1,), (64,), (0, 0))
    with pytest.raises(TypeError, match="expected a tuple as block"):
        kernel((1,), 64, (0,))
    cupy.RawModule.prebuild = lambda code, names: ["store<1>", "store<2>"]
    with pytest.raises(EmulatorError, match="NOT_FOUND"):
        cupy.RawModule(code=TINY, name_expressions=["store<1>"]).get_function("store<2>")
    cupy.RawModule.prebuild = None
    broken = cupy.RawModule(code='extern "C" __global__ void broken() { no_such_name; }')
    with pytest.raises(emulator.BuildError, match=r"kernels\.cu:1:.*no_such_name"):
        broken.get_function("broken")


# ---- The stand-in for CuPy ----


def test_no_mixing_with_numpy(cupy):
    x, host = cupy.ones((2, 3), "float32"), np.ones((2, 3), "float32")
    assert not isinstance(x, np.ndarray)
    for mixed in (
        lambda: x + host,
        lambda: host + x,
        lambda: x * host[0, 0, None],
        lambda: x * np.array(2.0),
        lambda: np.add(x, host),
        lambda: x.__setitem__(..., host),
        lambda: x.__iadd__(host),
        lambda: np.add(host, host, out=x),
    ):
        with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy\.ndarray'>"):
            mixed()
    for converted in (
        lambda: np.asarray(x),
        lambda: np.array(x),
        lambda: host.__setitem__(..., x),
        lambda: np.testing.assert_array_equal(x, host),
        lambda: np.frombuffer(x),
    ):
        with pytest.raises((TypeError, ValueError)):
            converted()
    with pytest.raises(TypeError, match=r"Implicit conversion to a NumPy array is not allowed.*\.get\(\)"):
        np.asarray(x)
    with pytest.raises(TypeError):
        host += x


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", BFLOAT16, "int64", "bool"], ids=str)
def test_transfers(cupy, rng, dtype):
    host = rng.integers(0, 2, (2, 3, 4)).astype(dtype)
    x = cupy.asarray(host)
    assert (x.shape, x.dtype, x.ndim, x.size, x.nbytes) == (host.shape, host.dtype, 3, 24, host.nbytes)
    back = x.get()
    assert type(back) is np.ndarray
    np.testing.assert_array_equal(back, host)
    np.testing.assert_array_equal(cupy.asnumpy(x.T), host.T)
    np.testing.assert_array_equal(x.transpose(1, 0, 2)[1:, :, ::2].get(), host.transpose(1, 0, 2)[1:, :, ::2])
    out = np.empty_like(host)
    assert x.get(out=out) is out
    np.testing.assert_array_equal(out, host)
    y = cupy.zeros_like(x)
    y.set(host)
    assert y.tolist() == host.tolist()
    assert x.astype(dtype, copy=False) is x
    assert cupy.asarray(x) is x
    assert not cupy.shares_memory(cupy.array(x), x)


def test_errors_of_set_and_get(cupy):
    x = cupy.zeros((2, 3), "float32")
    with pytest.raises(TypeError, match="float64 array cannot be set to float32 array"):
        x.set(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="Shape mismatch"):
        x.set(np.zeros((3, 2), "float32"))
    with pytest.raises(RuntimeError, match="non-contiguous"):
        x[:, ::2].set(np.zeros((2, 2), "float32"))
    with pytest.raises(TypeError, match="cannot be obtained"):
        x.get(out=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="Shape mismatch"):
        x.get(out=np.zeros((3, 2), "float32"))


def test_views(cupy):
    x = cupy.arange(24, dtype="float32").reshape(2, 3, 4)
    for view in (
        x.T,
        x[1],
        x[:, ::2],
        x.reshape(6, 4),
        x.ravel(),
        x[1, 2, 3],
        x.view("int32"),
        x[None],
        x[...],
    ):
        assert cupy.shares_memory(view, x)
    x[1, 2, 3] = -1
    assert x.ravel()[-1].item() == -1
    assert (x[1, 2, 3].shape, float(x[1, 2, 3]), int(x[0, 0, 1])) == ((), -1, 1)
    turned = x.transpose(0, 2, 1)
    assert not turned.flags.c_contiguous
    assert not cupy.shares_memory(turned.reshape(-1), x)
    assert cupy.ascontiguousarray(turned).flags.c_contiguous
    last = x.transpose(1, 2, 0)  # in no order of its own: the copies that keep it, and those that do not
    for copy in (cupy.empty_like(last), last.astype("float64"), cupy.array(last), cupy.zeros_like(last)):
        assert np.argsort(copy.strides).tolist() == np.argsort(last.strides).tolist()
    for copy in (last.copy(), cupy.empty_like(last, order="C"), cupy.asarray(last.get(order="K"))):
        assert copy.flags.c_contiguous
    assert len(x) == 2
    assert [row.shape for row in x] == [(3, 4)] * 2


def test_computing(cupy):
    x = cupy.asarray(np.array([1, 2, 3], "float32"))
    y = (2 * x + 1) / x - x**2
    assert isinstance(y, cupy.ndarray)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y.get(), np.array([2, -1.5, -20 / 3]), rtol=1e-6)
    np.testing.assert_array_equal(np.sqrt(x * x).get(), x.get())
    x += x
    x *= np.float32(0.5)
    np.testing.assert_array_equal((x > 1).get(), [False, True, True])
    assert isinstance(x.sum(), cupy.ndarray)
    assert (float(x.sum()), int(x.max()), x.min().item(), bool((x > 0).all()), bool(x.any())) == (
        6,
        3,
        1,
        True,
        True,
    )
    np.testing.assert_array_equal(x[x > 1].get(), [2, 3])
    assert not np.isfinite(x / 0).any()  # without a warning
    half = x.astype(BFLOAT16)
    assert (half * half).dtype == BFLOAT16


def test_other_objects_on_the_device(cupy):
    x = cupy.arange(12, dtype="float32").reshape(3, 4)

    class Tensor:
        __cuda_array_interface__ = x[1:, ::2].__cuda_array_interface__

    y = cupy.asarray(Tensor())
    assert cupy.shares_memory(x, y)
    np.testing.assert_array_equal(y.get(), x.get()[1:, ::2])
    assert x.__dlpack_device__() == (2, 0)
    assert cupy.shares_memory(cupy.from_dlpack(x), x)
    with pytest.raises(TypeError, match="Unsupported array type on device 1"):
        cupy.from_dlpack(np.zeros(3))


def test_mpi_takes_the_device_pointer(cupy, world):
    x, y = cupy.arange(4, dtype="float64"), cupy.empty(4)
    world.comm.Sendrecv(x, world.rank, recvbuf=y, source=world.rank)
    np.testing.assert_array_equal(y.get(), x.get())


def test_devices(cupy, monkeypatch):
    monkeypatch.setattr(emulator.devices, "count", 2)
    runtime = cupy.cuda.runtime
    assert runtime.getDeviceCount() == 2
    with cupy.cuda.Device(1):
        assert runtime.getDevice() == 1
        x = cupy.ones(32, "float32")
    assert (x.device.id, runtime.getDevice()) == (1, 0)
    with pytest.raises(EmulatorError, match="argument 0 is an array on <CUDA Device 1>"):
        add_one(cupy, x)
    with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorInvalidDevice") as error:
        cupy.cuda.Device(2).use()
    assert error.value.status == 101
    monkeypatch.setitem(emulator.devices.attributes, "MultiProcessorCount", 7)
    assert cupy.cuda.Device().attributes["MultiProcessorCount"] == 7


def test_streams(cupy):
    cuda = cupy.cuda
    assert cuda.get_current_stream() == cuda.Stream.null
    assert cuda.get_current_stream().ptr == 0
    with cuda.Stream() as stream:
        assert cuda.get_current_stream() is stream
        assert stream.ptr not in (0, cuda.Stream().ptr)
        start, end = cuda.Event(), stream.record()
        start.record()
        end.synchronize()
        assert cuda.get_elapsed_time(start, end) <= 0
        stream.begin_capture()
        assert cuda.runtime.streamIsCapturing(stream.ptr)
        with pytest.raises(cuda.runtime.CUDARuntimeError, match="Capture"):
            stream.synchronize()
        stream.end_capture()
        stream.synchronize()
    assert cuda.get_current_stream() == cuda.Stream.null


def test_pinned_memory(cupy):
    memory = cupy.cuda.alloc_pinned_memory(40)
    array = np.frombuffer(memory, "float64", 5)
    assert np.isnan(array).all()
    array[:] = 1
    assert np.frombuffer(memory, "float64").size > 5  # the pool's pieces are larger than asked for
    assert memory.ptr == array.ctypes.data


def test_names_are_those_of_cupy(cupy):
    """What the stand-in offers, and CuPy has not, would work in the tests only."""
    real = pytest.importorskip("cupy")

    def unknown(ours, theirs):
        names = {name for name in vars(ours) if not name.startswith("_")}
        return {name for name in names if not hasattr(theirs, name)}

    assert not unknown(cupy, real)
    assert not unknown(cupy.ndarray, real.ndarray)
    assert not unknown(cupy.cuda, real.cuda)
    assert not unknown(cupy.cuda.runtime, real.cuda.runtime)
    for name in ("Device", "Event", "ExternalStream", "Stream"):
        assert not unknown(getattr(cupy.cuda, name), getattr(real.cuda, name))


def test_installed():
    before = sys.modules.get("cupy")
    with emulator.installed() as stand_in:
        import cupy
        import cupy.cuda
        from cupy.cuda import runtime

        assert cupy is stand_in
        assert runtime is stand_in.cuda.runtime
        assert cupy.get_array_module(cupy.ones(1)) is cupy
        assert cupy.get_array_module(np.ones(1)) is np
        with pytest.raises(AttributeError, match=r"has no cupy\.no_such_name"):
            _ = cupy.no_such_name
        assert cupy.cuda.is_available()
    assert sys.modules.get("cupy") is before


# ---- Building ----

TINY = "template <int n> __global__ void store(int* y) { __shared__ int s[n]; s[0] = n; y[0] = s[0]; }"


def start_python(program, **variables):
    path = os.pathsep.join([str(TESTS), *sys.path])
    environment = clean_environment(PYTHONPATH=path, **variables)
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_prebuild_builds_together(cupy, monkeypatch):
    built = []
    build_kernels = build.build_kernels
    monkeypatch.setattr(build, "build_kernels", lambda *args: built.append(args[1]) or build_kernels(*args))
    cupy.RawModule.prebuild = lambda code, names: [f"store<{n}>" for n in (1, 2, 3)]
    for n in (1, 2, 3, 4):
        y = cupy.empty(1, "int32")
        module = cupy.RawModule(code=TINY, name_expressions=[f"store<{n}>"])
        module.get_function(f"store<{n}>")((1,), (1,), (y,))
        assert y.item() == n
    assert built == [("store<1>", "store<2>", "store<3>"), ("store<1>", "store<2>", "store<3>", "store<4>")]


@pytest.mark.long
def test_processes_may_build_at_once(tmp_path):
    program = f"""
import cuda_emulator
cupy = cuda_emulator.make_cupy()
y = cupy.empty(1, "int32")
module = cupy.RawModule(code={TINY!r}, name_expressions=["store<5>"])
module.get_function("store<5>")((1,), (1,), (y,))
print(y.item())
"""
    processes = [start_python(program, CUPY_SYNCBN_EMULATOR_CACHE=str(tmp_path)) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == ["5"] * 3
    assert len(list(tmp_path.glob("kernels-*.so"))) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_prepass_keeps_lines_and_comments_apart():
    source = """// __shared__ int not_this[3];
__global__ void __launch_bounds__(
    256) f() {
    __shared__ alignas(16) float
        a[2][3]; /* __shared__
    int nor_this; */ extern __shared__ double b[];
#line 7 "path//file.cu"
}
"""
    rewritten = prepass.rewrite(source)
    assert rewritten.count("\n") == source.count("\n")
    assert "not_this" not in rewritten
    assert "nor_this" not in rewritten
    assert "typedef alignas(16) float emu_type_a[2][3];" in rewritten
    assert "double* b = static_cast<double*>(emu_dynamic_shared());" in rewritten
    assert "{ emu::launch_bounds(256);" in rewritten
    assert '#line 7 "path//file.cu"' in rewritten


def test_the_switch_by_ucontext(tmp_path):
    """Machines other than x86-64 switch threads in another way, which this one can do as well."""
    library = tmp_path / "runtime.so"
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DEMU_UCONTEXT", str(build.NATIVE / "runtime.cpp")]
    subprocess.run([build.compiler(), *options, "-o", str(library), "-ldl"], check=True)
    program = f"""
from pathlib import Path
import cuda_emulator
from cuda_emulator import build
build.build_runtime = lambda: Path({str(library)!r})
cupy = cuda_emulator.make_cupy()
y = cupy.empty(32, "int32")
module = cupy.RawModule(code=Path({str(KERNELS / "good.cu")!r}).read_text())
module.get_function("exchange_in_warp")((1,), (32,), (y,))
print(y.tolist())
"""
    process = start_python(program)
    assert process.communicate()[0].strip() == str(list(range(32))[::-1])
