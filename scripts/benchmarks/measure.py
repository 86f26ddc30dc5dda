"""What the benchmarks share: pinned threads, interleaved runs, tables, and result files."""

from __future__ import annotations

import datetime
import gc
import importlib
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"

# Every BLAS and OpenMP runtime that NumPy or PyTorch may have been built with.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def pin_threads(threads: int) -> None:
    """Give BLAS and OpenMP this many threads; restart the interpreter if they were loaded with others.

    They read their environment once, when NumPy is imported, which has happened by now.
    """
    restart_with(dict.fromkeys(THREAD_VARIABLES, str(threads)))


def restart_with(variables: dict[str, str]) -> None:
    """Restart the interpreter if these variables have not these values; say how to start one that cannot."""
    if all(os.environ.get(name) == value for name, value in variables.items()):
        return
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized():
        words = " ".join(f"{name}={value}" for name, value in variables.items())
        sys.exit(f"a rank cannot restart, as its MPI has started: put env {words} before mpirun")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **variables})


def import_torch(threads: int) -> Any | None:
    """Import torch with this many threads, or say that the comparison goes without it and return None."""
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: its columns are left out (pip install torch)")
        return None
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    return torch


def interleaved(
    contenders: Mapping[str, Callable[[], Sequence[float]]],
    repeats: int,
    sample_s: float = 2e-3,
    agreed: Callable[[int], int] = int,
) -> dict[str, np.ndarray]:
    """Run the contenders in turn, so that what else the machine does meets all of them alike.

    Parameters
    ----------
    contenders
        Functions that run once and return the seconds of each of their parts.
    repeats
        How many samples to take of each.
    sample_s
        Shorter runs are repeated within a sample until it lasts about that long.
    agreed
        Makes one number of runs of those of several ranks.

    Returns
    -------
    dict
        For each contender the seconds of one run, shape (repeats, parts). Row i of all of them was taken
        one after the other, so ratios are to be formed row by row.
    """
    runs = {}
    for name, run in contenders.items():
        run()  # the first run pays for imports, caches and lazily allocated workspaces
        runs[name] = agreed(max(1, int(sample_s / max(sum(run()), 1e-9))))
    samples: dict[str, list[np.ndarray]] = {name: [] for name in contenders}
    names = list(contenders)
    gc.collect()
    gc.disable()
    try:
        for repeat in range(repeats):
            # Nobody is always the one who comes after the same neighbour, with its leftovers in the cache.
            for name in names if repeat % 2 else names[::-1]:
                parts = [contenders[name]() for _ in range(runs[name])]
                samples[name].append(np.mean(parts, axis=0))
    finally:
        gc.enable()
    return {name: np.array(rows) for name, rows in samples.items()}


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean, the one to take of ratios."""
    return float(np.exp(np.mean(np.log(values))))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in others)]) + " |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(headings), line(rule), *map(line, rows)])


def processor() -> str:
    """Return the processor's model and the number of cores this process may use; never the host's name."""
    model = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the architecture has to do
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if files of the package differ from it.

    CUPY_SYNCBN_COMMIT tells it where there is no repository; None is unknown.
    """
    if "CUPY_SYNCBN_COMMIT" in os.environ:
        return os.environ["CUPY_SYNCBN_COMMIT"]
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root), "-c", f"safe.directory={root}"]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "cupy_syncbn"], capture_output=True, text=True
        )
    except OSError:
        return None
    if head.returncode or changes.returncode:
        return None
    return head.stdout.strip() + ("-dirty" if changes.stdout else "")


def circumstances(argv: Sequence[str], threads: int, packages: Sequence[str]) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat a measurement.

    Parameters
    ----------
    argv
        The script's arguments; where the results went is left out of the record.
    threads
        Threads of each contender.
    packages
        Names of the packages whose versions matter; those that are not imported are left out.
    """
    kept = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--output":
            next(arguments, None)
        elif not argument.startswith("--output="):
            kept.append(argument)
    versions = {"python": platform.python_version()}
    for name in packages:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            versions[name] = str(version)
    return {
        "machine": processor(),
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "threads": threads,
        "command": shlex.join(["python", f"scripts/benchmarks/{Path(sys.argv[0]).name}", *kept]),
    }


def caption(facts: Mapping[str, Any]) -> str:
    """Return the circumstances of a measurement in one line, for a table or a plot."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{facts['machine']}, {facts['threads']} thread(s), {facts['date']}; {versions}"


def new_figure(**options: Any) -> tuple[Any, Any] | None:
    """Return matplotlib's (figure, axes) for a file, or say that there is no plot and return None."""
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plot (pip install matplotlib)")
        return None
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")  # a compute node has no display
    return importlib.import_module("matplotlib.pyplot").subplots(layout="constrained", **options)


def save(folder: Path, name: str, record: Mapping[str, Any], figure: Any | None) -> None:
    """Write ``<name>-<date>.json`` and, if there is a figure, ``<name>-<date>.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{name}-{record['date']}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten: {stem.name}.json", end="")
    if figure is not None:
        # The default metadata would name matplotlib's version only, but keep the file the same in any case.
        figure.savefig(stem.with_suffix(".png"), dpi=110, metadata={"Software": None})
        print(f", {stem.name}.png", end="")
    print()
