"""The vector that the ranks add up: pivots, and the moments in its sum.

One float64 vector per direction has all that the ranks have to add up. In the forward that is, with one
pivot per channel,

    [count * pivot (C) | count * pivot² (C) | Σ(x - pivot) (C) | Σ(x - pivot)² + 2 pivot Σ(x - pivot) (C)
     | count | trailer (5)]

A rank's pivot is a value near its mean, rounded to 12 significant bits, so that both products with it are
exact: 24 bits of pivot² and a count below 2^29 fit into the 53 bits of a float64. Re-centred on a common
pivot after the sum, they cancel exactly, and the variance keeps its accuracy at any offset. The shorter
[count * mean | m2 + count * mean² | ...] loses 1e-16 mean²/var of it: 3e-6 at a mean of 1e5 standard
deviations, which float32 data can show (`scripts/benchmarks/accuracy.py`). Where zero lies within the
data the pivot may be zero, and the vector is the plain [0 | 0 | Σx | Σx² | ...].

In the backward the vector is ``[sum_dy (C) | sum_dy_xmu (C) | trailer (5)]``. The trailer is the caller's.
"""

from __future__ import annotations

from cupy_syncbn.arrays import Array


def round_to_12_bits(values: Array) -> Array:
    """Round float64 to 12 significant bits, by Veltkamp's splitting (Dekker 1971)."""
    scaled = values * (2.0**41 + 1)
    result: Array = scaled - (scaled - values)
    return result


def moments(global_sums: Array, channels: int) -> tuple[Array, Array, float]:
    """Return mean, Σ(x - mean)² and count from the vector that the ranks have added up."""
    pivot_sum, pivot_square, sum_, square = global_sums[: 4 * channels].reshape(4, channels)
    count = float(global_sums[4 * channels])
    n = max(count, 1.0)
    pivot = round_to_12_bits(pivot_sum / n)
    rest = pivot_sum - n * pivot  # exact, as are the products in the line after the next
    mean = pivot + (rest + sum_) / n
    m2 = (pivot_square - pivot * pivot_sum) - pivot * rest
    m2 += square - 2 * pivot * sum_ - (rest + sum_) ** 2 / n
    return mean, m2, count
