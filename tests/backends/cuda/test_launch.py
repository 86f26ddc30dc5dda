"""How a tensor is shared among blocks and threads, by a model of the walk that common.cuh describes."""

import re

import numpy as np
import pytest

from cupy_syncbn.backends.cuda import kernels
from cupy_syncbn.backends.cuda.launch import (
    AMPLE,
    BLOCKS,
    MAX_GROUP,
    MAX_ITEMS,
    MAX_SPLITS,
    MIN_BLOCKS,
    MIN_ITEMS,
    THREADS,
    launch_for,
    resident,
)

pytestmark = pytest.mark.mpi_skip

COMMON = kernels.source("common.cuh")
REGISTERS = 65536  # a multiprocessor's
H200 = 132  # its multiprocessors


def constant(name):
    return int(re.search(rf"constexpr int {name} = (\d+);", COMMON)[1])


def ceil(a, b):
    return -(-a // b)


def accesses(shape, launch, group, split):
    """Return the first elements of the vectors that a block's threads visit, and the single elements beside.

    `group` and `split` may be arrays of one shape: then it is those of all these blocks.
    """
    group, split = (np.reshape(np.asarray(index, np.int64), (-1, 1, 1)) for index in (group, split))
    walk = _columns if launch.columns else _rows
    vectors, edges = walk(shape, launch, group, split)
    return np.sort(vectors), np.sort(edges)


def _columns(shape, launch, group, split):
    """Return what threads visit in a matrix of N rows and C*S columns; the axes are block, row, thread."""
    N, C, S = shape
    thread = np.arange(THREADS)
    height = THREADS // launch.lanes
    column = group * launch.group * S + thread % launch.lanes * launch.width
    row = split * launch.per_split + thread // launch.lanes
    row = row + np.arange(ceil(launch.per_split, height))[:, None] * height
    there = row < np.minimum(N, (split + 1) * launch.per_split)
    there = there & (column < np.minimum(group * launch.group + launch.group, C) * S)
    there = there & (thread < launch.lanes * height)
    return (row * (C * S) + column)[there], np.empty(0, np.int64)


def _rows(shape, launch, group, split):
    """Return what threads visit in the rows of a channel; the axes are block, vector, thread."""
    N, C, S = shape
    width = launch.width
    slots = max(S // width, 1)  # vectors per row, where it is aligned
    number = split * launch.per_split + np.arange(THREADS)
    number = number + np.arange(ceil(launch.per_split, THREADS))[:, None] * THREADS
    begin = (number // slots * C + group) * S
    head = -begin % width
    place = head + number % slots * width
    there = number < np.minimum(N * slots, (split + 1) * launch.per_split)
    vectors = (begin + place)[there & (place + width <= S)]
    if width == 1 or S % width == 0:
        return vectors, np.empty(0, np.int64)

    rows = ceil(N, launch.splits)
    n = split * rows + np.arange(rows)[:, None]
    begin = (n * C + group) * S
    head = np.minimum(-begin % width, S)
    rest = head + (S - head) // width * width
    edge = np.arange(width)
    there = n < np.minimum(N, (split + 1) * rows)
    before, behind = begin + edge, begin + rest + edge
    return vectors, np.concatenate([before[there & (edge < head)], behind[there & (rest + edge < S)]])


def all_accesses(shape, launch):
    split, group = divmod(np.arange(launch.blocks), launch.groups)
    return accesses(shape, launch, group, split)


def assert_each_element_once(shape, launch):
    vectors, edges = all_accesses(shape, launch)
    if launch.width > 1:
        assert not (vectors % launch.width).any(), "a vector is misaligned"
    visits = np.zeros(np.prod(shape), np.int64)
    for e in range(launch.width):
        np.add.at(visits, vectors + e, 1)
    np.add.at(visits, edges, 1)
    assert (visits == 1).all()


def assert_within_limits(shape, itemsize, aligned, launch):
    N, C, S = shape
    unit = THREADS // launch.lanes if launch.columns else THREADS
    assert launch.width in (1, kernels.vector_width(itemsize))
    assert aligned or launch.width == 1
    assert 1 <= launch.lanes <= THREADS
    assert 1 <= launch.group <= MAX_GROUP
    assert unit <= launch.per_split
    assert launch.per_split <= MAX_ITEMS * unit or launch.splits > MAX_SPLITS / 2
    assert launch.splits <= MAX_SPLITS
    assert launch.groups == ceil(C, launch.group)
    assert 1 <= launch.blocks < 2**31
    if launch.columns:
        assert C * S % launch.width == launch.group * S % launch.width == 0
        assert launch.lanes * launch.width == launch.group * S
        assert launch.lanes * unit > THREADS / 2, "more threads are idle than not"
        assert (launch.splits - 1) * launch.per_split < max(N, 1), "a block has nothing to do"
    else:
        assert launch.group == 1
        assert (launch.splits - 1) * launch.per_split < max(N * max(S // launch.width, 1), 1)


SIZES_OF_MAPS = [
    1,
    2,
    3,
    4,
    7,
    8,
    16,
    31,
    33,
    49,
    63,
    64,
    65,
    128,
    129,
    257,
    300,
    1000,
    1023,
    1025,
    2056,
    4100,
]


def small_shapes(count):
    """Draw shapes of at most 40000 elements, with what a launch depends on beside."""
    rng = np.random.default_rng(7)
    for _ in range(count):
        S = int(rng.choice(SIZES_OF_MAPS))
        C = int(rng.choice([c for c in (1, 2, 3, 4, 7, 31, 33, 64, 257, 520) if c * S <= 40000]))
        N = int(rng.integers(0, min(40000 // (C * S), 3000) + 1))
        yield (N, C, S), int(rng.choice([2, 4, 8])), bool(rng.integers(4)), int(rng.choice([1, 2, 16, 132]))


@pytest.mark.parametrize("count", [250, pytest.param(1000, marks=pytest.mark.long)])
def test_each_element_is_visited_once(count):
    kinds = set()
    for shape, itemsize, aligned, multiprocessors in small_shapes(count):
        launch = launch_for(shape, itemsize, aligned, multiprocessors)
        assert_each_element_once(shape, launch)
        kinds.add((launch.columns, launch.width, launch.splits > 1, launch.group > 1))
    # Of columns and rows, every width, with one split and several, in groups of one channel and of several.
    assert len(kinds) == 4 * 4 + 4 * 2


@pytest.mark.parametrize("splits", [1, 2, 5, 40])
def test_each_element_is_visited_once_in_any_number_of_splits(splits):
    """The kernels rely on no number of blocks: there may be more than there is work for."""
    for shape, itemsize, aligned, _ in small_shapes(60):
        launch = launch_for(shape, itemsize, aligned, 1)
        items = ceil(launch.splits * launch.per_split, splits)
        assert_each_element_once(shape, launch._replace(per_split=max(items, 1), splits=splits))


@pytest.mark.parametrize("shape", [(400, 33, 7), (50, 3, 1025)], ids=str)
@pytest.mark.parametrize("wrong", ["splits", "per_split", "lanes", "group"])
def test_the_model_can_fail(shape, wrong):
    launch = launch_for(shape, 4, True, 2)
    assert launch.splits > 1
    assert_each_element_once(shape, launch)
    if launch.columns or wrong not in ("lanes", "group"):
        changed = launch._replace(**{wrong: getattr(launch, wrong) * 3 // 4})
        with pytest.raises(AssertionError):
            assert_each_element_once(shape, changed)


def large_shapes(count):
    """Draw shapes of up to 2^36 elements whose sizes are of all magnitudes."""
    rng = np.random.default_rng(11)
    for _ in range(count):
        shares = rng.dirichlet([0.7, 0.7, 0.7]) * rng.uniform(0, 36)
        N, C, S = (int(size) for size in 2**shares)
        S = min(S, 2**31 - 1)
        if rng.integers(3) == 0:
            S = 1
        yield (N, C, S), int(rng.choice([2, 4, 8])), bool(rng.integers(3)), int(rng.choice([2, 16, 132, 148]))


@pytest.mark.parametrize("count", [2000, pytest.param(20000, marks=pytest.mark.long)])
def test_limits(count):
    for shape, itemsize, aligned, multiprocessors in large_shapes(count):
        launch = launch_for.__wrapped__(shape, itemsize, aligned, multiprocessors)
        assert_within_limits(shape, itemsize, aligned, launch)
    for shape, itemsize, aligned, multiprocessors in small_shapes(count // 4):
        launch = launch_for.__wrapped__(shape, itemsize, aligned, multiprocessors)
        assert_within_limits(shape, itemsize, aligned, launch)


def vectors_in(shape, launch):
    return int(np.prod(shape, dtype=object)) // launch.width


@pytest.mark.parametrize("count", [2000, pytest.param(20000, marks=pytest.mark.long)])
def test_blocks_fill_the_gpu_where_there_is_work_for_them(count):
    """With work for each of them to load twice as much as at once, half of the blocks are there at least.

    Mostly all are, but every group of channels has the same number of splits.
    """
    checked = 0
    for shape, itemsize, aligned, multiprocessors in large_shapes(count):
        launch = launch_for.__wrapped__(shape, itemsize, aligned, multiprocessors)
        places = multiprocessors * BLOCKS * MIN_BLOCKS
        if vectors_in(shape, launch) >= 2 * MIN_ITEMS * THREADS * places:
            checked += 1
            assert launch.blocks >= places / 2, (shape, launch)
    assert checked > count // 7


@pytest.mark.parametrize(
    "shape",
    [
        (256, 64, 56 * 56),
        (256, 2048, 7 * 7),
        (1, 1, 1 << 26),
        (8, 3, 1 << 20),
        (2, 3, (1 << 31) + 5),
        (1 << 22, 1, 1),
        (1 << 20, 64, 1),
        (1 << 15, 1000, 1),
        (4096, 4096, 1),
        (2, 1 << 20, 49),
    ],
    ids=str,
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_usual_tensors_fill_a_large_gpu(shape, itemsize):
    launch = launch_for(shape, itemsize, True, H200)
    # Maps of 7 x 7 take 256 groups, and twice as many blocks would take turns.
    assert launch.blocks >= 0.64 * H200 * BLOCKS * MIN_BLOCKS
    # And no block has less than what is worth its sums.
    assert launch.per_split * launch.lanes >= MIN_ITEMS * THREADS // 2


def test_small_tensors_have_few_blocks():
    assert launch_for((32, 4, 1), 4, True, H200).blocks == 1
    assert launch_for((4, 8, 49), 4, True, H200).blocks <= 2


@pytest.mark.parametrize("S", [1, 49, 1000, 4096])
def test_no_samples(S):
    """A rank without data launches one block a group, for its zeros."""
    for aligned in True, False:
        launch = launch_for((0, 5, S), 4, aligned, H200)
        assert launch.splits == 1
        assert all(visited.size == 0 for visited in all_accesses((0, 5, S), launch))


@pytest.mark.parametrize(("itemsize", "aligned"), [(2, True), (4, True), (8, True), (2, False)])
def test_maps_that_are_too_large(itemsize, aligned):
    """The vectors of a row are numbered by 32 bits, and the kernels step beyond the last by up to THREADS."""
    width = kernels.vector_width(itemsize) if aligned else 1
    below = 2**31 * width
    launch_for((1, 1, below - 1), itemsize, aligned, H200)
    with pytest.raises(
        ValueError, match=rf"fewer than {below} elements per channel and sample \(got {below}\)"
    ):
        launch_for((1, 1, below), itemsize, aligned, H200)


def test_misaligned_tensors_are_read_element_by_element():
    for shape, itemsize, _, multiprocessors in small_shapes(500):
        assert launch_for(shape, itemsize, False, multiprocessors).width == 1


def test_constants_are_those_of_the_kernels():
    assert constant("THREADS") == THREADS
    assert constant("MAX_GROUP") == MAX_GROUP
    assert int(re.search(r"#define LOADS (\d)", COMMON)[1]) == MIN_ITEMS


def test_registers_are_what_the_blocks_leave():
    """They are given out by 8 per thread."""
    assert int(re.search(r"int MIN_BLOCKS = LOADS > 4 \? 2 : (\d);", COMMON)[1]) == MIN_BLOCKS
    assert kernels.REGISTERS == REGISTERS // (THREADS * MIN_BLOCKS) // 8 * 8


def test_blocks_find_room_in_shared_memory():
    """Turing has 64 KiB, desktops since have 100 KiB: less than three blocks on 16-bit data need."""
    assert [resident(width, 64 << 10) for width in (1, 2, 4, 8)] == [3, 3, 3, 1]
    assert [resident(width, 100 << 10) for width in (1, 2, 4, 8)] == [3, 3, 3, 2]
    assert [resident(width, AMPLE) for width in (1, 2, 4, 8)] == [3, 3, 3, 3]
    shape = (1 << 15, 256, 1)
    few, many = (launch_for(shape, 2, True, 40, shared) for shared in (100 << 10, AMPLE))
    assert (few.blocks, many.blocks) == (80, 118)
