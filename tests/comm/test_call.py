"""What the end of an exchanged vector tells, in groups larger than any that the tests can start."""

import numpy as np
import pytest

from cupy_syncbn import ProcessGroup, RankMismatchError, RemoteRankError
from cupy_syncbn.comm.call import Call, Preparing

pytestmark = pytest.mark.mpi_skip

CALL = Call("stem", 8, "forward", 3)


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


def trailer(call, group, fault=0.0):
    return np.array([fault, *call.trailer(group)[1:]])


def test_calls_of_a_layer_differ():
    pair = Others(np.zeros(3))
    assert len({CALL._replace(number=number).trailer(pair) for number in range(1 << 12)}) == 1 << 12


@pytest.mark.parametrize("size", [2, 3, 50, 51, 1024, 1 << 14])
def test_equal_calls_pass(size):
    pair = Others(np.zeros(3))
    group = Others(*[trailer(CALL, pair)] * (size - 1))
    vector = trailer(CALL, group)
    CALL.allreduce_checked(group, vector)
    assert vector[0] == 0
    assert vector[1] == size * trailer(CALL, pair)[1]


@pytest.mark.parametrize("size", [2, 51, 1 << 14])
@pytest.mark.parametrize(
    "other",
    [CALL._replace(name="head"), CALL._replace(channels=9), CALL._replace(direction="backward"),
     CALL._replace(number=4)],
    ids=str,
)  # fmt: skip
def test_one_other_call_is_noticed(size, other):
    pair = Others(np.zeros(3))
    group = Others(*[trailer(CALL, pair)] * (size - 2), trailer(other, pair))
    with pytest.raises(RankMismatchError, match="stem"):
        CALL.allreduce_checked(group, trailer(CALL, group))


@pytest.mark.parametrize(
    ("size", "faulty", "named"),
    [(2, [1], "rank 1 "), (50, [3, 49], "ranks 3, 49 "), (64, [7, 9], "2 of 64 ranks ")],
)
def test_faulty_ranks_are_named_or_counted(size, faulty, named):
    sent = []
    for rank in faulty:
        member = Others(*[np.zeros(3)] * (size - 1))
        member.rank = rank
        member.allreduce = lambda vector: sent.append(vector.copy()) or vector
        with pytest.raises(ValueError, match="odd batch"), Preparing(CALL, member, 3):
            raise ValueError("odd batch")
    pair = Others(np.zeros(3))
    group = Others(*[trailer(CALL, pair)] * (size - 1 - len(faulty)), *sent)
    with pytest.raises(RemoteRankError, match=named):
        CALL.allreduce_checked(group, trailer(CALL, group))
