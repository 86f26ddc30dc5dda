"""Forward and backward of SyncBatchNorm on NumPy arrays, beside PyTorch's batch norm on the same CPU.

The maps are those of the 53 batch norms of ResNet-50 (v1.5) at batch 8, and one of segmentation size; 16-bit
types, float64 and channels-last data (NHWC) take five of them. Dense layers are small and middle-sized.
Variants:

    plain       y = norm(x)
    relu        y = max(norm(x), 0)
    add+relu    y = max(norm(x) + residual, 0)

Ours computes the last two in the same passes. PyTorch has no such layer; its side is batch_norm followed by
the in-place add_ and relu_ that torchvision's ResNet uses: the fastest of its idioms, by 3 to 20 %.

* Both sides have the same threads, read the same arrays, allocate their outputs afresh, and run in turn; a
  ratio is the median of the ratios of neighbouring runs. With one thread, times are process times.
* `limit` is the time of copying, with numpy.copyto between two existing arrays of the tensor's size, as
  many bytes as the algorithm has to move: plain and relu 2 reads and 1 write forward, 4 reads and 1 write
  backward; add+relu reads one more forward, and writes one more backward. Small tensors stay in the cache,
  in the copy as in the layers.
* `peak` is the most memory a first forward has allocated at any time, in units of the tensor: 1 is y.
* zero_grad is that of as many layers as a ResNet-50 has.

    python scripts/benchmarks/cpu.py                    # about four minutes
    python scripts/benchmarks/cpu.py --isa numpy        # without the compiled core
    python scripts/benchmarks/cpu.py --torch-layer      # ours is the layer of interop.torch
    mpirun -n 2 python -m mpi4py scripts/benchmarks/cpu.py --kinds dense  # with sums over ranks: says which
                                                        # variables go before mpirun
    python scripts/benchmarks/cpu.py --quick            # seconds; says that it works, not how fast it is
"""

from __future__ import annotations

import argparse
import io
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import (
    RESULTS,
    caption,
    circumstances,
    geometric_mean,
    import_torch,
    interleaved,
    new_figure,
    pin_threads,
    restart_with,
    save,
    table,
)

from cupy_syncbn import Sequential, SyncBatchNorm, default_group
from cupy_syncbn.backends.cpu import loading, memory

Shape = tuple[int, ...]

EPS = 1e-5
MOMENTUM = 0.1
VARIANTS = ("plain", "relu", "add+relu")
# Reads and writes of the whole tensor, forward and backward together.
TRAFFIC = {"plain": 3 + 5, "relu": 3 + 5, "add+relu": 4 + 6}
SEGMENTATION: Shape = (2, 64, 256, 256)
DENSE: tuple[Shape, ...] = ((8, 64), (64, 128), (256, 1024))
LARGE = 12e6
"""Bytes of a map that no second cache holds any part of for the next pass."""
KINDS = {
    "float32": ("float32", False, VARIANTS),
    "float32-nhwc": ("float32", True, VARIANTS),
    "float16": ("float16", False, VARIANTS[:2]),
    "bfloat16": ("bfloat16", False, VARIANTS[:2]),
    "float64": ("float64", False, VARIANTS[:2]),
    "dense": ("float32", False, VARIANTS[:1]),
}
"""Type, layout and variants of what is measured."""

FIVE = {(256, 56, 56), (128, 28, 28), (1024, 14, 14), (2048, 7, 7)}
"""With the first one, the maps of other types and layouts: the sizes from largest to smallest."""

clock = time.perf_counter


def resnet50(batch: int) -> Counter[tuple[Shape, str]]:
    """Count the batch norms of ResNet-50 v1.5 on 224 × 224 images, by shape and variant (53 in all)."""
    layers: Counter[tuple[Shape, str]] = Counter()
    layers[(batch, 64, 112, 112), "relu"] += 1
    size = 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            layers[(batch, width, size, size), "relu"] += 1
            if block == 0 and stage > 0:
                size //= (
                    2  # v1.5 has the stride in the 3 × 3 convolution, behind the block's first batch norm
                )
            layers[(batch, width, size, size), "relu"] += 1
            layers[(batch, 4 * width, size, size), "add+relu"] += 1
            if block == 0:
                layers[(batch, 4 * width, size, size), "plain"] += 1
    return layers


class Case:
    """The arrays of one row of the table, and its contenders."""

    def __init__(self, shape: Shape, variant: str, dtype: str, channels_last: bool) -> None:
        rng = np.random.default_rng(0)
        self.shape, self.variant, self.dtype, self.channels_last = shape, variant, dtype, channels_last
        self.x, self.dy, self.residual = (
            self._in_layout(rng.standard_normal(shape, dtype=np.float32)) for _ in range(3)
        )

    @property
    def name(self) -> str:
        """Shape and dtype as they appear in the table."""
        shape = "x".join(map(str, self.shape))
        extras = ([self.dtype] if self.dtype != "float32" else []) + ["NHWC"] * self.channels_last
        return " ".join([shape, *extras])

    def _in_layout(self, array: np.ndarray) -> np.ndarray:
        if self.dtype == "bfloat16":
            import ml_dtypes

            array = array.astype(ml_dtypes.bfloat16)
        else:
            array = array.astype(self.dtype, copy=False)
        if self.channels_last:  # the same shape, over memory in which the channels are next to each other
            array = np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
        return array

    def layer(self) -> SyncBatchNorm:
        """Return our layer for this case."""
        activation = None if self.variant == "plain" else "relu"
        return SyncBatchNorm(
            self.shape[1],
            eps=EPS,
            momentum=MOMENTUM,
            dtype="float64" if self.dtype == "float64" else "float32",  # of the parameters
            device="cpu",
            activation=activation,
        )

    def ours(self) -> Callable[[], tuple[float, float]]:
        """Return a function that runs our layer, and gives the seconds of forward and backward."""
        bn = self.layer()
        x, dy = self.x, self.dy
        residual = self.residual if self.variant == "add+relu" else None

        def run() -> tuple[float, float]:
            start = clock()
            y = bn(x, residual=residual)
            between = clock()
            dx = bn.backward(dy)
            del y, dx  # giving memory back costs time, on both sides
            end = clock()
            bn.zero_grad()  # so that gradients are made afresh, not added up, as by torch.autograd.grad
            return between - start, end - between

        return run

    def ours_within_torch(self, torch: Any) -> Callable[[], tuple[float, float]]:
        """Return a function that runs our layer of torch's, by autograd."""
        from cupy_syncbn.interop.torch import SyncBatchNorm as Layer

        grad = torch.autograd.grad
        bn = Layer(
            self.shape[1],
            eps=EPS,
            momentum=MOMENTUM,
            dtype=torch.float64 if self.dtype == "float64" else torch.float32,
            activation=None if self.variant == "plain" else "relu",
        )
        x, dy, residual = self._tensors(torch)
        inputs = [x, *bn.parameters(), *([] if residual is None else [residual])]

        def run() -> tuple[float, float]:
            start = clock()
            y = bn(x, residual)
            between = clock()
            gradients = grad(y, inputs, dy)
            del y, gradients
            return between - start, clock() - between

        return run

    def _tensors(self, torch: Any) -> list[Any]:
        """Return x, dy and the residual as tensors of the same memory."""

        def tensor(array: np.ndarray) -> Any:
            if self.dtype == "bfloat16":
                return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
            return torch.from_numpy(array)

        residual = tensor(self.residual).requires_grad_() if self.variant == "add+relu" else None
        return [tensor(self.x).requires_grad_(), tensor(self.dy), residual]

    def torch(self, torch: Any) -> Callable[[], tuple[float, float]]:
        """Return a function that does the same in PyTorch."""
        batch_norm, grad = torch.nn.functional.batch_norm, torch.autograd.grad
        channels = self.shape[1]
        x, dy, residual = self._tensors(torch)
        dtype = torch.float64 if self.dtype == "float64" else torch.float32  # of the parameters, as ours
        weight = torch.ones(channels, dtype=dtype, requires_grad=True)
        bias = torch.zeros(channels, dtype=dtype, requires_grad=True)
        running_mean, running_var = torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
        inputs = (x, weight, bias) if residual is None else (x, weight, bias, residual)
        relu = self.variant != "plain"

        def run() -> tuple[float, float]:
            start = clock()
            y = batch_norm(x, running_mean, running_var, weight, bias, True, MOMENTUM, EPS)
            if residual is not None:
                y.add_(residual)
            if relu:
                y.relu_()
            between = clock()
            gradients = grad(y, inputs, dy)
            del y, gradients
            return between - start, clock() - between

        return run

    def copy(self) -> Callable[[], tuple[float]]:
        """Return a function that copies an array of the tensor's size."""
        source = np.ones(self.x.size, self.x.dtype)
        target = np.zeros_like(source)

        def run() -> tuple[float]:
            start = clock()
            np.copyto(target, source)
            return (clock() - start,)

        return run

    def peak(self) -> float:
        """Return the most memory that a forward takes, in units of the tensor.

        It finds nothing to use again, since outputs are held.
        """
        bn = self.layer()
        residual = self.residual if self.variant == "add+relu" else None
        held = [bn(self.x, residual=residual) for _ in range(memory.KEPT_OUTPUTS + 1)]
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            held.append(bn(self.x, residual=residual))
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        return (most - before) / self.x.nbytes


def _agreed(count: int) -> int:
    """Return the number of runs of rank 0: a layer's sums take all ranks."""
    agreed = np.array([float(count)])
    default_group().broadcast(agreed)
    return int(agreed[0])


def measure(case: Case, torch: Any | None, repeats: int, torch_layer: bool) -> dict[str, Any]:
    """Measure one case; times are in milliseconds."""
    result: dict[str, Any] = {
        "name": case.name,
        "shape": list(case.shape),
        "variant": case.variant,
        "dtype": case.dtype,
        "layout": "channels_last" if case.channels_last else "channels_first",
        "nbytes": case.x.nbytes,
        "peak": case.peak(),
    }
    ours = case.ours_within_torch(torch) if torch_layer else case.ours()
    contenders = {"ours": ours, "copy": case.copy()}
    if torch is not None:
        contenders["torch"] = case.torch(torch)
    seconds = interleaved(contenders, repeats, agreed=_agreed)
    total = {name: rows.sum(axis=1) for name, rows in seconds.items()}
    limit = TRAFFIC[case.variant] * total["copy"] / 2  # a copy is one read and one write
    result["limit_ms"] = float(np.median(limit)) * 1e3
    result["copy_gb_per_s"] = 2 * case.x.nbytes / float(np.median(total["copy"])) / 1e9
    result["ours_per_limit"] = float(np.median(total["ours"] / limit))
    for name in ("ours", "torch"):
        if name in seconds:
            forward, backward = np.median(seconds[name], axis=0) * 1e3
            result[f"{name}_forward_ms"], result[f"{name}_backward_ms"] = float(forward), float(backward)
            result[f"{name}_ms"] = float(np.median(total[name])) * 1e3
    if "torch" in seconds:
        ratios = total["ours"] / total["torch"]
        result["ratio"] = float(np.median(ratios))
        result["ratio_quartiles"] = [float(quartile) for quartile in np.percentile(ratios, (25, 75))]
    return result


def print_rows(title: str, results: Sequence[dict[str, Any]]) -> None:
    """Print one table."""
    rows = []
    for result in results:
        low, high = result.get("ratio_quartiles", (0, 0))
        rows.append(
            [
                result["name"],
                f"{result['ours_ms']:.3f}",
                f"{result['torch_ms']:.3f}" if "torch_ms" in result else "-",
                f"{result['ratio']:.2f}" if "ratio" in result else "-",
                f"{low:.2f}-{high:.2f}" if "ratio" in result else "-",
                f"{result['ours_per_limit']:.2f}",
                f"{result['copy_gb_per_s']:.0f}",
                f"{result['peak']:.2f}",
            ]
        )
    headings = ["shape", "ours ms", "torch ms", "ratio", "quartiles", "ours/limit", "copy GB/s", "peak"]
    print(f"\n{title}\n\n{table(headings, rows)}")


def print_summary(results: Sequence[dict[str, Any]], network: Counter[tuple[Shape, str]]) -> dict[str, Any]:
    """Print and return the geometric means, the sum over ResNet-50, and the dense layers' microseconds."""
    summary: dict[str, Any] = {}
    for kind, (dtype, channels_last, variants) in KINDS.items():
        layout = "channels_last" if channels_last else "channels_first"
        for variant in variants:
            maps = [
                r
                for r in results
                if len(r["shape"]) > 2 and (r["dtype"], r["layout"], r["variant"]) == (dtype, layout, variant)
            ]
            if not maps or kind == "dense":
                continue
            means = {"ours/limit": geometric_mean([r["ours_per_limit"] for r in maps])}
            large = [r["ours_per_limit"] for r in maps if r["nbytes"] > LARGE]
            if large:
                means["ours/limit of large maps"] = geometric_mean(large)
            if "ratio" in maps[0]:
                means["ours/torch"] = geometric_mean([r["ratio"] for r in maps])
            summary[f"{kind}, {variant}"] = means
            text = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
            print(f"geometric mean over {len(maps)} maps, {kind}, {variant}: {text}")

    by_layer = {
        (tuple(r["shape"]), r["variant"]): r
        for r in results
        if (r["dtype"], r["layout"]) == ("float32", "channels_first")
    }
    if all(layer in by_layer for layer in network):
        sums = {}
        for name in ("ours_ms", "torch_ms", "limit_ms"):
            if all(name in by_layer[layer] for layer in network):
                sums[name] = sum(by_layer[layer][name] * times for layer, times in network.items())
        summary["resnet50"] = sums
        text = ", ".join(f"{name.removesuffix('_ms')} {ms:.0f} ms" for name, ms in sums.items())
        print(f"the {network.total()} batch norms of ResNet-50, each in its variant: {text}")

    for dense in (r for r in results if len(r["shape"]) == 2):
        texts = []
        for name in ("ours", "torch"):
            if f"{name}_ms" in dense:
                parts = [dense[f"{name}{part}_ms"] * 1e3 for part in ("_forward", "_backward", "")]
                texts.append("{} {:.1f} + {:.1f} = {:.1f} us".format(name, *parts))
        print(f"dense layer {dense['name']}, forward + backward: {', '.join(texts)}")
    return summary


def zero_grad(torch: Any | None, layers: int, repeats: int) -> dict[str, float]:
    """Return the microseconds of zero_grad of that many layers of 64 channels."""
    ours = Sequential(*(SyncBatchNorm(64, device="cpu") for _ in range(layers)))
    trees = {"ours": ours}
    if torch is not None:
        trees["torch"] = torch.nn.Sequential(*(torch.nn.BatchNorm2d(64) for _ in range(layers)))

    def timed(tree: Any) -> Callable[[], tuple[float]]:
        def run() -> tuple[float]:
            start = clock()
            tree.zero_grad()
            return (clock() - start,)

        return run

    seconds = interleaved({name: timed(tree) for name, tree in trees.items()}, repeats, agreed=_agreed)
    return {name: 1e6 * float(np.median(rows)) for name, rows in seconds.items()}


def plot(results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Any | None:
    """Draw the ratios to PyTorch and to the copy limit, one group of bars a shape."""
    drawn = [r for r in results if (r["dtype"], r["layout"]) == ("float32", "channels_first")]
    if not drawn:
        return None
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in drawn))
    made = new_figure(ncols=2, sharey=True, figsize=(11, 1.8 + 0.45 * len(shapes)))
    if made is None:
        return None
    figure, (against_torch, against_limit) = made
    for axes, key, meaning, reference in (
        (against_torch, "ratio", "time of cupy_syncbn / time of PyTorch", "PyTorch"),
        (against_limit, "ours_per_limit", "time of cupy_syncbn / time to copy the same bytes", "copy"),
    ):
        for place, variant in enumerate(VARIANTS):
            chosen = [r for r in drawn if r["variant"] == variant and key in r]
            where = [shapes.index(tuple(r["shape"])) + 0.27 * (place - 1) for r in chosen]
            axes.barh(where, [r[key] for r in chosen], height=0.25, label=variant)
        axes.axvline(1, color="black", linewidth=1, linestyle="--", label=reference)
        axes.set(xlabel=meaning, xlim=(0, None))
        axes.grid(axis="x", alpha=0.3)
    against_torch.set_yticks(range(len(shapes)), ["x".join(map(str, shape)) for shape in shapes])
    against_torch.invert_yaxis()
    against_torch.set_ylabel("shape of the batch")
    against_torch.legend(loc="best")
    figure.suptitle("SyncBatchNorm on NumPy arrays, forward + backward, float32, one process")
    figure.supxlabel(caption(facts), fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few small shapes, few repeats")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads of each side (default 1)"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="samples of each (default 31; --quick 3)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="what to measure")
    parser.add_argument(
        "--isa",
        metavar="LEVEL",
        help="instruction set of the core, or numpy: see CUPY_SYNCBN_ISA in scripts/docs/install.md",
    )
    parser.add_argument("--torch-layer", action="store_true", help="measure cupy_syncbn.interop.torch")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the results go")
    options = parser.parse_args(arguments)
    if options.isa:
        restart_with({"CUPY_SYNCBN_ISA": options.isa})
    pin_threads(options.threads)
    torch = import_torch(options.threads)
    if torch is None and options.torch_layer:
        return 1
    repeats = options.repeats or (3 if options.quick else 31)
    if options.threads == 1:
        global clock
        clock = time.process_time
    if default_group().rank > 0:  # which takes part, and says nothing
        sys.stdout = io.StringIO()

    network = resnet50(1 if options.quick else 8)
    maps = [*dict.fromkeys(shape for shape, _ in network), SEGMENTATION]
    five = [maps[0], *(shape for shape in maps if shape[1:] in FIVE)]
    if options.quick:
        maps = five = maps[-4:-1]

    results: list[dict[str, Any]] = []
    for kind in options.kinds:
        dtype, channels_last, variants = KINDS[kind]
        shapes = DENSE if kind == "dense" else maps if kind == "float32" else five
        for variant in variants:
            cases = [Case(shape, variant, dtype, channels_last) for shape in shapes]
            rows = [measure(case, torch, repeats, options.torch_layer) for case in cases]
            print_rows(f"{kind}, {variant}: forward + backward", rows)
            results += rows
    print()
    print(f"computed by: {loading.status()}; {default_group().size} rank(s)")
    summary = print_summary(results, network)
    summary["zero_grad_us"] = zero_grad(torch, network.total(), repeats)
    times = ", ".join(f"{name} {us:.1f} us" for name, us in summary["zero_grad_us"].items())
    print(f"zero_grad of {network.total()} layers: {times}")
    facts = circumstances(arguments, options.threads, ["cupy_syncbn", "numpy", "torch"])
    facts |= {"cpu": loading.facts()["isa"], "ranks": default_group().size}
    print(f"\n{caption(facts)}")
    if default_group().rank == 0:
        record = {**facts, "repeats": repeats, "summary": summary, "results": results}
        name = (
            "cpu"
            + f"-{options.isa}" * bool(options.isa)
            + "-torch" * options.torch_layer
            + "-ranks" * (default_group().size > 1)
        )
        save(options.output, name + "-quick" * options.quick, record, plot(results, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
