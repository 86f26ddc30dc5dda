"""Count the package's own Python calls, and time the Python around the arithmetic.

A small layer's time is that of Python, not of arithmetic: a call of a function costs some 50 to 100 ns.

    mpirun -n 2 python -m mpi4py scripts/benchmarks/calls.py

counts the calls of functions of cupy_syncbn, comprehensions among them, in a layer's first forward and
backward and in later ones: in all, before the first arithmetic (a backend's `statistics` or
`reduce_gradients`), and the package's frames on the stack where it is deepest. With `--emulate` it also
counts the CUDA engine on the emulator of the tests, whose own calls are left out; its microseconds mean
nothing, and are left out too.

    python scripts/benchmarks/calls.py --against ../parent

times a dense layer, (64, 128) in float32, forward and backward on one process: whole, and with the operations
of the backend replaced by their recorded results, so that Python's part is left; and `zero_grad` of as many
layers as a ResNet-50 has. Both checkouts take turns; the table shows medians of process time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from measure import pin_threads, table

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = (4, 16, 8, 8)
DENSE = (64, 128)
LAYERS = 53  # of batch normalization in a ResNet-50
ARITHMETIC = ("statistics", "reduce_gradients")
OPERATIONS = (*ARITHMETIC, "empty", "normalize", "normalize_fixed", "input_gradient")
REPEATS, ROUNDS, TURNS = 200, 15, 9


class Count(NamedTuple):
    """The package's own calls in one call of a layer."""

    calls: int
    before: int
    """Those before the first arithmetic."""
    frames: int
    """The package's frames on the stack where it is deepest."""


def count(package: str, call: Callable[[], Any]) -> Count:
    """Count the calls of functions whose files lie in a folder."""
    calls = before = frames = 0
    has_begun = False

    def is_own(frame: FrameType) -> bool:
        return frame.f_code.co_filename.startswith(package)

    def see(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls, before, frames, has_begun
        if event == "c_call" and argument.__name__ in ARITHMETIC:  # of the compiled core
            has_begun = True
        if event != "call" or not is_own(frame):
            return
        has_begun = has_begun or frame.f_code.co_name in ARITHMETIC
        calls += 1
        before += not has_begun
        depth, each = 0, frame
        while each is not None:
            depth += is_own(each)
            each = each.f_back  # type: ignore[assignment]
        frames = max(frames, depth)

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Count(calls, before, frames)


def microseconds(call: Callable[[], Any]) -> float:
    """Return the least wall time of a call, which waits for the other ranks."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 1e6 * best


@contextlib.contextmanager
def library(device: str, emulate: bool) -> Iterator[Any]:
    """Install the stand-in for CuPy if wanted, and give the array library of a device."""
    if device == "cpu":
        yield np
    elif emulate:
        sys.path.append(str(REPOSITORY / "tests"))
        import cuda_emulator

        with cuda_emulator.installed("fast") as stand_in:
            yield stand_in
    else:
        import cupy

        yield cupy


def counted(device: str, emulate: bool) -> list[list[str]]:
    """Return the rows of the table for a device (collective over the world)."""
    import cupy_syncbn
    from cupy_syncbn import SyncBatchNorm, default_group

    package, rows = str(Path(cupy_syncbn.__file__).parent) + os.sep, []
    with library(device, emulate) as xp:
        rng = np.random.default_rng(default_group().rank)
        layer = SyncBatchNorm(SHAPE[1], activation="relu", device=device)
        x = xp.asarray(rng.normal(0, 1, SHAPE).astype("float32"))
        dy = xp.asarray(rng.normal(0, 1, SHAPE).astype("float32"))

        def clear() -> None:
            layer.weight.grad = layer.bias.grad = None

        first = count(package, lambda: layer(x)), count(package, lambda: layer.backward(dy))
        for _ in range(3):
            layer.backward(layer(x))
        # A message that has not gone yet takes a call more: the fewest of several are those of the code.
        counts = []
        for _ in range(20):
            clear()
            counts.append((count(package, lambda: layer(x)), count(package, lambda: layer.backward(dy))))
        later = tuple(map(min, zip(*counts, strict=True)))
        clear()
        times = ["", ""]
        if not emulate or device == "cpu":
            forward = microseconds(lambda: layer(x))
            layer.forget()
            both = microseconds(lambda: (layer(x), layer.backward(dy)))
            times = [f"{forward:.1f}", f"{both - forward:.1f}"]
    engine = f"{device}, emulated" if emulate and device == "cuda" else device
    for direction, one, other, us in zip(("forward", "backward"), first, later, times, strict=True):
        rows.append([f"{engine}, {direction}", *map(str, one), *map(str, other), us])
    return rows


def dense_layer() -> Callable[[], None]:
    """Return the forward and backward of a dense layer."""
    from cupy_syncbn import SyncBatchNorm

    layer = SyncBatchNorm(DENSE[1], device="cpu")
    x = np.random.default_rng(0).normal(3, 2, DENSE).astype("float32")

    def step() -> None:
        layer.backward(layer(x))
        layer.weight.grad = layer.bias.grad = None

    return step


def without_arithmetic() -> Callable[[], None]:
    """Return the same with the operations of the backend replaced by their recorded results."""
    from cupy_syncbn.backends import backend_of

    operations = backend_of(np.empty(0))
    recorded: dict[str, Any] = {}

    def recording(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any, **keywords: Any) -> Any:
            recorded[name] = operation(*arguments, **keywords)
            return recorded[name]

        return record

    for name in OPERATIONS:
        if hasattr(operations, name):
            setattr(operations, name, recording(name, getattr(operations, name)))
    step = dense_layer()
    step()
    for name, result in recorded.items():
        setattr(operations, name, lambda *arguments, result=result, **keywords: result)
    return step


def zero_gradients() -> Callable[[], None]:
    """Return `zero_grad` of as many batch normalizations as a ResNet-50 has."""
    from cupy_syncbn import BatchNorm2d, Sequential

    return Sequential(*[BatchNorm2d(8, device="cpu") for _ in range(LAYERS)]).zero_grad


PARTS = {
    f"dense layer {DENSE}, whole": dense_layer,
    f"dense layer {DENSE}, without the arithmetic": without_arithmetic,
    f"zero_grad of {LAYERS} layers": zero_gradients,
}


def answer(part: str) -> None:
    """Print microseconds for each line that comes in: the worker of `--against`."""
    run = PARTS[part]()
    run()
    for _ in sys.stdin:
        times = []
        for _ in range(ROUNDS):
            start = time.process_time_ns()
            for _ in range(REPEATS):
                run()
            times.append((time.process_time_ns() - start) / REPEATS)
        print(min(times) / 1000, flush=True)


def compared(part: str, other: Path) -> list[str]:
    """Let this checkout and another take turns; return the row of the table."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--answer", part], env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
        )
        for folder in (REPOSITORY, other.resolve())
    ]  # fmt: skip
    turns: list[list[float]] = []
    for turn in range(TURNS):
        times = [0.0, 0.0]
        for index in (0, 1) if turn % 2 else (1, 0):  # nobody is always the one who comes second
            worker = workers[index]
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
            times[index] = float(worker.stdout.readline())
        turns.append(times)
    for worker in workers:
        worker.communicate()
    ours, theirs = zip(*turns, strict=True)
    ratio = statistics.median(a / b for a, b in turns)
    return [part, f"{statistics.median(ours):.1f}", f"{statistics.median(theirs):.1f}", f"{ratio:.2f}"]


def main() -> None:
    """Read the options and do as they say."""
    pin_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="count on this device")
    parser.add_argument("--emulate", action="store_true", help="count CPU and emulated CUDA")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="time against another checkout")
    parser.add_argument("--answer", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answer(options.answer)
        return
    if options.against:
        headings = ["process time, µs", "this", "the other", "ratio"]
        print(table(headings, [compared(part, options.against) for part in PARTS]))
        return
    from cupy_syncbn import default_group

    devices = ["cpu", "cuda"] if options.emulate else [options.device]
    rows = [row for device in devices for row in counted(device, options.emulate)]
    if default_group().rank == 0:
        headings = ["", "first: calls", "before", "frames", "later: calls", "before", "frames", "µs"]
        print(f"{default_group().size} rank(s), {SHAPE}, float32, ReLU")
        print(table(headings, rows))


if __name__ == "__main__":
    main()
