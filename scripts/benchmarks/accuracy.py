"""How exact the variance is: within a rank, far from zero; and across ranks, by what they send.

First table: the relative error of the variance of float32 values, by the ratio of their mean to their
standard deviation, and for standard normal values of which the first is an outlier, 1e4 standard deviations
away.

    ours                the public layer's running_var, at momentum 1 (float32: it rounds to 6e-8)
    our kernels         the same by the CUDA kernels, on a GPU, or with --emulate on the tests' emulator
    torch               the same of torch.nn.functional.batch_norm on the CPU, when installed
    E[x²]-E[x]²         in float32
    Welford             in float32: mean += (x - mean) / n at every value
    first-value shift   in float32: E[(x-x₀)²] - E[x-x₀]², x₀ being the channel's first value

The three formulas run as on a GPU: 512 sequential lanes per channel, each adding up every 512th value, then a
tree that merges the lanes in pairs (Welford's by Chan, Golub and LeVeque 1983). It is those long chains of
float32, and not the formulas alone, that cost the accuracy.

Second table: the relative error of the variance over 4 ranks, simulated, whose own statistics are exact to
the last bit of float64, by what they add up in one float64 allreduce:

    mean, m2      [count mean | m2 + count mean²], two numbers per channel
    pivoted       [count pivot | count pivot² | Σ(x-pivot) | Σ(x-pivot)² + 2 pivot Σ(x-pivot)], four numbers;
                  the pivot is the rank's mean rounded to 12 significant bits, so that both products with it
                  are exact, and cancel exactly when the sums are re-centred

The first loses 1e-16 mean²/var, which float32 data can show from a mean of 1e4 standard deviations on.

    python scripts/benchmarks/accuracy.py
    python scripts/benchmarks/accuracy.py --quick       # fewer values, seconds
    python scripts/benchmarks/accuracy.py --emulate     # the CUDA kernels too, without a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, caption, circumstances, import_torch, new_figure, pin_threads, save, table

from cupy_syncbn import sync_batch_norm

RATIOS = (0.0, 1e2, 1e3, 1e4, 1e5)
OUTLIER = 1e4  # in standard deviations
LANES = 512  # threads that share a channel
CHANNELS = 4  # independent channels: a table shows the worst of them
EPS = 1e-5
RANKS = 4
EMULATION = contextlib.ExitStack()  # the stand-in for CuPy, until the program ends
PIVOT_BITS = 12  # pivot² then has 24, and a count below 2^29 leaves the product exact in 53


def values(ratio: float | None, count: int) -> np.ndarray:
    """Return float32 data of shape (1, CHANNELS, count): sd 1 and this mean, or for None the outlier."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, CHANNELS, count))
    if ratio is None:
        x[:, :, 0] = OUTLIER
    else:
        x += ratio + rng.random((1, CHANNELS, 1))  # not a round number: those have short products
    return x.astype(np.float32)


def exact_variance(x: np.ndarray) -> np.ndarray:
    """Return the biased variance of the rounded data by two passes in the longest type there is."""
    wide = x[0].astype(np.longdouble)
    return np.square(wide - wide.mean(axis=1, keepdims=True)).mean(axis=1)


def ours(x: np.ndarray) -> np.ndarray:
    """Biased variance by the public function."""
    count = x.shape[2]
    running_mean, running_var = np.zeros(CHANNELS, np.float32), np.ones(CHANNELS, np.float32)
    sync_batch_norm(x, None, None, running_mean, running_var, training=True, momentum=1.0, eps=EPS)
    return running_var.astype(float) * (count - 1) / count


def by_kernels(cupy: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that gives the biased variance by the CUDA kernels."""

    def variance(x: np.ndarray) -> np.ndarray:
        count = x.shape[2]
        running_mean, running_var = cupy.zeros(CHANNELS, np.float32), cupy.ones(CHANNELS, np.float32)
        sync_batch_norm(cupy.asarray(x), None, None, running_mean, running_var, momentum=1.0, eps=EPS)
        return running_var.get().astype(float) * (count - 1) / count

    return variance


def find_cupy(emulate: bool) -> Any | None:
    """Return CuPy if it sees a GPU, or the tests' stand-in for it if `emulate`, else None."""
    if emulate:
        sys.path.append(str(Path(__file__).parents[2] / "tests"))
        import cuda_emulator

        cuda_emulator.devices.attributes["MultiProcessorCount"] = 132
        return EMULATION.enter_context(cuda_emulator.installed("fast"))
    try:
        import cupy
    except ModuleNotFoundError:
        return None
    return cupy if cupy.cuda.is_available() else None


def by_torch(torch: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that gives the biased variance by PyTorch."""

    def variance(x: np.ndarray) -> np.ndarray:
        count = x.shape[2]
        running_mean, running_var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
        torch.nn.functional.batch_norm(
            torch.from_numpy(x), running_mean, running_var, training=True, momentum=1.0, eps=EPS
        )
        return running_var.numpy().astype(float) * (count - 1) / count

    return variance


def lanes_of(x: np.ndarray) -> np.ndarray:
    """Return x as (steps, CHANNELS, LANES): what each lane meets, one step after the other."""
    return np.ascontiguousarray(x[0].reshape(CHANNELS, -1, LANES).transpose(1, 0, 2))


def shifted_sums(x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Biased variance E[(x-shift)²] - E[x-shift]² in float32; the shifts are (CHANNELS, 1)."""
    sums = np.zeros((2, CHANNELS, LANES), np.float32)
    for step in lanes_of(x):
        centred = step - shift
        sums[0] += centred
        sums[1] += centred * centred
    while sums.shape[2] > 1:
        sums = sums[:, :, ::2] + sums[:, :, 1::2]
    mean, mean_square = sums[:, :, 0] / np.float32(x.shape[2])
    return mean_square - mean * mean


def plain_sums(x: np.ndarray) -> np.ndarray:
    """Biased variance E[x²] - E[x]² in float32."""
    return shifted_sums(x, np.zeros((CHANNELS, 1), np.float32))


def first_value_shift(x: np.ndarray) -> np.ndarray:
    """Biased variance by sums that are shifted by the channel's first value, in float32."""
    return shifted_sums(x, x[0, :, :1])


def welford(x: np.ndarray) -> np.ndarray:
    """Biased variance by Welford's updates, and merges after Chan, Golub and LeVeque, in float32."""
    mean, m2 = np.zeros((2, CHANNELS, LANES), np.float32)
    count = np.float32(0)
    for step in lanes_of(x):
        count += np.float32(1)
        delta = step - mean
        mean += delta / count
        m2 += delta * (step - mean)
    while mean.shape[1] > 1:
        delta = mean[:, 1::2] - mean[:, ::2]
        mean = mean[:, ::2] + delta * np.float32(0.5)  # the two counts are the same
        m2 = m2[:, ::2] + m2[:, 1::2] + delta * delta * (count * np.float32(0.5))
        count *= np.float32(2)
    return m2[:, 0] / count


def round_to_pivot(value: np.ndarray) -> np.ndarray:
    """Round float64 values to PIVOT_BITS significant bits (Veltkamp 1968)."""
    spread = value * (2.0 ** (53 - PIVOT_BITS) + 1)
    return spread - (spread - value)


def local_statistics(x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the count, mean and m2 of (CHANNELS, count) values, exact to the last bits of float64."""
    wide = x.astype(np.longdouble)
    mean = wide.mean(axis=1)
    m2 = np.square(wide - mean[:, None]).sum(axis=1)
    return float(x.shape[1]), mean.astype(float), m2.astype(float)


def merged_means(ranks: Sequence[np.ndarray]) -> np.ndarray:
    """Variance over the ranks, by two numbers per channel."""
    sums: Any = 0.0
    total = 0.0
    for x in ranks:
        count, mean, m2 = local_statistics(x)
        sums = sums + np.stack([count * mean, m2 + count * mean**2])
        total += count
    mean, mean_square = sums / total
    return np.maximum(mean_square - mean**2, 0)


def merged_pivots(ranks: Sequence[np.ndarray]) -> np.ndarray:
    """Variance over the ranks, by four numbers per channel."""
    sums: Any = 0.0
    total = 0.0
    for x in ranks:
        count, mean, m2 = local_statistics(x)
        pivot = round_to_pivot(mean)
        first = count * (mean - pivot)
        second = m2 + count * (mean - pivot) ** 2
        sums = sums + np.stack([count * pivot, count * pivot**2, first, second + 2 * pivot * first])
        total += count
    pivots, squares, first, second = sums
    # x - centre = (pivot - centre) + (x - pivot). Its squares, summed over all values, are the sum of
    # count (pivot - centre)², exact up to here, and of terms that are as small as the deviations.
    centre = round_to_pivot(pivots / total)
    between = pivots - total * centre
    m2_about_centre = ((squares - centre * pivots) - centre * between) + (second - 2 * centre * first)
    m2 = m2_about_centre - (between + first) ** 2 / total
    return np.maximum(m2 / total, 0)


def wire_errors(ratio: float, trials: int) -> dict[str, list[float]]:
    """Return the median and the greatest relative error of both exchanges, over trials of 4 unequal ranks."""
    rng = np.random.default_rng(1)
    errors: dict[str, list[float]] = {"mean, m2": [], "pivoted": []}
    for _ in range(trials):
        centre = ratio + rng.random((CHANNELS, 1))
        counts = rng.integers(1000, 5000, RANKS)
        ranks = [(centre + rng.standard_normal((CHANNELS, n))).astype(np.float32) for n in counts]
        exact = exact_variance(np.concatenate(ranks, axis=1)[None])
        for name, merged in (("mean, m2", merged_means), ("pivoted", merged_pivots)):
            errors[name] += (abs(merged(ranks) - exact) / exact).astype(float).tolist()
    return {name: [float(np.median(each)), max(each)] for name, each in errors.items()}


def label(ratio: float | None) -> str:
    """Name a row."""
    return "outlier" if ratio is None else f"{ratio:g}"


# Names in the plot
SHOWN = {
    "ours": "cupy_syncbn", "our kernels": "cupy_syncbn, CUDA kernels",
    "mean, m2": "mean and squares about it", "pivoted": "sums about a pivot (cupy_syncbn)",
}  # fmt: skip


def plot(record: dict[str, Any]) -> Any | None:
    """Draw both tables."""
    made = new_figure(ncols=2, figsize=(11, 4.5))
    if made is None:
        return None
    figure, (local, wire) = made
    # An error of zero has no place on a logarithmic axis: it is drawn at its floor.
    floor = 1e-17
    for name in record["methods"]:
        *errors, outlier = [max(row["errors"][name], floor) for row in record["variance"]]
        (line,) = local.semilogy(errors, marker="o", linestyle=":", label=SHOWN.get(name, name))
        local.semilogy(len(errors), outlier, marker="o", color=line.get_color())  # not a point of that line
    local.set_xticks(range(len(record["variance"])), [row["data"] for row in record["variance"]])
    local.axhline(2.0**-24, color="black", linewidth=1, linestyle="--", label="rounding to float32")
    local.set(
        title=f"one rank, {record['values']:,} float32 values per channel",
        ylabel="relative error of the variance",
    )
    for name in ("mean, m2", "pivoted"):
        pairs = [row["errors"][name] for row in record["wire"]]
        (line,) = wire.semilogy(
            [max(worst, floor) for _, worst in pairs], marker="o", label=f"{SHOWN[name]}, worst"
        )
        wire.semilogy(
            [max(median, floor) for median, _ in pairs],
            color=line.get_color(),
            linestyle="--",
            label=f"{SHOWN[name]}, median",
        )
    wire.set_xticks(range(len(record["wire"])), [row["data"] for row in record["wire"]])
    wire.set(
        title=f"{RANKS} ranks, by what they exchange in float64",
        ylabel="relative error of the variance",
        ylim=(floor, None),
    )
    for axes in (local, wire):
        axes.set_xlabel("mean / standard deviation")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.supxlabel(caption(record), fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2^15 values per channel instead of 2^21")
    parser.add_argument("--emulate", action="store_true", help="run the CUDA kernels on the tests' emulator")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads (default 1)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the results go")
    options = parser.parse_args(arguments)
    pin_threads(options.threads)
    count = 2**15 if options.quick else 2**21
    trials = 5 if options.quick else 100

    methods: dict[str, Callable[[np.ndarray], np.ndarray]] = {"ours": ours}
    cupy = find_cupy(options.emulate)
    if cupy is not None:
        methods["our kernels"] = by_kernels(cupy)
    torch = import_torch(options.threads)
    if torch is not None:
        methods["torch"] = by_torch(torch)
    methods |= {"E[x²]-E[x]²": plain_sums, "Welford": welford, "first-value shift": first_value_shift}

    variance = []
    for ratio in (*RATIOS, None):
        x = values(ratio, count)
        exact = exact_variance(x)
        errors = {name: float((abs(method(x) - exact) / exact).max()) for name, method in methods.items()}
        variance.append({"data": label(ratio), "errors": errors})
    print(f"\nRelative error of the variance, worst of {CHANNELS} channels of {count:,} float32 values\n")
    rows = [[row["data"], *(f"{error:.0e}" for error in row["errors"].values())] for row in variance]
    print(table(["mean/sd", *methods], rows))

    wire = [{"data": label(ratio), "errors": wire_errors(ratio, trials)} for ratio in (*RATIOS, 3e5)]
    print(
        f"\nRelative error of the variance over {RANKS} ranks of 1000 to 5000 values, by what they exchange\n"
    )
    rows = [[row["data"], *(f"{e:.0e}" for pair in row["errors"].values() for e in pair)] for row in wire]
    print(table(["mean/sd", "mean, m2: median", "worst", "pivoted: median", "worst"], rows))

    facts = circumstances(arguments, options.threads, ["cupy_syncbn", "numpy", "torch"])
    print(f"\n{caption(facts)}")
    record = {
        **facts,
        "kernels_emulated": options.emulate,
        "values": count,
        "methods": list(methods),
        "variance": variance,
        "wire": wire,
    }
    save(options.output, "accuracy" + "-quick" * options.quick, record, plot(record))
    EMULATION.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
