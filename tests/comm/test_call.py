"""What the end of a summed vector tells, in groups larger than any that the tests can start."""

import functools
import operator

import numpy as np
import pytest

from cupy_syncbn import ProcessGroup, RankMismatchError, RemoteRankError
from cupy_syncbn.comm import trailer
from cupy_syncbn.comm.call import Call, Collective, commit

pytestmark = pytest.mark.mpi_skip

CALL = Call("stem", 8, "forward", 3)
NOTHING = np.zeros(trailer.LENGTH)


class Others(ProcessGroup):
    """Rank 0 of a group whose other ranks send the given vectors."""

    rank, timeout = 0, 1.0

    def __init__(self, *vectors):
        self.vectors, self.size = vectors, len(vectors) + 1

    def allreduce(self, buffer):
        buffer += sum(self.vectors)
        return buffer

    def broadcast(self, buffer, root=0):
        raise AssertionError("not used")


def others(size, *different):
    """Return a group of which some ranks send something else than CALL's trailer."""
    usual = np.array(CALL.trailer(Others(NOTHING)))
    return Others(*[usual] * (size - 1 - len(different)), *different)


def meet(group, call=CALL):
    """Sum the trailer of a call, and return the sum."""
    with Collective(describe=lambda: (call, group, trailer.LENGTH, ())) as step:
        step.enter(call, group, trailer.LENGTH)
        vector = np.array(step.trailer())
        step.sum(vector)
    return vector


def test_calls_of_a_layer_differ():
    pair = Others(NOTHING)
    numbers = [*range(1 << 12), *((1 << 24) - 1 - np.arange(1 << 12)).tolist()]
    assert len({CALL._replace(number=number).trailer(pair) for number in numbers}) == len(numbers)


def test_names_that_had_equal_short_tags_differ():
    """12 bits did not tell these apart."""
    pair = Others(NOTHING)
    names = "layer6.11.bn2", "layer3.805.bn3"
    assert len({CALL._replace(name=name).trailer(pair) for name in names}) == 2


@pytest.mark.parametrize("size", [2, 3, 33, 50, 51, 1024, 4096, 1 << 14])
def test_equal_calls_pass(size):
    for tag in 0, 1, 0xFFF, 0x1000, 0xFFF000, 0xFFFFFF, 0xABCDEF:
        total = np.array(trailer.trailer_of(tag))
        group = Others(*[total] * (size - 1))
        assert trailer.is_sound(group.allreduce(total.copy()).tolist(), size)
    vector = meet(others(size))
    assert vector[0] == 0
    assert vector[1] == size * CALL.trailer(Others(NOTHING))[1]


@pytest.mark.parametrize("size", [2, 33, 51, 4096, 1 << 14])
@pytest.mark.parametrize(
    "other",
    [CALL._replace(name="head"), CALL._replace(channels=9), CALL._replace(direction="backward"),
     CALL._replace(number=4), CALL._replace(number=3 + 4096), CALL._replace(model=1)],
    ids=str,
)  # fmt: skip
def test_one_other_call_is_noticed(size, other):
    group = others(size, np.array(other.trailer(Others(NOTHING))))
    with pytest.raises(RankMismatchError, match="stem"):
        meet(group)


@pytest.mark.parametrize("size", [2, 33, 4096, 1 << 14])
@pytest.mark.parametrize("distance", [1, 0x1000, 0x800800])
def test_the_nearest_tags_are_told_apart(size, distance):
    """At any number of ranks, in the last bit of either half."""
    tags = [trailer.trailer_of(0x7FF7FF)] * (size - 1) + [trailer.trailer_of(0x7FF7FF + distance)]
    assert not trailer.is_sound(np.sum(tags, axis=0).tolist(), size)


@pytest.mark.parametrize(
    ("size", "faulty", "named"),
    [
        (2, [1], "rank 1 failed"),
        (50, [3, 49], "ranks 3, 49 failed"),
        (50, list(range(20, 40)), "ranks 20, 21, 22, 23, 24, 25, 26, 27 and 12 more failed"),
        (64, [7], "rank 7 failed"),
        (64, [7, 9], "some ranks failed"),  # this group cannot ask
        (1 << 14, [(1 << 14) - 1], "rank 16383 failed"),
    ],
)
def test_faulty_ranks_are_named(size, faulty, named):
    sent = []
    for rank in faulty:
        member = Others(*[NOTHING] * (size - 1))
        member.rank = rank
        member.allreduce = lambda vector: sent.append(vector.copy()) or vector
        describe = functools.partial(tuple, (CALL, member, trailer.LENGTH, ()))
        with pytest.raises(ValueError, match="odd batch"), Collective(describe=describe):
            raise ValueError("odd batch")
    with pytest.raises(RemoteRankError, match=named):
        meet(others(size, *sent))


def fail_behind_a_sum(group, needed, error):
    """Raise an error in a call behind its first sum, of which the other rank sends the same."""
    with Collective(describe=lambda: (CALL, group, trailer.LENGTH, ())) as step:
        step.enter(CALL, group, trailer.LENGTH)
        step.needed = needed
        vector = np.array(step.trailer()) * 2
        step.sum(vector)
        step.expect(9)
        raise error


@pytest.mark.parametrize(("needed", "lengths"), [(1, [5]), (2, [5, 9])])
def test_fault_is_told_before_the_last_sum_alone(needed, lengths):
    group, sums = Others(NOTHING), []
    group.allreduce = lambda vector: sums.append(vector.copy()) or vector
    with pytest.raises(ValueError, match="late"):
        fail_behind_a_sum(group, needed, ValueError("late"))
    assert [each.size for each in sums] == lengths
    assert sums[-1][trailer.FAULT] == (trailer.fault_code(0, 2) if needed == 2 else 0)


def test_error_in_the_description_does_not_hide_the_first():
    def describe():
        raise RuntimeError("no group")

    with pytest.raises(MemoryError, match="first"), Collective(describe=describe):
        raise MemoryError("first")


def test_commit_does_all():
    done = []
    commit(map(operator.call, [lambda: done.append(1), lambda: done.append(2)]))
    assert done == [1, 2]


class Asking(Others):
    """Rank 0 of a group whose other ranks answer the question where they are."""

    asks = True

    def __init__(self, answers, *vectors):
        super().__init__(*vectors)
        self.answers = answers

    def allreduce(self, buffer):
        if buffer.size == trailer.LENGTH:
            return super().allreduce(buffer)
        own = buffer[:40].copy()
        rows = buffer[: trailer.FAULT].reshape(self.size, 40)
        for rank, text in self.answers.items():
            padded = text.encode().ljust(240, b"\0")
            rows[rank] = [int.from_bytes(padded[at : at + 6], "big") for at in range(0, 240, 6)]
        for rank in set(range(1, self.size)).difference(self.answers):
            rows[rank] = own
        buffer[trailer.FAULT :] *= self.size
        return buffer


@pytest.mark.parametrize(
    ("size", "failed"), [(51, [7, 9]), (64, [1, 2, 3]), (1024, [1023, 500]), (4096, list(range(100, 120)))]
)
def test_many_faulty_ranks_of_many_are_named(size, failed):
    usual = CALL.trailer(Others(NOTHING))
    codes = [np.array([trailer.fault_code(rank, size), *usual[1:]]) for rank in failed]
    rest = [np.array(usual)] * (size - 1 - len(failed))
    group = Asking(dict.fromkeys(failed, "a failure"), *codes, *rest)
    with pytest.raises(RemoteRankError, match=f"^{trailer.describe_ranks(sorted(failed))} failed before"):
        meet(group)


@pytest.mark.parametrize("size", [2, 33, 1024])
def test_ranks_in_other_calls_are_told_with_their_calls(size):
    other = CALL._replace(name="häd")
    group = Asking({size - 1: str(other)}, *others(size, np.array(other.trailer(Others(NOTHING)))).vectors)
    told = rf"rank 0 is in forward 3 of stem \(8 channels\), while rank {size - 1} is in forward 3 of häd \(8"
    with pytest.raises(RankMismatchError, match=told):
        meet(group)
