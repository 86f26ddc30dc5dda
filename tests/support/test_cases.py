"""What the tests share does what it says, where no test would fail otherwise."""

from itertools import combinations

import pytest

from support.cases import pairwise

pytestmark = pytest.mark.mpi_skip


@pytest.mark.parametrize("sizes", [(3, 2), (6, 4, 4), (6, 3, 4, 2), (2, 2, 2, 2, 2), (5, 1, 3)], ids=str)
def test_every_pair_is_in_a_case(sizes):
    factors = [[f"{name}{i}" for i in range(size)] for name, size in zip("abcde", sizes, strict=False)]
    cases = pairwise(*factors)
    assert len(set(cases)) == len(cases)
    for (i, first), (j, second) in combinations(enumerate(factors), 2):
        assert {(case[i], case[j]) for case in cases} == {(a, b) for a in first for b in second}


def test_there_are_few_cases():
    """The product of the two largest factors is the least there can be."""
    assert len(pairwise(range(6), range(4), range(4))) == 24
    assert len(pairwise(range(6), range(3), range(4), range(2))) == 24
    assert len(pairwise(*[range(2)] * 10)) <= 10
