"""Whether the ranks normalize a small batch right."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np

from cupy_syncbn.arrays import array_module, move
from cupy_syncbn.comm.groups import MPIProcessGroup, ProcessGroup
from cupy_syncbn.diagnosis.report import one_line
from cupy_syncbn.nn.batch_norm import SyncBatchNorm

CHANNELS, EPS = 5, 1e-5
TOLERANCE = 1e-5
"""For float32, relative to the largest magnitude: a wrong sum is off by far more."""


def self_test(group: ProcessGroup, device: str) -> dict[str, Any]:
    """Add up four numbers, normalize a batch, forward and backward, and compare (**collective**)."""
    deviation, error = 0.0, ""
    try:
        deviation = _deviation(group, device)
    except Exception as reason:
        error = f"rank {group.rank}: {one_line(reason)}"
    everyones = [(deviation, error)]
    with contextlib.suppress(Exception):  # after a timeout nothing more can be heard of the others
        everyones = gather(group, everyones[0])
    error = next((each for _, each in everyones if each), "")
    worst = float(np.max([each for each, _ in everyones]))
    return {
        "passed": not error and worst <= TOLERANCE,
        "device": device,
        "deviation": worst if math.isfinite(worst) and not error else None,
        "tolerance": TOLERANCE,
        "error": error or (None if math.isfinite(worst) else "the results are not finite"),
    }


def _deviation(group: ProcessGroup, device: str) -> float:
    """Return the largest error of this rank, relative to the largest magnitude of each array."""
    library = array_module(device)
    rank, ranks = group.rank, range(group.size)
    everyones = np.array([[1, each, each * each, 0.5] for each in ranks])
    numbers = library.array(everyones[rank])
    group.allreduce(numbers)
    layer = SyncBatchNorm(CHANNELS, EPS, process_group=group, device=device, name="self-test")
    x, dy = _batch(rank)
    y = layer(library.asarray(x))
    dx = layer.backward(library.asarray(dy))
    group.check_errors()

    # The whole batch, by the formulas of Ioffe and Szegedy (2015) in float64.
    batches = [_batch(each) for each in ranks]
    whole_x, whole_dy = (np.concatenate(each).astype(float) for each in zip(*batches, strict=True))
    before = sum(len(each) for each, _ in batches[:rank])
    local = slice(before, before + len(x))
    over: dict[str, Any] = {"axis": (0, 2), "keepdims": True}
    invstd = 1 / np.sqrt(whole_x.var(**over) + EPS)
    whole_y = (whole_x - whole_x.mean(**over)) * invstd
    whole_dx = whole_dy - whole_dy.mean(**over) - whole_y * (whole_dy * whole_y).mean(**over)
    whole_dx *= invstd
    sums = everyones.sum(axis=0)
    pairs = [(numbers, sums, sums), (y, whole_y[local], whole_y), (dx, whole_dx[local], whole_dx)]
    return max(
        float(np.max(np.abs(move(actual, np) - expected)) / np.max(np.abs(whole)))
        for actual, expected, whole in pairs
    )


def _batch(rank: int) -> tuple[Any, Any]:
    """Return x and dy of a rank; the ranks have one to three samples."""
    rng = np.random.default_rng(rank)
    shape = (1 + rank % 3, CHANNELS, 8)
    return rng.normal(rank % 7, 2, shape).astype("float32"), rng.normal(size=shape).astype("float32")


def gather(group: ProcessGroup, value: Any) -> list[Any]:
    """Return the small objects of all ranks (**collective**)."""
    return group.gather_objects(value) if isinstance(group, MPIProcessGroup) else [value]
