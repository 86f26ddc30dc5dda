"""Whether to start the sums of gradients while the backward still computes, instead of behind it.

    computing    products of matrices, as of a backward, a piece for each bucket of gradients
    sums         Iallreduce of all buckets, one after the other
    behind       both, one after the other: as `reduce_gradients` after `backward`
    started      the sum of a bucket is started behind its piece, and all are waited for at the end
    tested       the same, and MPI is called after every product: most libraries send in their calls alone

Times are medians of the slowest rank, in milliseconds, of runs that take turns.

    OMP_NUM_THREADS=1 mpirun -n 2 python -m mpi4py scripts/benchmarks/overlap.py
    OMP_NUM_THREADS=1 mpirun -n 2 python -m mpi4py scripts/benchmarks/overlap.py --quick   # seconds
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, circumstances, save, table
from mpi4py import MPI

BUCKETS = 4
BUCKET_BYTES = 25 << 20
"""As DistributedDataParallel's."""
PRODUCTS = 12
"""For each bucket."""


class Step:
    """A backward and its sums."""

    def __init__(self, comm: MPI.Intracomm, size: int, width: int) -> None:
        self._comm = comm
        self._gradients = [np.ones(size, np.float32) for _ in range(BUCKETS)]
        self._totals = [np.empty(size, np.float32) for _ in range(BUCKETS)]
        self._matrix = np.full((width, width), 1 / width)

    def _compute(self, between: Callable[[], object] = lambda: None) -> None:
        for _ in range(PRODUCTS):
            self._matrix @ self._matrix
            between()

    def _start(self, bucket: int) -> MPI.Request:
        return self._comm.Iallreduce(self._gradients[bucket], self._totals[bucket])

    def computing(self) -> None:
        for _ in range(BUCKETS):
            self._compute()

    def sums(self) -> None:
        for bucket in range(BUCKETS):
            self._start(bucket).Wait()

    def behind(self) -> None:
        self.computing()
        self.sums()

    def started(self, between: Callable[[list[MPI.Request]], object] = lambda _: None) -> None:
        requests: list[MPI.Request] = []
        for bucket in range(BUCKETS):
            self._compute(lambda: between(requests))
            requests.append(self._start(bucket))
        MPI.Request.Waitall(requests)

    def tested(self) -> None:
        self.started(MPI.Request.Testall)


WAYS = ("computing", "sums", "behind", "started", "tested")


def measure(comm: MPI.Intracomm, step: Step, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each way."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(-1, repeats):  # the first is not counted
        for way, taken in seconds.items():
            comm.Barrier()
            start = time.perf_counter()
            getattr(step, way)()
            slowest = comm.allreduce(time.perf_counter() - start, MPI.MAX)
            if repeat >= 0:
                taken.append(slowest)
    return {way: 1e3 * float(np.median(taken)) for way, taken in seconds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small buckets")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the results go")
    options = parser.parse_args(arguments)
    comm = MPI.COMM_WORLD
    size, width, repeats = (1 << 14, 50, 3) if options.quick else (BUCKET_BYTES // 4, 500, 9)
    ms = measure(comm, Step(comm, size, width), repeats)
    if comm.rank > 0:
        return 0
    library = MPI.get_vendor()[0]
    print(f"\nMilliseconds on {comm.size} rank(s) of {library}, {BUCKETS} buckets of {4 * size} bytes\n")
    print(table(WAYS, [[f"{ms[way]:.1f}" for way in WAYS]]))
    record: dict[str, Any] = circumstances(arguments, 1, ["numpy", "mpi4py"])
    record |= {"ranks": comm.size, "library": library, "bucket_bytes": 4 * size, "ms": ms}
    slug = re.sub(r"[^a-z]+", "-", library.lower())
    save(options.output, f"overlap-{slug}" + "-quick" * options.quick, record, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
