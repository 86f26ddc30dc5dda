"""The end of each vector that ranks add up, which tells whether one failed, or is in another call.

It is ``(fault, low, low², high, high²)``, the halves of the call's tag being of 12 bits each. The sums
satisfy ``size Σlow² = (Σlow)²`` only if all ranks have the same half (equality in Cauchy and Schwarz's
inequality), and both sides are exact in float64 up to 2^14 ranks, so that no right sum looks wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTH = 5
FAULT = -LENGTH
"""Index of the fault flag in a vector; NaN there tells that lengths differed."""

TAG_BITS = 24
_HALF = (1 << TAG_BITS // 2) - 1

_NAMED_RANKS = 50
"""Groups up to this size tell each faulty rank: the sum of 2**rank is exact in a float64."""
_ONE_FAULT = 2.0**28
"""Larger ones tell of one; of several how many, and the sum of their numbers, which is below this."""


def pairs_of(tag: int) -> tuple[float, float, float, float]:
    """Return the halves of a tag with their squares, which `agree` compares among the ranks."""
    low, high = tag & _HALF, tag >> TAG_BITS // 2 & _HALF
    return low, low * low, high, high * high


def trailer_of(tag: int) -> tuple[float, float, float, float, float]:
    """Return the trailer of a rank that has not failed."""
    return 0.0, *pairs_of(tag)


def is_sound(ending: Sequence[float], size: int) -> bool:
    """Tell whether no rank has failed, and all were in the same call, by the sum of their trailers."""
    fault, low, low_square, high, high_square = ending
    return fault == 0 and size * low_square == low * low and size * high_square == high * high


def agree(pairs: Sequence[float], size: int) -> bool:
    """Tell whether all ranks had the same tags, by the sum of the pairs of each, one tag after the other."""
    return all(is_sound((0.0, *pairs[at : at + 4]), size) for at in range(0, len(pairs), 4))


def fault_code(rank: int, size: int) -> float:
    """Return the fault flag of a rank that has failed."""
    return 2.0**rank if size <= _NAMED_RANKS else _ONE_FAULT + rank


def faulty_ranks(code: float, size: int) -> str:
    """Describe the ranks that a sum of fault flags tells of; "" if it does not tell which they are."""
    if size <= _NAMED_RANKS:
        return describe_ranks([rank for rank in range(size) if int(code) >> rank & 1])
    count, total = divmod(code, _ONE_FAULT)
    return f"rank {total:.0f}" if count == 1 else ""


def describe_ranks(ranks: Sequence[int], most: int = 8) -> str:
    """Return "rank 3", or "ranks 1, 2, 5"; of many only the first, of none ""."""
    if not ranks:
        return ""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return "ranks " + ", ".join(map(str, ranks[:most])) + more
