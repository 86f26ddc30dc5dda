"""A model of the CUDA kernels' times on GPUs: a calculation, not a measurement.

    python scripts/benchmarks/gpu_model.py                     # ResNet-50 at batch 32, on an H200
    python scripts/benchmarks/gpu_model.py --gpu A100 --batch 256 --dtypes float16
    python scripts/benchmarks/gpu_model.py --large             # large tensors, on all GPUs
    python scripts/benchmarks/gpu_model.py --markdown >scripts/benchmarks/results/gpu-model-2026-11-30.txt

It takes what is counted in the machine code (results/gpu-model-counts.json, by tests/support/nvrtc.py
--profiles; gpu-model-counts-before.json is of the engine of commit e61d519, which launched eight blocks a
multiprocessor, and was counted then, without the halvings below), how launch.py shares a tensor among blocks,
and the figures of GPUs below. The time of a block is

    fixed = CPI * instructions outside of the main loop, or their float64 if its pipe takes longer
            + WAIT * round trips to memory
            + CPI * instructions of the sums over a block, for each further row and each halving of a warp
    turn  = LOADED latency * SLACK, in which a thread does the loads of UNROLL vectors

and memory, the issue of instructions, or a pipe limits how fast the blocks go on together. A launch takes
LAUNCH more. No cycle was measured: CPI, the GPUs' figures and the caps are assumptions, the same for both
engines. gpu.py prints what it measures beside this.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from cpu import resnet50
from measure import RESULTS, geometric_mean, table

from cupy_syncbn.backends.cuda import kernels
from cupy_syncbn.backends.cuda.launch import MIN_BLOCKS, THREADS, Launch, launch_for

Shape = tuple[int, ...]

CPI = 4.5
"""Cycles an instruction of one warp, which takes turns with others and waits for its own results."""
WAIT = 1900 / 3
"""Cycles a round trip: two fences and an atomic take 1900."""
SLACK = 1.15
LAUNCH = 2e-6
"""Seconds: the start and the end of a launch in a graph."""
REGISTERS = 65536
"""Of a multiprocessor."""
ISSUE = 4
"""Instructions a cycle and multiprocessor."""
ISSUE_CAPS = {True: 0.80, False: 0.75}
"""Shares of ISSUE that are reached: with 24 warps or more, and with fewer."""
PIPE_CAP = 0.90
OWN = 2.2
"""Cycles an instruction of the loop, where a warp has its turn alone."""
VECTOR_BYTES = 16 * 32
"""Of a warp."""


class Gpu(NamedTuple):
    """A GPU's figures: public ones, but for the latency and the bandwidth, which are assumptions."""

    architecture: str
    multiprocessors: int
    ghz: float
    copy_tb_per_s: float
    fp32: float
    alu: float
    fp64: float
    """Instructions of warps a cycle and multiprocessor: this and the two before."""
    latency: int
    """Cycles of a load while memory is busy."""
    warps: int
    """That a multiprocessor holds."""

    @property
    def bytes_a_cycle(self) -> float:
        """Bytes that a multiprocessor moves in a cycle at the copy's bandwidth."""
        return self.copy_tb_per_s * 1e3 / self.ghz / self.multiprocessors


GPUS = {
    "A100": Gpu("sm_80", 108, 1.41, 1.78, 2, 2, 1, 720, 64),
    "H100": Gpu("sm_90", 132, 1.755, 2.95, 4, 2, 2, 850, 64),
    "H200": Gpu("sm_90", 132, 1.83, 4.30, 4, 2, 2, 850, 64),
    "B200": Gpu("sm_100", 148, 1.85, 7.0, 4, 2, 2, 1050, 64),
    "RTX 4090": Gpu("sm_80", 128, 2.52, 0.93, 4, 2, 1 / 16, 750, 48),
    "RTX 5090": Gpu("sm_120", 170, 2.41, 1.6, 4, 2, 1 / 16, 850, 48),
}
KERNELS = ("statistics", "normalize", "reduce_gradients", "input_gradient")
TENSORS = {"statistics": (1, 0), "normalize": (1, 1), "reduce_gradients": (2, 0), "input_gradient": (2, 1)}
"""Read and written, without a residual."""


NOW, BEFORE = "gpu-model-counts.json", "gpu-model-counts-before.json"
BLOCKS_BEFORE = 8
"""A multiprocessor that the engine before launched."""


@functools.cache
def counts(file: str = NOW) -> dict[str, Any]:
    """Return what was counted, by instance and architecture."""
    found: dict[str, Any] = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return found


class Kernel(NamedTuple):
    """An instance of a kernel on a GPU."""

    name: str
    residual: bool
    unroll: int
    """Vectors of each tensor that a thread loads at once."""
    counted: dict[str, Any]
    gpu: Gpu
    file: str
    """Of the counts."""
    blocks: int | None
    """A multiprocessor that are launched, where there is work for them; None for as many as now."""

    def launch(self, view: tuple[int, int, int], itemsize: int) -> Launch:
        """Return its launch on a tensor."""
        multiprocessors = self.gpu.multiprocessors
        if self.blocks is not None:  # of which launch.py knows no more than their product with others
            multiprocessors = multiprocessors * self.blocks // MIN_BLOCKS
        return launch_for(view, itemsize, True, multiprocessors)

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds, by their registers."""
        by_registers = REGISTERS // (-(-self.counted["registers"] // 8) * 8 * THREADS)
        return int(min(by_registers, self.gpu.warps * 32 // THREADS))

    @property
    def tensors(self) -> tuple[int, int]:
        """How many tensors it reads and writes."""
        reads, writes = TENSORS[self.name]
        return reads + (self.residual and self.name == "normalize"), writes + (
            self.residual and self.name == "reduce_gradients"
        )

    def fixed_cycles(self, sums: BlockSums) -> float:
        """Return the fixed cost of a block."""
        counted, warps = self.counted, THREADS // 32
        around = max(CPI * counted["around"], warps * counted["float64"] / self.gpu.fp64)
        adding = (counted["row"] or 0) * max(sums.rows - 1, 0)
        if sums.own:
            adding += counted.get("own") or 0
        adding += (counted.get("step") or 0) * sums.steps
        return float(around + WAIT * counted["waits"] + CPI * adding)

    def limits(self) -> dict[str, float]:
        """Return the shares of the copy's bandwidth that each limit allows on a tensor without an end."""
        gpu, pipes, warps = self.gpu, self.counted["pipes"], self.resident * THREADS // 32
        moved = VECTOR_BYTES * sum(self.tensors)
        cycles = moved / gpu.bytes_a_cycle  # that a vector may take
        instructions = sum(pipes.values())

        def taken(*names: str) -> float:
            return float(sum(pipes.get(name, 0) for name in names)) or 1e-9

        multiply_add = max(taken("fp32", "half", "imad") / gpu.fp32, taken("half", "imad") / 2)
        turn = gpu.latency + OWN * instructions * self.unroll
        return {
            "memory": 1.0,
            "issue": ISSUE_CAPS[warps >= 24] * ISSUE * cycles / instructions,
            "ALU": PIPE_CAP * gpu.alu * cycles / taken("alu"),
            "FMA": PIPE_CAP * cycles / multiply_add,
            "FP64": PIPE_CAP * gpu.fp64 * cycles / taken("fp64", "cvt64"),
            "latency": min(1.2, warps * moved * self.unroll / turn / gpu.bytes_a_cycle),
        }


def kernel_on(name: str, dtype: str, columns: bool, variant: str, gpu: Gpu, file: str = NOW) -> Kernel | None:
    """Return an instance for vectors; None if nothing was counted of it."""
    residual, activation = variant == "add+relu", "IDENTITY" if variant == "plain" else "RELU"
    width = kernels.vector_width(4 if dtype == "float32" else 2)
    if name == "statistics":
        _, instance = kernels.statistics(dtype, width, columns)
    elif file == BEFORE and name == "input_gradient":  # which had a mask then
        instance = f"input_gradient<{kernels.TYPES[dtype]}, {width}, {columns}, {residual}, {activation}>"
        instance = re.sub(r"True|False", lambda match: match[0].lower(), instance)
    else:
        _, instance = getattr(kernels, name)(dtype, width, columns, residual, activation)
    counted = counts(file).get(instance, {}).get(gpu.architecture)
    if counted is None:
        return None
    unroll = 4 if name == "statistics" or (name == "normalize" and not residual) else 2
    return Kernel(name, residual, unroll, counted, gpu, file, BLOCKS_BEFORE if file == BEFORE else None)


class BlockSums(NamedTuple):
    """How a block adds up the sums of its threads, by channel."""

    rows: int
    """Values of a channel that one thread adds up."""
    own: bool
    """Whether each thread adds up its own before."""
    steps: int
    """Halvings of the threads of a channel."""


def sums_of(launch: Launch, S: int, file: str) -> BlockSums:
    """Return how the blocks of a launch add up."""
    if not launch.columns:
        return BlockSums(THREADS // 32, False, 0)
    height = THREADS // launch.lanes
    if file == BEFORE:
        return BlockSums(height if S == 1 else -(-height * S // 32), False, 0)
    own = S % launch.width == 0 and launch.width > 1
    steps = min(5, int(math.log2(THREADS)) - math.ceil(math.log2(launch.group)))
    values = height * S // (launch.width if own else 1)
    return BlockSums(-(-values // 2**steps), own, steps)


class Prediction(NamedTuple):
    """Of a launch."""

    seconds: float
    share: float
    """Of the copy's bandwidth."""


def predict(
    kernel: Kernel, shape: Shape, itemsize: int, channels_last: bool, cycles: float | None = None
) -> Prediction:
    """Return the time of a launch on a tensor (N, C, ...); `cycles` replaces the fixed cost of a block."""
    gpu = kernel.gpu
    N, C, S = shape[0], shape[1], math.prod(shape[2:])
    view = (N * S, C, 1) if channels_last else (N, C, S)
    launch = kernel.launch(view, itemsize)
    clock, bandwidth = gpu.ghz * 1e9, gpu.copy_tb_per_s * 1e12
    moved = N * C * S * itemsize * sum(kernel.tensors)
    streamed = moved / (bandwidth * min(kernel.limits().values()))
    items = launch.per_split / (THREADS // launch.lanes if launch.columns else THREADS)
    fixed = (kernel.fixed_cycles(sums_of(launch, view[2], kernel.file)) if cycles is None else cycles) / clock
    turns = math.ceil(items / kernel.unroll) * SLACK * gpu.latency / clock
    rounds = launch.blocks / (gpu.multiprocessors * kernel.resident)
    if rounds <= 1:  # nothing streams while all begin
        seconds = fixed + max(turns, streamed)
    else:
        together = streamed / rounds  # a round of blocks, at the bandwidth that there is
        alone = fixed + turns
        seconds = fixed + max(streamed, math.ceil(rounds) * alone if alone > together else rounds * together)
    return Prediction(seconds + LAUNCH, min(1.0, moved / bandwidth / (seconds + LAUNCH)))


def of_resnet50(
    gpu: Gpu, batch: int, dtype: str, channels_last: bool, file: str
) -> dict[str, dict[Shape, Prediction]]:
    """Return the predictions for the maps of a ResNet-50, with ReLU and without a residual."""
    found: dict[str, dict[Shape, Prediction]] = {}
    itemsize = 4 if dtype == "float32" else 2
    for shape in dict.fromkeys(shape for shape, _ in resnet50(batch)):
        S = math.prod(shape[2:])
        view = (shape[0] * S, shape[1], 1) if channels_last else (*shape[:2], S)
        columns = launch_for(view, itemsize, True, gpu.multiprocessors).columns
        for name in KERNELS:
            kernel = kernel_on(name, dtype, columns, "relu", gpu, file)
            if kernel is not None:
                found.setdefault(name, {})[shape] = predict(kernel, shape, itemsize, channels_last)
    return found


def mean_share(predictions: Iterable[Prediction]) -> float:
    """Return the geometric mean of the shares."""
    return geometric_mean([each.share for each in predictions])


def print_resnet50(name: str, batch: int, dtypes: Sequence[str], every_map: bool) -> None:
    """Print the shares of the copy's bandwidth, for this engine and that of before."""
    gpu = GPUS[name]
    print(
        f"\nA MODEL: {name}, ResNet-50 at batch {batch}: "
        "share of the copy's bandwidth, geometric mean of the maps\n"
    )
    rows, maps = [], []
    for dtype in dtypes:
        for channels_last in (False, True):
            before = of_resnet50(gpu, batch, dtype, channels_last, BEFORE)
            now = of_resnet50(gpu, batch, dtype, channels_last, NOW)
            layout = "NHWC" if channels_last else "NCHW"
            cells = [
                f"{mean_share(before[k].values()):.2f} {mean_share(now[k].values()):.2f}" for k in KERNELS
            ]
            rows.append([f"{dtype} {layout}", *cells])
            for shape in now[KERNELS[0]]:
                times = [
                    f"{before[k][shape].seconds * 1e6:.1f} {now[k][shape].seconds * 1e6:.1f}" for k in KERNELS
                ]
                maps.append([f"{dtype} {layout} {'x'.join(map(str, shape))}", *times])
    print(table(["before, now", *KERNELS], rows))
    if every_map:
        print(f"\nA MODEL: {name}: microseconds, before and now\n")
        print(table(["tensor", *KERNELS], maps))


def print_large(dtypes: Sequence[str]) -> None:
    """Print what limits each kernel on tensors of many rounds."""
    print("\nA MODEL: large tensors: share of the copy's bandwidth, and what limits it, before and now\n")
    rows = []
    for dtype in dtypes:
        for columns in (False, True):
            for name in KERNELS:
                cells = []
                for gpu in GPUS.values():
                    found = []
                    for file in (BEFORE, NOW):
                        kernel = kernel_on(name, dtype, columns, "relu", gpu, file)
                        limit, share = (
                            min(kernel.limits().items(), key=lambda item: item[1]) if kernel else ("?", 0)
                        )
                        found.append(f"{share:.2f} {limit}")
                    cells.append(found[1] if found[0] == found[1] else " > ".join(found))
                rows.append([f"{name} {dtype} {'matrix' if columns else 'rows'}", *cells])
    print(table(["", *GPUS], rows))


def modelled_us(
    kernel: str, shape: Shape, dtype: str, channels_last: bool, variant: str, device: str
) -> float | None:
    """Return the modelled microseconds of a kernel of gpu.py; None if the model does not know the device."""
    gpu = next((figures for name, figures in GPUS.items() if re.search(rf"\b{name}\b", device)), None)
    if gpu is None:
        return None
    itemsize = 4 if dtype == "float32" else 2
    S = math.prod(shape[2:])
    view = (shape[0] * S, shape[1], 1) if channels_last else (*shape[:2], S)
    columns = launch_for(view, itemsize, True, gpu.multiprocessors).columns
    name = "normalize" if kernel == "evaluate" else kernel
    # Of bfloat16 nothing was counted: it is read and written as float16 is.
    found = kernel_on(name, "float32" if dtype == "float32" else "float16", columns, variant, gpu)
    return None if found is None else predict(found, shape, itemsize, channels_last).seconds * 1e6


def assumptions() -> str:
    """Return the constants, a line each."""
    lines = [f"CPI {CPI}, round trip {WAIT:.0f} cycles, slack {SLACK}, launch {LAUNCH * 1e6:g} us"]
    lines += [f"{name}: {' '.join(f'{k} {v:g}' for k, v in gpu._asdict().items() if k != 'architecture')}"
              f" ({gpu.architecture})" for name, gpu in GPUS.items()]  # fmt: skip
    return "\n".join(lines)


HEAD = """# The CUDA kernels: a model

A calculation by scripts/benchmarks/gpu_model.py, not a measurement: no GPU was at hand. Before: the engine of
commit e61d519, with eight blocks a multiprocessor. Now: the kernels whose counts lie beside this file, with
as many blocks as are resident."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "float16"), default=("float32", "float16"))
    parser.add_argument("--large", action="store_true", help="tensors of many rounds, on all GPUs")
    parser.add_argument("--markdown", action="store_true", help="all of it, for results/")
    options = parser.parse_args(argv)
    if options.markdown:
        print(HEAD)
    if options.large or options.markdown:
        print_large(options.dtypes)
    if not options.large:
        print_resnet50(options.gpu, options.batch, options.dtypes, every_map=True)
    print(f"\nAssumed:\n\n```\n{assumptions()}\n```")
    return 0


if __name__ == "__main__":
    sys.exit(main())
