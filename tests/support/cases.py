"""Which cases of a table are run: a few that hold every pair of values, the others by `pytest -m long`."""

from itertools import combinations, product

import pytest


def pairwise(*factors):
    """Return cases, one value a factor, such that every pair of values of two factors is in one of them.

    They are chosen one after the other, each to hold the most pairs that those before it do not.
    """
    factors = [list(factor) for factor in factors]
    cases = list(product(*(range(len(factor)) for factor in factors)))
    pairs = {case: set(combinations(enumerate(case), 2)) for case in cases}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return [tuple(factor[i] for factor, i in zip(factors, case, strict=True)) for case in sorted(chosen)]


def sweep(names, *factors):
    """Parametrize a test with all cases, of which those that `pairwise` does not choose are marked `long`."""
    factors = [list(factor) for factor in factors]
    usual = pairwise(*factors)
    cases = [
        pytest.param(*case, marks=() if case in usual else pytest.mark.long, id="-".join(map(name_of, case)))
        for case in product(*factors)
    ]
    return pytest.mark.parametrize(names, cases)


def name_of(value):
    """Return how a test's id tells a value."""
    return getattr(value, "__name__", None) or str(value)
