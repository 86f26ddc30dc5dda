"""Schedules without MPI: what they add up, whom they tell, and what leaves a node."""

import numpy as np
import pytest

from cupy_syncbn.comm.schedules import WHOLE, Schedule, Step
from support.nodes import ALL

pytestmark = pytest.mark.mpi_skip

PLACES = {
    "one rank": [0],
    "one node": [0] * 6,
    "2 + 2": [0, 0, 1, 1],
    "3 + 1": [0, 0, 0, 1],
    "2 + 2 + 3": [0, 0, 1, 1, 2, 2, 2],
    "round robin": [0, 1, 2, 0, 1, 2, 0],
    "one per node": [*range(13)],
    "4 nodes of 6": [rank // 6 for rank in range(24)],
    "any": [*np.random.default_rng(0).integers(0, 5, 37)],
}


def taken(nodes, halvings, length):
    """Return the steps of all ranks, and what every rank has at the end, sent step by step."""
    schedule = Schedule(nodes)
    steps = [list(schedule.steps(rank, length, halvings)) for rank in range(len(nodes))]
    vectors = np.random.default_rng(1).normal(size=(len(nodes), length))
    heard = [{rank} for rank in range(len(nodes))]
    total, waiting, sent = vectors.sum(axis=0), [0] * len(nodes), {}
    posted = set()
    while any(at < len(own) for at, own in zip(waiting, steps, strict=True)):
        before = list(waiting)
        for rank, own in enumerate(steps):
            if waiting[rank] == len(own):
                continue
            step, key = own[waiting[rank]], (rank, waiting[rank])
            if step.sends is not None and key not in posted:
                message = vectors[rank, step.sends].copy(), set(heard[rank])
                sent.setdefault((rank, step.partner), []).append(message)
                posted.add(key)
            if step.receives is not None:
                if not sent.get((step.partner, rank)):
                    continue
                numbers, told = sent[step.partner, rank].pop(0)
                part = vectors[rank, step.receives]
                part[...] = numbers if step.replaces else part + numbers
                heard[rank] |= told
            waiting[rank] += 1
        assert waiting != before, "all wait"
    assert not any(sent.values()), "messages that nobody takes"
    return steps, vectors, total, heard


@pytest.mark.parametrize("nodes", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("halvings", [0, 1, 2, ALL])
@pytest.mark.parametrize("length", [5, 64, 1001])
def test_all_ranks_have_the_sum_to_the_same_bits(nodes, halvings, length):
    _, vectors, total, _ = taken(nodes, halvings, length)
    np.testing.assert_allclose(vectors[0], total, rtol=1e-12, atol=1e-12)
    assert len({vector.tobytes() for vector in vectors}) == 1


@pytest.mark.parametrize("nodes", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("halvings", [1, ALL])
def test_lanes_meet_the_same_partners_until_all_have_heard_of_all(nodes, halvings):
    """So ranks of both schedules end in the same step: what follows are slices of the sum."""
    steps, _, _, _ = taken(nodes, halvings, 64)
    for own, doubling in zip(steps, taken(nodes, 0, 64)[0], strict=True):
        # What follows the steps in which ranks hear of each other: slices that replace.
        meeting = [step for step in own if not (step.is_slice and step.replaces)]
        assert [step.partner for step in meeting] == [step.partner for step in doubling]
        assert [step.sends is None for step in meeting] == [step.sends is None for step in doubling]
        assert [step.receives is None for step in meeting] == [step.receives is None for step in doubling]
    assert all(told == set(range(len(nodes))) for told in taken(nodes, 0, 64)[3])


def test_within_a_node_nothing_is_halved_and_neighbours_are_partners():
    schedule = Schedule([7] * 6)
    assert schedule.crossing == (0, 0)
    assert {schedule.halvings(nbytes) for nbytes in (0, 100, 10**6)} == {0}
    assert list(schedule.steps(0)) == [
        Step(1, None, WHOLE, False),
        Step(2, WHOLE, WHOLE, False),
        Step(4, WHOLE, WHOLE, False),
        Step(1, WHOLE, None, False),
    ]
    assert list(schedule.steps(1)) == [Step(0, WHOLE, None, False), Step(0, None, WHOLE, True)]


def test_ranks_of_a_node_are_partners_first_wherever_they_are():
    schedule = Schedule(["b", "a", "b", "a"])
    assert [step.partner for step in schedule.steps(0)] == [2, 1]
    assert [step.partner for step in schedule.steps(3)] == [1, 2]
    assert schedule.partners(2) == {0, 3}


def test_slices_of_four_ranks_on_two_nodes():
    assert list(Schedule([0, 0, 1, 1]).steps(3, 10, 1)) == [
        Step(2, slice(0, 5), slice(5, 10), False),
        Step(1, slice(5, 10), slice(5, 10), False),
        Step(2, slice(5, 10), slice(0, 5), True),
    ]


def blocks(ranks, per_node):
    return np.arange(ranks) // per_node


def leaving(nodes, length, halvings):
    """Return the most numbers that leave a node in one step, in lengths of the vector."""
    schedule, most = Schedule(nodes), 0.0
    steps = [list(schedule.steps(rank, length, halvings)) for rank in range(len(nodes))]
    for number in range(max(map(len, steps))):
        counts = dict.fromkeys(nodes, 0)
        for rank, own in enumerate(steps):
            if number < len(own) and own[number].sends and nodes[own[number].partner] != nodes[rank]:
                counts[nodes[rank]] += len(range(length)[own[number].sends])
        most = max(most, *counts.values())
    return most / length


@pytest.mark.parametrize("channels", [1024, 4096])
@pytest.mark.parametrize("ranks", [64, 96, 100, 192, 256, 300, 512])
@pytest.mark.parametrize("per_node", [1, 8, 12, 48, 64])
@pytest.mark.parametrize("is_block", [True, False], ids=["block", "round robin"])
def test_at_most_two_vectors_leave_a_node_in_a_step(channels, ranks, per_node, is_block):
    count = -(-ranks // per_node)
    nodes = (blocks(ranks, per_node) if is_block else np.arange(ranks) % count).tolist()
    length = 4 * channels + 6
    if count > 1:
        assert leaving(nodes, length, Schedule(nodes).halvings(8 * length)) <= 2


def test_doubling_lets_whole_vectors_leave():
    assert leaving(blocks(256, 64).tolist(), 4102, 0) == 64


@pytest.mark.parametrize("nodes", PLACES.values(), ids=PLACES)
def test_crossing_counts_partners_on_other_nodes(nodes):
    schedule = Schedule(nodes)
    swaps = len(schedule.crossing)
    found = [dict.fromkeys(nodes, 0) for _ in range(swaps)]
    for rank in range(len(nodes)):
        both = [step for step in schedule.steps(rank) if step.sends and step.receives]
        for number, step in enumerate(both):
            found[number][nodes[rank]] += nodes[step.partner] != nodes[rank]
    assert schedule.crossing == tuple(max(each.values()) for each in found)


def test_the_choice_by_length_and_placement():
    """As its docstring says: from some 2 KB at 64 per node, and 10 KB at 8."""
    for ranks, per_node, nbytes in (256, 64, 2000), (64, 8, 10_000):
        schedule = Schedule(blocks(ranks, per_node))
        assert [schedule.halvings(each) > 0 for each in (nbytes // 2, nbytes * 3 // 2)] == [False, True]
    many = Schedule(blocks(4096, 64))
    assert [many.halvings(8 * (4 * channels + 6)) for channels in (64, 1024)] == [2, 5]
