"""The memory that a chain of layers needs for forward and backward, by how the normalization is done.

The chain is ten 1×1 convolutions, each with a batch normalization and a leaky ReLU behind it. Held is only
what the backward needs:

    plain       a normalization that keeps its input, then a leaky ReLU that keeps its own, as torch's do
    fused       one layer with both, which keeps its input
    in place    the same, which writes its output over its input, and keeps that alone

The peak is that of bytes allocated between the start of the forward and the end of the backward, beside the
input, the parameters and dy. On a CPU tracemalloc counts them, on a GPU CuPy's memory pool; with --emulate
the tests' emulator of a GPU.

With --time, the time of the fused layer alone and of that in place is compared too, on a CPU by one thread.

    python scripts/benchmarks/memory.py
    python scripts/benchmarks/memory.py --time
    python scripts/benchmarks/memory.py --device cuda
    python scripts/benchmarks/memory.py --emulate
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from measure import (
    RESULTS,
    caption,
    circumstances,
    geometric_mean,
    interleaved,
    new_figure,
    pin_threads,
    save,
    table,
)

from cupy_syncbn import BatchNorm2d, Module, Parameter, Sequential

LAYERS = 10
SLOPE = 0.01
KINDS = ("plain", "fused", "in place")
TYPES = ("float32", "float16", "float64")
MAPS = ((8, 64, 112, 112), (8, 256, 56, 56), (8, 128, 28, 28), (8, 1024, 14, 14), (8, 512, 7, 7))
"""Some of ResNet-50's."""
Peak = Callable[[], int]


class Convolution(Module):
    """A 1×1 convolution: a product with a matrix at each pixel. It keeps its input."""

    def __init__(self, xp: Any, channels: int, rng: np.random.Generator) -> None:
        self.weight = Parameter(xp.asarray(rng.normal(0, channels**-0.5, (channels,) * 2).astype("float32")))
        self.x: Any = None

    def forward(self, x: Any) -> Any:
        self.x = x
        N, C, H, W = x.shape
        return (self.weight.data @ x.reshape(N, C, H * W)).reshape(x.shape)

    def backward(self, dy: Any) -> Any:
        x, self.x = self.x, None
        N, C, H, W = dy.shape
        as_matrices = (N, C, H * W)
        product = dy.reshape(as_matrices) @ x.reshape(as_matrices).transpose(0, 2, 1)
        del x
        self.weight.accumulate(product.sum(axis=0))
        return (self.weight.data.T @ dy.reshape(as_matrices)).reshape(dy.shape)


class LeakyReLU(Module):
    """A leaky ReLU that keeps its input."""

    def __init__(self) -> None:
        self.x: Any = None

    def forward(self, x: Any) -> Any:
        self.x = x
        return x * SLOPE + (x > 0) * (x * (1 - SLOPE))

    def backward(self, dy: Any) -> Any:
        x, self.x = self.x, None
        return dy * SLOPE + (x > 0) * (dy * (1 - SLOPE))


def chain(kind: str, xp: Any, channels: int) -> Sequential:
    """Return the layers, with the same parameters for each kind."""
    rng = np.random.default_rng(0)
    device = "cpu" if xp is np else "cuda"
    layers: list[Module] = []
    for _ in range(LAYERS):
        layers.append(Convolution(xp, channels, rng))
        if kind == "plain":
            layers += [BatchNorm2d(channels, device=device), LeakyReLU()]
        else:
            activation = ("leaky_relu", SLOPE)
            layers.append(
                BatchNorm2d(channels, device=device, activation=activation, inplace=kind == "in place")
            )
    return Sequential(*layers)


@contextlib.contextmanager
def peak_of(xp: Any, emulator: Any | None) -> Iterator[Peak]:
    """Yield what tells the most bytes in use since then, beyond those in use then."""
    if emulator is not None:
        emulator.memory.reset_peak()
        before = emulator.memory.live_bytes
        yield lambda: emulator.memory.peak_bytes - before
    elif xp is np:
        tracemalloc.start()
        yield lambda: tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    else:
        pool = xp.get_default_memory_pool()
        before = pool.used_bytes()

        class Most(xp.cuda.MemoryHook):  # type: ignore[misc]
            name = "most"
            used = before

            def malloc_postprocess(self, **facts: Any) -> None:
                self.used = max(self.used, pool.used_bytes())

        with Most() as most:
            yield lambda: most.used - before


def find_library(device: str, emulate: bool, stack: contextlib.ExitStack) -> tuple[Any, Any | None]:
    """Return the library of the arrays, and the emulator if it is that of the tests."""
    if emulate:
        sys.path.append(str(Path(__file__).parents[2] / "tests"))
        import cuda_emulator

        return stack.enter_context(cuda_emulator.installed("fast")), cuda_emulator
    if device == "cpu":
        return np, None
    import cupy

    return cupy, None


def measure(
    kind: str, device: str, emulate: bool, shape: tuple[int, int, int, int]
) -> tuple[int, list[np.ndarray]]:
    """Return the peak of a chain's first step in bytes, and its gradients."""
    rng = np.random.default_rng(1)
    with contextlib.ExitStack() as stack:
        xp, emulator = find_library(device, emulate, stack)
        x, dy = (xp.asarray(rng.normal(size=shape).astype("float32")) for _ in range(2))
        net = chain(kind, xp, shape[1])
        with peak_of(xp, emulator) as peak:
            net(x)
            net.backward(dy)
            most = peak()
        gradients = [parameter.grad for parameter in net.parameters()]
        return most, gradients if xp is np else [xp.asnumpy(gradient) for gradient in gradients]


def measure_apart(*arguments: Any) -> tuple[int, list[np.ndarray]]:
    """Measure in a process of its own, where no memory of another chain is left to be used again."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


def timed_step(inplace: bool, shape: tuple[int, ...], dtype: str) -> Callable[[], Sequence[float]]:
    """Return a function that runs a layer forward and backward, and returns the seconds of processor time."""
    rng = np.random.default_rng(0)
    bn = BatchNorm2d(
        shape[1],
        device="cpu",
        dtype="float64" if dtype == "float64" else "float32",
        activation=("leaky_relu", SLOPE),
        inplace=inplace,
    )
    values, dy = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    x = values.copy()

    def run() -> Sequence[float]:
        np.copyto(x, values)  # both alike, in which state caches are
        start = time.process_time()
        bn(x)
        bn.backward(dy)
        seconds = time.process_time() - start
        bn.zero_grad()
        return [seconds]

    return run


def compare_times(maps: Sequence[tuple[int, ...]], repeats: int) -> dict[str, float]:
    """Return the time of the layer in place as a ratio to that of the ordinary one, by type."""
    found = {}
    for dtype in TYPES:
        ratios = []
        for shape in maps:
            steps = {kind: timed_step(kind == "in place", shape, dtype) for kind in ("fused", "in place")}
            seconds = interleaved(steps, repeats)
            ratios.append(float(np.median(seconds["in place"] / seconds["fused"])))
        found[dtype] = geometric_mean(ratios)
        print(f"{dtype}: in place {found[dtype]:.2f} of the time, " + ", ".join(f"{r:.2f}" for r in ratios))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the results; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--emulate", action="store_true", help="on the tests' emulator of a GPU")
    parser.add_argument("--quick", action="store_true", help="small tensors, seconds")
    parser.add_argument("--time", action="store_true", help="compare times too")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args(argv)
    if arguments.time:
        pin_threads(1)
    shape = (2, 16, 40, 40) if arguments.quick or arguments.emulate else (8, 64, 56, 56)
    tensor = 4 * int(np.prod(shape))
    found = {kind: measure_apart(kind, arguments.device, arguments.emulate, shape) for kind in KINDS}
    expected = found["plain"][1]
    for kind, (_, gradients) in found.items():
        # Rounding changes the sign of few values near 0, and with it the slope: so not the largest error.
        error = max(
            float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(gradients, expected, strict=True)
        )
        if not error < 1e-2:
            print(f"{kind}: gradients are {error:.1e} off")
            return 1
    peaks = {kind: peak for kind, (peak, _) in found.items()}
    name = "emulated GPU" if arguments.emulate else {"cpu": "CPU", "cuda": "GPU"}[arguments.device]
    rows = [
        [kind, f"{peak / 2**20:.1f}", f"{peak / tensor:.1f}", f"{peak / peaks['fused']:.2f}"]
        for kind, peak in peaks.items()
    ]
    print(f"{LAYERS} layers of {shape[1]} channels, {shape[0]}x{shape[2]}x{shape[3]} pixels, {name}\n")
    print(table(["normalization", "peak, MiB", "in tensors", "of fused"], rows))
    facts = circumstances(sys.argv[1:] if argv is None else argv, 1, ["numpy", "cupy"])
    print(f"\n{caption(facts)}")
    record = {**facts, "shape": shape, "tensor_bytes": tensor, "peak_bytes": peaks, "where": name}
    if arguments.time:
        print()
        record["time"] = compare_times(MAPS[-1:], 2) if arguments.quick else compare_times(MAPS, 15)
    picture = new_figure(figsize=(6, 3))
    if picture is not None:
        _, axes = picture
        axes.barh(KINDS[::-1], [peaks[kind] / tensor for kind in KINDS[::-1]], color="tab:blue")
        axes.set_xlabel(f"peak memory of {LAYERS} layers, in tensors of the input's size ({name})")
        axes.set_ylabel("normalization")
    save(
        arguments.output,
        f"memory-{name.lower().replace(' ', '-')}",
        record,
        None if picture is None else picture[0],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
