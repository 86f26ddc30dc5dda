"""Our CUDA kernels, and the layer that they make, beside PyTorch's, on one GPU.

The shapes are the distinct ones of ResNet-50's batch norms at batch 32 and 256, a segmentation map, two more
maps, one of them 3-D, and the output of a dense layer; in float32, float16 and bfloat16, channels-first and
channels-last; in three variants:

    plain       y = norm(x)
    relu        y = max(norm(x), 0)
    add+relu    y = max(norm(x) + residual, 0)

Measured are

* each kernel alone: its time beside that of the model in gpu_model.py, the bytes that it has to move, and its
  bandwidth as a share of that of copying a tensor of the same size on the device, in the same run; of a
  kernel that writes no tensor, as a share of that of reading one;
* forward and backward of the whole layer, against
    torch_sync   the kernels of torch.nn.SyncBatchNorm, called as torch/nn/modules/_functions.py does for one
                 rank, less its exchange and its host synchronisation;
    batch_norm   torch.nn.functional.batch_norm, by cuDNN or torch's own kernels as torch chooses, followed by
                 the in-place add_ and relu_ that torchvision uses;
* what one call costs the host, for a tensor too small to matter.

How:

* Every contender's result is compared with float64 arithmetic first; one that is wrong ends the benchmark.
* "graph" times are of CUDA graphs, so that no launch waits for the host; "eager" ones are of Python calls.
* All contenders read the same memory, on one stream. Inputs and outputs rotate over so many copies that x
  alone is more than four times the L2 cache. Before each measurement a kernel reads that much of something
  else: what is in the cache need not be written back any more, and the launch of what follows is hidden.
* Contenders run in turn, and times are medians; a ratio is the median of the ratios of neighbouring runs,
  the other's time to ours.

    python scripts/benchmarks/gpu.py                    # up to 8 minutes; see --budget-s
    python scripts/benchmarks/gpu.py --quick            # a subset, under 2 minutes
    python scripts/benchmarks/gpu.py --sweep            # tries launch constants and variants of the kernels
    python scripts/benchmarks/gpu.py --blocks 4         # measures with another constant of launch.py
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import math
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cpu import VARIANTS, resnet50
from gpu_model import modelled_us
from measure import (
    RESULTS,
    caption,
    circumstances,
    commit,
    geometric_mean,
    import_torch,
    interleaved,
    new_figure,
    save,
    table,
)

from cupy_syncbn import CapturedStep, SingleProcessGroup, SyncBatchNorm
from cupy_syncbn.arrays import array_module
from cupy_syncbn.backends.cuda import launch
from cupy_syncbn.backends.interface import Affine, BatchSums, Epilogue, ParameterSums, Reduced, Running
from cupy_syncbn.backends.layout import Layout
from cupy_syncbn.checks import data_type
from cupy_syncbn.comm.trailer import trailer_of

Shape = tuple[int, ...]

EPS = 1e-5
MOMENTUM = 0.1
DTYPES = ("float32", "float16", "bfloat16")
KERNELS = ("statistics", "normalize", "evaluate", "reduce_gradients", "input_gradient")
RIVALS = ("torch_sync", "batch_norm")

MAPS: list[Shape] = [
    *(shape for batch in (32, 256) for shape in dict.fromkeys(shape for shape, _ in resnet50(batch))),
    (2, 64, 512, 512),
    (8, 256, 64, 64),
    (2, 32, 64, 128, 128),
]
DENSE: Shape = (8192, 1024)
QUICK: list[Shape] = [(32, 64, 112, 112), (32, 256, 14, 14), (32, 2048, 7, 7), (256, 256, 56, 56), DENSE]
QUICK_DTYPES = ("float32", "float16")
SWEEP: list[Shape] = [
    (32, 64, 112, 112),
    (256, 256, 56, 56),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (2, 64, 512, 512),
    DENSE,
]
TINY: Shape = (2, 64, 4, 4)

PATTERN = (1 << 22) - 3
"""Random numbers that are repeated to fill a tensor: of a length that meets other channels each time."""
VECTOR_BYTES = 16
LARGE = 64 << 20
"""Bytes from which on a kernel should reach GOAL_SHARE of the bandwidth of copying, or of reading alone."""
GOAL_SHARE = 0.9
GOAL_TORCH_SYNC = {"channels_first": 2.0, "channels_last": 1.3}

CACHE_FACTOR = 4
COPY_UNITS = 16
"""Tensors that the contenders hold at once for each copy of the inputs, rounded up."""
LAUNCHES = 256
"""At most so many in a graph of one kernel, and at least one for every copy."""
EAGER_CALLS = 32
"""At most so many in a measurement: of small tensors, whose time is the host's."""
HOST_CALLS = 200
"""Between two synchronisations: their launches fit into the stream's queue."""

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
"""Relative to a result's norm. Statistics and gradients of parameters are float32 in any case."""
STATISTICS_TOLERANCE = 1e-4

CONSTANTS = {"blocks": "BLOCKS", "min_items": "MIN_ITEMS", "max_items": "MAX_ITEMS", "row_bytes": "ROW_BYTES"}
"""Options that replace constants of cupy_syncbn/backends/cuda/launch.py."""
GRID = {
    "BLOCKS": (2, 3, 4),
    "MIN_ITEMS": (2, 4, 8),
    "MAX_ITEMS": (16, 32, 64, 128),
    "ROW_BYTES": (128, 256, 512),
}
COMPILED = {
    "streaming stores": ("-DSTREAMING_STORES",),
    "8 loads": ("-DLOADS=8",),
    "8 loads, streaming stores": ("-DLOADS=8", "-DSTREAMING_STORES"),
}
"""Options that make variants of the kernels: see common.cuh. More loads are for 16-bit data, whose kernels
have the registers."""
MAX_GROUP = 256
"""Channels a group may have: of common.cuh."""


class WrongResultError(Exception):
    """A contender computes something else than batch normalization."""


class Case(NamedTuple):
    """A tensor: one row of the tables for each variant."""

    shape: Shape
    dtype: str
    channels_last: bool

    @property
    def name(self) -> str:
        """Shape, type and layout."""
        layout = {"channels_first": [], "channels_last": ["NHWC"], "dense": []}[self.layout]
        return " ".join(["x".join(map(str, self.shape)), self.dtype, *layout])

    @property
    def layout(self) -> str:
        """Which of three."""
        if len(self.shape) == 2:
            return "dense"
        return "channels_last" if self.channels_last else "channels_first"

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[1]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one tensor."""
        return self.size * (4 if self.dtype == "float32" else 2)


def cases(shapes: Sequence[Shape], dtypes: Sequence[str]) -> list[Case]:
    """Return all cases, those of the quick run first: a budget that runs out leaves the rest."""
    layouts = [(dtype, channels_last) for dtype in dtypes for channels_last in (False, True)]
    # A dense layer's output has no spatial axes to put last.
    found = [Case(s, dtype, last) for dtype, last in layouts for s in shapes if len(s) > 2 or not last]
    return sorted(found, key=lambda case: case.shape not in QUICK)


class Traffic(NamedTuple):
    """Bytes that a kernel has to read and to write, but for those that go by channel."""

    reads: int
    writes: int


def traffic(kernel: str, variant: str, nbytes: int) -> Traffic:
    """Return the traffic of a kernel on tensors of `nbytes`.

    A residual is one tensor more to read, and its gradient one to write; with an activation behind it there
    is a mask, of a byte for every vector of 16 bytes. Of a ReLU, the last kernel
    takes dresidual in its place.
    """
    residual = nbytes if variant == "add+relu" else 0
    mask = nbytes // VECTOR_BYTES if variant == "add+relu" else 0
    normalize = Traffic(nbytes + residual, nbytes + mask)
    return {
        "statistics": Traffic(nbytes, 0),
        "normalize": normalize,
        "evaluate": normalize,
        "reduce_gradients": Traffic(2 * nbytes + mask, residual),
        "input_gradient": Traffic(2 * nbytes, nbytes),
    }[kernel]


def kernels_of(variant: str) -> list[str]:
    """Return the kernels to measure in a variant: the statistics are the same in all."""
    return [kernel for kernel in KERNELS if variant == "plain" or kernel != "statistics"]


def copies_of(case: Case, l2_bytes: int, free_bytes: int) -> int:
    """Return how many copies of the inputs to rotate over; 0 if memory does not suffice for one."""
    wanted = CACHE_FACTOR * l2_bytes // case.nbytes + 1
    return min(wanted, int(0.8 * free_bytes) // (COPY_UNITS * case.nbytes))


# ---- The device ----
_LEAD = """
extern "C" __global__ void lead(const float4* data, long long n, float* never)
{
    float sum = 0;
    for (long long i = blockIdx.x * 256LL + threadIdx.x; i < n; i += gridDim.x * 256LL) {
        const float4 v = data[i];
        sum += v.x + v.y + v.z + v.w;
    }
    if (sum == 1.5f) *never = sum;  // the data are zeros: only the compiler does not know
}
"""


class Replay(NamedTuple):
    """A CUDA graph, and what must live as long as it."""

    launch: Callable[[], None]
    kept: Any

    def __call__(self) -> None:
        """Launch it on the current stream."""
        self.launch()


class Gpu:
    """The device: its facts, its memory, and how long it takes. Tests put another in its place."""

    def __init__(self, torch: Any | None) -> None:
        self.cupy = cupy = array_module("cuda")
        self.torch = torch
        self.device = cupy.cuda.Device()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.l2_bytes: int = self.device.attributes["L2CacheSize"]
        self._zeros = cupy.zeros(CACHE_FACTOR * self.l2_bytes // 4, "float32")
        self._never = cupy.zeros(1, "float32")
        self._lead = cupy.RawModule(code=_LEAD).get_function("lead")
        self._contexts = contextlib.ExitStack()
        cupy.cuda.Device().synchronize()

    def __enter__(self) -> Gpu:
        self._contexts.enter_context(self.stream)
        if self.torch is not None:
            same = self.torch.cuda.ExternalStream(self.stream.ptr)
            self._contexts.enter_context(self.torch.cuda.stream(same))
        return self

    def __exit__(self, *error: object) -> None:
        self._contexts.close()

    def facts(self) -> dict[str, Any]:
        """Return what a reader needs to know of the device."""
        runtime = self.cupy.cuda.runtime
        properties = runtime.getDeviceProperties(self.device.id)
        return {
            "name": properties["name"].decode(),
            "compute_capability": self.device.compute_capability,
            "multiprocessors": properties["multiProcessorCount"],
            "l2_mib": self.l2_bytes / 2**20,
            "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
            "driver": driver_version(),
            "cuda_driver": runtime.driverGetVersion(),
            "cuda_runtime": runtime.runtimeGetVersion(),
        }

    def free_bytes(self) -> int:
        """Give unused memory back, and return how much is free."""
        gc.collect()
        self.cupy.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()
        free: int = self.cupy.cuda.runtime.memGetInfo()[0]
        return free

    def synchronize(self) -> None:
        """Wait for all work."""
        self.stream.synchronize()

    def to_torch(self, array: Any) -> Any:
        """Return a CuPy array as a tensor on the same memory."""
        if array.dtype.name != "bfloat16":
            return self.torch.from_dlpack(array)
        # Not every CuPy hands out bfloat16 by DLPack.
        return self.torch.from_dlpack(array.view("int16")).view(self.torch.bfloat16)

    def from_torch(self, tensor: Any) -> Any:
        """Return a tensor as a CuPy array on the same memory."""
        tensor = tensor.detach()
        if tensor.dtype != self.torch.bfloat16:
            return self.cupy.from_dlpack(tensor)
        return self.cupy.from_dlpack(tensor.view(self.torch.int16)).view(data_type("bfloat16"))

    def read(self, array: Any) -> None:
        """Read an array: the measure of kernels that write nothing."""
        self._lead((1024,), (256,), (array, array.nbytes // VECTOR_BYTES, self._never))

    def capture(self, work: Callable[[], Any], by_torch: bool) -> Callable[[], Any]:
        """Record what `work` launches as a CUDA graph; what it returns lives as long as the graph."""
        self.synchronize()
        if by_torch:
            graph = self.torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="relaxed")
            try:
                kept = work()
            finally:
                graph.capture_end()
            return Replay(graph.replay, kept)
        return CapturedStep(work)

    def timed(self, work: Callable[[], Any]) -> Callable[[], tuple[float]]:
        """Return a function that does the work, and gives the seconds that it took the device."""
        begin, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        zeros, count = self._zeros, self._zeros.size // 4

        def run() -> tuple[float]:
            self._lead((1024,), (256,), (zeros, count, self._never))
            begin.record(self.stream)
            work()
            end.record(self.stream)
            end.synchronize()
            return (self.cupy.cuda.get_elapsed_time(begin, end) / 1e3,)

        return run


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, if nvidia-smi tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return output.split()[0] if output.split() else None


def import_gpu_torch() -> Any | None:
    """Import torch, or say that the comparison goes without it and return None."""
    torch = import_torch(1)
    if torch is not None and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: its columns are left out")
        return None
    return torch


# ---- What is computed on ----
@functools.cache
def _normal(dtype: str, count: int) -> np.ndarray:
    """Return normal numbers, as unsigned integers of their bits: not every CuPy copies bfloat16."""
    values = np.random.default_rng(0).standard_normal(count, dtype=np.float32).astype(data_type(dtype))
    return values.view(f"u{values.itemsize}")


class Tensors:
    """The inputs of a case, in as many copies as are rotated over."""

    def __init__(self, gpu: Gpu, case: Case, copies: int) -> None:
        self.gpu, self.case, self.copies = gpu, case, copies
        self.dtype = data_type(case.dtype)
        self._base = gpu.cupy.asarray(_normal(case.dtype, PATTERN))
        rng = np.random.default_rng(1)
        self.x, self.dy, self.residual = (
            [self._random(int(rng.integers(1 << 20))) for _ in range(copies)] for _ in range(3)
        )
        del self._base
        weight = rng.uniform(0.5, 1.5, case.channels) * rng.choice([-1, 1], case.channels)
        self.weight = gpu.cupy.asarray(weight.astype("float32"))
        self.bias = gpu.cupy.asarray(rng.normal(size=case.channels).astype("float32"))

    def _random(self, start: int) -> Any:
        base, flat = self._base, self.gpu.cupy.empty(self.case.size, self._base.dtype)
        at, start = 0, start % base.size
        while at < flat.size:
            step = min(base.size - start, flat.size - at)
            flat[at : at + step] = base[start : start + step]
            at, start = at + step, 0
        return self._in_layout(flat.view(self.dtype))

    def empty(self) -> Any:
        """Return a tensor of the case, not written yet."""
        return self._in_layout(self.gpu.cupy.empty(self.case.size, self.dtype))

    def _in_layout(self, flat: Any) -> Any:
        N, C, *spatial = self.case.shape
        if not self.case.channels_last:
            return flat.reshape(self.case.shape)
        # The same shape, over memory in which the channels are next to each other.
        last = len(spatial) + 1
        return flat.reshape((N, *spatial, C)).transpose(0, last, *range(1, last))

    def residual_of(self, variant: str, i: int) -> Any | None:
        """Return the residual, if the variant has one."""
        return self.residual[i] if variant == "add+relu" else None


TRAILER = trailer_of(0)
"""The trailer of one rank's vectors."""


class Kernels:
    """Our kernels, each by itself."""

    def __init__(self, tensors: Tensors, variant: str) -> None:
        from cupy_syncbn.backends.cuda import operations as cuda_operations

        cupy, copies = tensors.gpu.cupy, range(tensors.copies)
        layout = Layout.of(tensors.x[0], False)
        self.backend, self.tensors, self.variant = cuda_operations, tensors, variant
        slope = None if variant == "plain" else 0.0
        self.weight, self.bias = tensors.weight, tensors.bias
        mean, var = cupy.zeros_like(self.bias), cupy.ones_like(self.bias)
        self.running = Running(mean, var, cupy.zeros((), "int64"), MOMENTUM)
        self.affine = Affine(self.weight, self.bias, EPS)
        self.x, self.dy = ([layout.as_3d(array) for array in made] for made in (tensors.x, tensors.dy))
        added = [tensors.residual_of(variant, i) for i in copies]
        self.epilogue = [Epilogue(None if array is None else layout.as_3d(array), slope) for array in added]
        self.y, self.dx = ([layout.as_3d(tensors.empty()) for _ in copies] for _ in range(2))
        self.dresidual = [None if array is None else layout.as_3d(tensors.empty()) for array in added]
        # What a kernel needs of the ones before it.
        self.vector = [self.statistics(i) for i in copies]
        self.normalization = [self.normalize(i) for i in copies]
        self.sums = [self.reduce_gradients(i) for i in copies]
        for i in copies:
            self.input_gradient(i)

    def statistics(self, i: int) -> Any:
        """Reduce x."""
        return self.backend.statistics(self.x[i], TRAILER)[0]

    def normalize(self, i: int) -> Any:
        """Write y by the batch's statistics."""
        batch = BatchSums(self.vector[i])
        return self.backend.normalize(
            self.x[i], self.y[i], batch, self.running, self.affine, self.epilogue[i]
        )[0]

    def evaluate(self, i: int) -> Any:
        """Write y by the running statistics."""
        return self.backend.normalize(
            self.x[i], self.y[i], None, self.running, self.affine, self.epilogue[i]
        )[0]

    def reduce_gradients(self, i: int) -> Reduced:
        """Reduce dy and x."""
        return self.backend.reduce_gradients(
            self.dy[i], self.x[i], self.normalization[i], self.dresidual[i], TRAILER
        )

    def input_gradient(self, i: int) -> Any:
        """Write dx."""
        global_sums, local_sums, gradient = self.sums[i]
        parameters = ParameterSums(local_sums, 1.0, self.weight.dtype, self.bias.dtype)
        return self.backend.input_gradient(
            gradient, self.x[i], self.normalization[i], self.dx[i], global_sums, parameters, 0
        )

    def copy(self, i: int) -> None:
        """Copy a tensor: the measure of the kernels that write one."""
        self.tensors.gpu.cupy.copyto(self.y[i], self.x[i])

    def read(self, i: int) -> None:
        """Read a tensor: the measure of the others."""
        self.tensors.gpu.read(self.x[i])

    def graph(self, name: str) -> tuple[Callable[[], Any], int]:
        """Return a graph of one of these, over all copies, and how many launches it has."""
        run, copies = getattr(self, name), self.tensors.copies
        # Of small tensors, several rounds: launching the graph is not what is measured.
        rounds = max(1, min(LAUNCHES // copies, -(-(1 << 30) // (copies * self.tensors.case.nbytes))))

        def work() -> None:
            for _ in range(rounds):
                for i in range(copies):
                    run(i)

        return self.tensors.gpu.capture(work, by_torch=False), rounds * copies


class Ours:
    """Our layer."""

    by_torch = False

    def __init__(self, tensors: Tensors, variant: str) -> None:
        self.tensors, self.variant = tensors, variant
        self.bn = SyncBatchNorm(
            tensors.case.channels,
            eps=EPS,
            momentum=MOMENTUM,
            device="cuda",
            activation=None if variant == "plain" else "relu",
            process_group=SingleProcessGroup(),
        )
        self.weight: Any = self.bn.weight
        self.bias: Any = self.bn.bias
        self.weight.data, self.bias.data = tensors.weight, tensors.bias
        self.saved: list[Any] = []

    def forward(self, i: int) -> Any:
        """Return y of a copy."""
        return self.bn(self.tensors.x[i], self.tensors.residual_of(self.variant, i))

    def prepare(self) -> None:
        """Keep what the backwards need."""
        self.saved = []
        for i in range(self.tensors.copies):
            self.bn.forget()
            self.forward(i)
            self.saved.append(self.bn._waiting)

    def backward(self, i: int) -> Any:
        """Return the gradients of a copy; it can be called again."""
        self.bn._waiting = self.saved[i]
        self.weight.grad = self.bias.grad = None  # made afresh, not added up
        return self.bn.backward(self.tensors.dy[i])

    def step(self) -> None:
        """Forward and backward."""
        self.bn.forget()
        self.forward(0)
        self.weight.grad = self.bias.grad = None
        self.bn.backward(self.tensors.dy[0])

    def results(self) -> dict[str, Any]:
        """Return all results of a first forward and backward, as CuPy arrays."""
        tensors = self.tensors
        # Memory that the results are likely to get, full of NaN: what is not written shows.
        held = [tensors.gpu.cupy.full(tensors.case.nbytes, 255, "uint8") for _ in range(4)]
        del held
        self.bn.forget()
        y = self.forward(0)
        self.saved = [self.bn._waiting]
        dx = self.backward(0)
        found = dict(zip(("dx", "dresidual"), dx if isinstance(dx, tuple) else (dx,), strict=False))
        found |= {"dweight": self.weight.grad, "dbias": self.bias.grad}
        found |= {"y": y, "running_mean": self.bn.running_mean, "running_var": self.bn.running_var}
        self.bn.eval()
        found["evaluated"] = self.forward(0)
        self.bn.train()
        return found


class _Torch:
    """What torch's contenders share."""

    by_torch = True

    def __init__(self, tensors: Tensors, variant: str) -> None:
        gpu = tensors.gpu
        self.torch, self.gpu, self.variant = gpu.torch, gpu, variant
        self.copies = tensors.copies
        self.x, self.dy = ([gpu.to_torch(array) for array in made] for made in (tensors.x, tensors.dy))
        self.residual = [gpu.to_torch(array) for array in tensors.residual] if variant == "add+relu" else []
        self.weight, self.bias = gpu.to_torch(tensors.weight), gpu.to_torch(tensors.bias)
        self.running_mean = self.torch.zeros_like(self.weight)
        self.running_var = self.torch.ones_like(self.weight)

    def _results(self, **tensors: Any) -> dict[str, Any]:
        tensors |= {"running_mean": self.running_mean, "running_var": self.running_var}
        return {name: self.gpu.from_torch(tensor) for name, tensor in tensors.items()}


class TorchSync(_Torch):
    """The kernels of torch.nn.SyncBatchNorm, in the order of its autograd function, for one rank.

    Left out, in its favour: the exchanges, and the removal of ranks without data, which waits for the device.
    """

    def __init__(self, tensors: Tensors, variant: str) -> None:
        super().__init__(tensors, variant)
        self.saved: list[Any] = []

    def _forward(self, i: int) -> tuple[Any, Any]:
        torch, x, channels = self.torch, self.x[i], self.x[i].shape[1]
        mean, invstd = torch.batch_norm_stats(x, EPS)
        count = torch.full((1,), x.numel() // x.size(1), dtype=mean.dtype, device=mean.device)
        combined = torch.cat([mean, invstd, count], dim=0).reshape(1, -1)
        means, invstds, counts = torch.split(combined, channels, dim=1)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, self.running_mean, self.running_var, MOMENTUM, EPS, counts.view(-1)
        )
        saved = mean, invstd, counts.to(torch.int32)
        return torch.batch_norm_elemt(x, self.weight, self.bias, mean, invstd, EPS), saved

    def forward(self, i: int) -> Any:
        """Return y of a copy."""
        return self._forward(i)[0]

    def prepare(self) -> None:
        """Keep what the backwards need."""
        self.saved = [self._forward(i)[1] for i in range(self.copies)]

    def backward(self, i: int) -> Any:
        """Return the gradients of a copy; it can be called again."""
        torch, x, dy = self.torch, self.x[i], self.dy[i]
        mean, invstd, counts = self.saved[i]
        sum_dy, sum_dy_xmu, dweight, dbias = torch.batch_norm_backward_reduce(
            dy, x, mean, invstd, self.weight, True, True, True
        )
        combined = torch.cat([sum_dy, sum_dy_xmu], dim=0)
        sum_dy, sum_dy_xmu = torch.split(combined, x.shape[1])
        dx = torch.batch_norm_backward_elemt(dy, x, mean, invstd, self.weight, sum_dy, sum_dy_xmu, counts)
        return dx, dweight, dbias

    def step(self) -> None:
        """Forward and backward."""
        _, saved = self._forward(0)
        self.saved = [saved]
        self.backward(0)

    def results(self) -> dict[str, Any]:
        """Return all results of a first forward and backward, as CuPy arrays."""
        y, saved = self._forward(0)
        self.saved = [saved]
        dx, dweight, dbias = self.backward(0)
        return self._results(y=y, dx=dx, dweight=dweight, dbias=dbias)


class BatchNorm(_Torch):
    """torch.nn.functional.batch_norm, and add_ and relu_ behind it, with torch.autograd."""

    def __init__(self, tensors: Tensors, variant: str) -> None:
        super().__init__(tensors, variant)
        self.x = [x.requires_grad_() for x in self.x]
        self.residual = [residual.requires_grad_() for residual in self.residual]
        self.weight, self.bias = self.weight.requires_grad_(), self.bias.requires_grad_()
        self.outputs: list[Any] = []

    def forward(self, i: int) -> Any:
        """Return y of a copy."""
        y = self.torch.nn.functional.batch_norm(
            self.x[i], self.running_mean, self.running_var, self.weight, self.bias, True, MOMENTUM, EPS
        )
        if self.residual:
            y.add_(self.residual[i])
        if self.variant != "plain":
            y.relu_()
        return y

    def prepare(self) -> None:
        """Keep what the backwards need."""
        self.outputs = [self.forward(i) for i in range(self.copies)]

    def backward(self, i: int) -> Any:
        """Return the gradients of a copy; it can be called again."""
        inputs = [self.x[i], self.weight, self.bias, *self.residual[i : i + 1]]
        return self.torch.autograd.grad(self.outputs[i], inputs, self.dy[i], retain_graph=True)

    def step(self) -> None:
        """Forward and backward."""
        inputs = [self.x[0], self.weight, self.bias, *self.residual[:1]]
        self.torch.autograd.grad(self.forward(0), inputs, self.dy[0])

    def results(self) -> dict[str, Any]:
        """Return all results of a first forward and backward, as CuPy arrays."""
        self.outputs = [self.forward(0)]
        names = ("dx", "dweight", "dbias", "dresidual")
        return self._results(y=self.outputs[0], **dict(zip(names, self.backward(0), strict=False)))

    def chosen(self) -> str:
        """Return whose kernels torch chooses, if it tells."""
        select = getattr(self.torch._C, "_select_batch_norm_backend", None)
        if select is None:
            return "unknown"
        buffers = self.running_mean, self.running_var
        return str(select(self.x[0], self.weight, self.bias, *buffers, True, EPS)).rpartition(".")[2]


def contenders_of(tensors: Tensors, variant: str) -> dict[str, Any]:
    """Return who computes a variant, by name; SyncBatchNorm's kernels have nothing to fuse."""
    found: dict[str, Any] = {"ours": Ours(tensors, variant)}
    if tensors.gpu.torch is not None:
        if variant == "plain":
            found["torch_sync"] = TorchSync(tensors, variant)
        found["batch_norm"] = BatchNorm(tensors, variant)
    return found


# ---- Right results ----
def _wide(array: Any) -> Any:
    """Return an array in float64."""
    if array.dtype.name != "bfloat16":
        return array.astype("float64")
    return (array.view("int16").astype("int32") << 16).view("float32").astype("float64")


def _by_channel(array: Any) -> Any:
    """Return the sums over all axes but the channels'; one by one, as CuPy has a thread block a result."""
    for axis in (*range(array.ndim - 1, 1, -1), 0):
        array = array.sum(axis=axis, keepdims=True)
    return array


def _reference(x: Any, dy: Any, residual: Any | None, weight: Any, bias: Any, y: Any) -> dict[str, Any]:
    """Return the results that are right, in float64; which gradients pass the activation, `y` tells.

    Everything is of shape (N, C, ...), weight and bias are broadcast to that.
    """
    n = x.size // x.shape[1]
    mean = _by_channel(x) / n
    centred = x - mean
    var = _by_channel(centred * centred) / n
    invstd = (var + EPS) ** -0.5
    normalized = centred * invstd
    found = {"running_mean": MOMENTUM * mean, "running_var": 1 - MOMENTUM + MOMENTUM * var * (n / (n - 1))}
    evaluated = (x - found["running_mean"]) * (found["running_var"] + EPS) ** -0.5
    for name, values in (("y", normalized * weight + bias), ("evaluated", evaluated * weight + bias)):
        added = values if residual is None else values + residual
        found[name] = added if y is None else added * (added > 0)
    g = dy if y is None else dy * (y > 0)
    dweight, dbias = _by_channel(g * normalized), _by_channel(g)
    found["dx"] = (g - dbias / n - normalized * (dweight / n)) * invstd * weight
    return found | {"dresidual": g, "dweight": dweight, "dbias": dbias}


def check(tensors: Tensors, variant: str, name: str, results: Mapping[str, Any]) -> dict[str, float]:
    """Compare a contender's results for the first copy with float64 arithmetic.

    Returns the relative errors of the norms.

    Raises
    ------
    WrongResultError
        If one is beyond the tolerance, or NaN.
    """
    case = tensors.case
    squares = {result: [0.0, 0.0] for result in results}
    # Channels are independent: some at a time bound the memory.
    step = max(1, (1 << 24) * case.channels // case.size)
    for first in range(0, case.channels, step):
        part = slice(first, first + step)
        by_channel = (1, -1, *[1] * (len(case.shape) - 2))
        residual = tensors.residual_of(variant, 0)
        expected = _reference(
            _wide(tensors.x[0][:, part]),
            _wide(tensors.dy[0][:, part]),
            None if residual is None else _wide(residual[:, part]),
            tensors.weight[part].astype("float64").reshape(by_channel),
            tensors.bias[part].astype("float64").reshape(by_channel),
            None if variant == "plain" else _wide(results["y"][:, part]),
        )
        for result, array in results.items():
            actual = _wide(array[:, part]) if array.ndim > 1 else _wide(array[part]).reshape(by_channel)
            for place, difference in enumerate((actual - expected[result], expected[result])):
                squares[result][place] += float(_by_channel(difference * difference).sum())
    errors = {result: math.sqrt(wrong / right) for result, (wrong, right) in squares.items()}
    for result, error in errors.items():
        tensor = results[result].ndim > 1
        tolerance = TOLERANCE[case.dtype] if tensor else STATISTICS_TOLERANCE
        if not error <= tolerance:
            raise WrongResultError(
                f"{case.name}, {variant}: {result} of {name} is off by {error:.1e} of its norm (tolerance "
                f"{tolerance:.1e}): nothing is measured"
            )
    return errors


# ---- Measurements ----
class Effort(NamedTuple):
    """How often contenders run."""

    samples: tuple[int, int]
    """At least, and at most."""
    seconds: float
    """For all contenders together; within the bounds of `samples`."""


FULL, BRIEF, MANY = Effort((5, 15), 0.12), Effort((3, 7), 0.06), Effort((5, 9), 0.5)


def in_turn(contenders: Mapping[str, Callable[[], Sequence[float]]], effort: Effort) -> dict[str, np.ndarray]:
    """Return the seconds of the contenders, which run in turn: rows of all of them are neighbours."""
    start = time.perf_counter()
    for run in contenders.values():
        run()
    least, most = effort.samples
    repeats = int(effort.seconds / max(time.perf_counter() - start, 1e-9))
    seconds = interleaved(contenders, min(max(repeats, least), most), sample_s=0)
    return {name: rows[:, 0] for name, rows in seconds.items()}


def median(values: np.ndarray) -> float:
    """Return the median."""
    return float(np.median(values))


def measure_kernels(kernels: Kernels, effort: Effort) -> dict[str, Any]:
    """Measure each kernel alone, beside the copy."""
    gpu, case = kernels.tensors.gpu, kernels.tensors.case
    nbytes, device = case.nbytes, gpu.facts()["name"]
    graphs = {name: kernels.graph(name) for name in ("copy", "read", *kernels_of(kernels.variant))}
    seconds = in_turn({name: gpu.timed(graph) for name, (graph, _) in graphs.items()}, effort)
    seconds = {name: rows / graphs[name][1] for name, rows in seconds.items()}
    copy_rate, read_rate = 2 * nbytes / seconds.pop("copy"), nbytes / seconds.pop("read")
    found: dict[str, Any] = {"copy_gb_per_s": median(copy_rate) / 1e9, "kernels": {}}
    found["read_gb_per_s"] = median(read_rate) / 1e9
    for name, rows in seconds.items():
        reads, writes = traffic(name, kernels.variant, nbytes)
        rate = (reads + writes) / rows
        found["kernels"][name] = {
            "us": median(rows) * 1e6,
            "bytes": reads + writes,
            "gb_per_s": median(rate) / 1e9,
            "share": median(rate / (copy_rate if writes else read_rate)),
            "modelled_us": modelled_us(
                name, case.shape, case.dtype, case.channels_last, kernels.variant, device
            ),
        }
    return found


def measure_layers(tensors: Tensors, contenders: Mapping[str, Any], effort: Effort) -> dict[str, Any]:
    """Measure forward and backward of the contenders, as graphs and eager."""
    gpu, copies = tensors.gpu, tensors.copies
    calls = {"graph": copies, "eager": min(copies, EAGER_CALLS)}
    works: dict[str, dict[str, Callable[[], Any]]] = {"graph": {}, "eager": {}}
    notes: list[str] = []

    def over(call: Callable[[int], Any], count: int) -> Callable[[], None]:
        def work() -> None:
            for i in range(count):
                call(i)

        return work

    for name, contender in contenders.items():
        contender.prepare()
        for direction in ("forward", "backward"):
            call = getattr(contender, direction)
            works["eager"][f"{name} {direction}"] = over(call, calls["eager"])
            over(call, calls["eager"])()  # before it is recorded: libraries set themselves up
            try:
                # The results of all copies are kept, so that writing them is no matter of the cache.
                graph = gpu.capture(lambda call=call: list(map(call, range(copies))), contender.by_torch)
            except Exception as error:
                if name == "ours":
                    raise
                notes.append(f"{name} {direction} is not in a graph: {type(error).__name__}: {error}".strip())
            else:
                works["graph"][f"{name} {direction}"] = graph
    found: dict[str, Any] = {"layers": {name: {} for name in contenders}, "ratios": {}, "notes": notes}
    for mode, by_name in works.items():
        seconds = in_turn({name: gpu.timed(work) for name, work in by_name.items()}, effort)
        seconds = {name: rows / calls[mode] for name, rows in seconds.items()}
        totals = {}
        for name in contenders:
            parts = {d: seconds[f"{name} {d}"] for d in ("forward", "backward") if f"{name} {d}" in seconds}
            found["layers"][name][mode] = {f"{part}_us": median(rows) * 1e6 for part, rows in parts.items()}
            if len(parts) == 2:
                totals[name] = parts["forward"] + parts["backward"]
        for name in RIVALS:
            if name in totals:
                ratios = totals[name] / totals["ours"]
                found["ratios"].setdefault(name, {})[mode] = median(ratios)
                quartiles = [float(quartile) for quartile in np.percentile(ratios, (25, 75))]
                found["ratios"][name][f"{mode}_quartiles"] = quartiles
    return found


def measure_case(
    gpu: Gpu, case: Case, effort: Effort, wanted: Callable[[], bool], results: list[dict[str, Any]]
) -> None:
    """Measure a case in its variants, as long as more are `wanted`, and add to the results."""
    copies = copies_of(case, gpu.l2_bytes, gpu.free_bytes())
    if copies < 1:
        print(f"{case.name}: left out: it takes {COPY_UNITS * case.nbytes / 0.8 / 2**30:.1f} GiB")
        return
    tensors = Tensors(gpu, case, copies)
    for variant in VARIANTS:
        if not wanted():
            break
        contenders = contenders_of(tensors, variant)
        record: dict[str, Any] = {
            "name": case.name,
            "shape": list(case.shape),
            "dtype": case.dtype,
            "layout": case.layout,
            "variant": variant,
            "nbytes": case.nbytes,
            "copies": copies,
            "error": {
                n: max(check(tensors, variant, n, c.results()).values()) for n, c in contenders.items()
            },
        }
        if "batch_norm" in contenders:
            record["batch_norm_backend"] = contenders["batch_norm"].chosen()
        record |= measure_kernels(Kernels(tensors, variant), effort)
        record |= measure_layers(tensors, contenders, effort)
        if copies * case.nbytes <= CACHE_FACTOR * gpu.l2_bytes:
            record["notes"].append(f"{case.name}: {copies} copies are what memory has room for: L2 flatters")
        results.append(record)
        print(progress(record), flush=True)
        del contenders  # before the next ones are made


def progress(record: Mapping[str, Any]) -> str:
    """Return a result in one line, for whoever waits, and for the log of a run that does not end."""
    us = sum(record["layers"]["ours"]["graph"].values())
    ratios = (f"{name} {modes['graph']:.2f}" for name, modes in record["ratios"].items() if "graph" in modes)
    return ", ".join([f"{record['name']}, {record['variant']}: {us:.1f} us", *ratios])


def measure_host(gpu: Gpu) -> dict[str, dict[str, float]]:
    """Return the microseconds that calls cost the host, by contender and call."""
    tensors = Tensors(gpu, Case(TINY, "float32", False), 1)
    runs: dict[str, Callable[[], tuple[float]]] = {}
    for name, contender in contenders_of(tensors, "plain").items():
        contender.prepare()
        calls = {
            "forward": lambda c=contender: c.forward(0),
            "backward": lambda c=contender: c.backward(0),
            "step": contender.step,
        }
        for call, work in calls.items():

            def run(work: Callable[[], Any] = work) -> tuple[float]:
                start = time.perf_counter()
                for _ in range(HOST_CALLS):
                    work()
                seconds = time.perf_counter() - start
                gpu.synchronize()
                return (seconds / HOST_CALLS,)

            runs[f"{name} {call}"] = run
    seconds = interleaved(runs, 7, sample_s=0)
    found: dict[str, dict[str, float]] = {}
    for name, rows in seconds.items():
        contender, call = name.split()
        found.setdefault(contender, {})[call] = median(rows) * 1e6
    return found


# ---- Launch constants ----
@contextlib.contextmanager
def launch_constants(constants: Mapping[str, int]) -> Iterator[None]:
    """Replace constants of launch.py."""
    from cupy_syncbn.backends.cuda import operations

    before = {name: getattr(launch, name) for name in constants}
    try:
        for name, value in constants.items():
            setattr(launch, name, value)
        operations.forget_launches()
        yield
    finally:
        for name, value in before.items():
            setattr(launch, name, value)
        operations.forget_launches()


@contextlib.contextmanager
def compiled_with(options: Sequence[str]) -> Iterator[None]:
    """Let kernels be compiled with more options."""
    from cupy_syncbn.backends.cuda import kernels, operations

    before = kernels.OPTIONS
    try:
        kernels.OPTIONS = (*before, *options)
        operations.forget_kernels()
        yield
    finally:
        kernels.OPTIONS = before
        operations.forget_kernels()


def launch_of(gpu: Gpu, case: Case) -> launch.Launch:
    """Return the launch of a case by the constants as they are.

    Raises
    ------
    ValueError
        If the kernels have no room for it.
    """
    N, C = case.shape[:2]
    S = case.size // (N * C)
    shape = (N * S, C, 1) if case.channels_last else (N, C, S)
    processors = gpu.cupy.cuda.Device().attributes["MultiProcessorCount"]
    found = launch.launch_for(shape, case.nbytes // case.size, True, processors)
    if found.group > MAX_GROUP or found.lanes > launch.THREADS:
        raise ValueError(f"{case.name}: {found} is more than the kernels have room for: lower --row-bytes")
    return found


def sweep_case(gpu: Gpu, case: Case, effort: Effort) -> list[dict[str, Any]]:
    """Time the kernels under every different launch that GRID gives a case, and then those of COMPILED.

    The first launch is that of now, which the others of COMPILED have too.
    """
    copies = copies_of(case, gpu.l2_bytes, gpu.free_bytes())
    if copies < 1:
        return []
    default = launch_of(gpu, case)
    launches: dict[launch.Launch, list[dict[str, int]]] = {default: []}
    for values in itertools.product(*GRID.values()):
        constants = dict(zip(GRID, values, strict=True))
        with launch_constants(constants), contextlib.suppress(ValueError):
            launches.setdefault(launch_of(gpu, case), []).append(constants)
    tensors = Tensors(gpu, case, copies)
    check(tensors, "plain", "ours", Ours(tensors, "plain").results())
    runs, counts, made = {}, {}, []
    tried: list[tuple[dict[str, int], Sequence[str]]] = [
        (settings[0] if settings else {}, ()) for settings in launches.values()
    ]
    variants = {
        name: options
        for name, options in COMPILED.items()
        if case.nbytes == 2 * case.size or "-DLOADS=8" not in options
    }
    tried += [({}, options) for options in variants.values()]
    for number, (constants, options) in enumerate(tried):
        with launch_constants(constants), compiled_with(options):
            kernels = Kernels(tensors, "plain")
            made.append(kernels)
            if number:
                kernels.y, kernels.dx = made[0].y, made[0].dx  # shared by all, as memory is scarce
            for kernel in STEP:
                graph, counts[number, kernel] = kernels.graph(kernel)
                runs[f"{number} {kernel}"] = gpu.timed(graph)
            results = Ours(tensors, "plain").results()
        check(tensors, "plain", f"ours under {constants or options}", results)
    seconds = in_turn(runs, effort)
    us = [
        {kernel: median(seconds[f"{number} {kernel}"]) / counts[number, kernel] * 1e6 for kernel in STEP}
        for number in range(len(tried))
    ]
    rows = [
        {"launch": shape._asdict() | {"blocks": shape.blocks}, "constants": settings, "us": taken}
        for (shape, settings), taken in zip(launches.items(), us, strict=False)
    ]
    compiled = [
        {"name": name, "us": taken} for name, taken in zip(variants, us[len(launches) :], strict=True)
    ]
    print(f"{case.name}: {len(rows)} launches, {len(compiled)} variants of the kernels", flush=True)
    sizes = {"nbytes": case.nbytes, "copies": copies}
    return [{"name": case.name, **sizes, "launches": rows, "compiled": compiled}]


STEP = ("statistics", "normalize", "reduce_gradients", "input_gradient")


def step_ratio(row: Mapping[str, Any], default: Mapping[str, Any]) -> float:
    """Return the time of forward and backward over that of another launch."""
    return sum(row["us"][k] for k in STEP) / sum(default["us"][k] for k in STEP)


def print_compiled(swept: Sequence[dict[str, Any]]) -> None:
    """Print the times of the variants of the kernels."""
    rows = []
    for case in swept:
        default, *_ = case["launches"]
        for row in case["compiled"]:
            ratios = [f"{row['us'][k] / default['us'][k]:.2f}" for k in STEP]
            rows.append([case["name"], row["name"], *ratios, f"{step_ratio(row, default):.2f}"])
    print("\nVariants of the kernels: time over the default's, by kernel and of all four\n")
    print(table(["case", "variant", *STEP, "all"], rows))


def print_sweep(swept: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print the best launches; return constants by the geometric mean of their times over those of now."""
    rows = []
    for case in swept:
        default, *_ = case["launches"]
        best = {k: min(case["launches"], key=lambda row, k=k: row["us"][k]) for k in STEP}
        overall = min(case["launches"], key=lambda row: step_ratio(row, default))
        fields = ("blocks", "per_split", "lanes", "group")
        rows.append(
            [
                case["name"],
                f"{sum(default['us'][k] for k in STEP):.1f}",
                *(f"{best[k]['us'][k] / default['us'][k]:.2f}" for k in STEP),
                f"{step_ratio(overall, default):.2f}",
                " ".join(f"{field}={overall['launch'][field]}" for field in fields),
            ]
        )
    headings = ["case", "default us", *STEP, "all", "best launch"]
    print("\nBest launches: time over the default's, by kernel and of all four\n")
    print(table(headings, rows))
    print_compiled(swept)

    ratios: dict[tuple[int, ...], list[float]] = {}
    for case in swept:
        for row in case["launches"]:
            for constants in row["constants"]:
                ratios.setdefault(tuple(constants.values()), []).append(step_ratio(row, case["launches"][0]))
    ranking = [
        {**dict(zip(GRID, values, strict=True)), "ratio": geometric_mean(found), "worst": max(found)}
        for values, found in ratios.items()
        if len(found) == len(swept)  # others have no room for some case
    ]
    ranking.sort(key=lambda entry: entry["ratio"])
    now = {name: getattr(launch, name) for name in GRID}
    print(f"\nConstants by the geometric mean over {len(swept)} cases; now {now}\n")
    best_rows = [
        [
            " ".join(f"{name}={entry[name]:g}" for name in GRID),
            f"{entry['ratio']:.3f}",
            f"{entry['worst']:.2f}",
        ]
        for entry in ranking[:10]
    ]
    print(table(["constants", "time / default", "worst"], best_rows))
    return ranking


# ---- What is printed ----
def spread(values: Sequence[float]) -> str:
    """Return the geometric mean, with the worst in brackets."""
    return f"{geometric_mean(values):.2f} ({min(values):.2f})" if values else "-"


def _times(kernel: Mapping[str, Any] | None) -> str:
    if kernel is None:
        return ""
    modelled = kernel["modelled_us"]
    return f"{kernel['us']:.1f} " + ("-" if modelled is None else f"({modelled:.1f})")


def print_tables(results: Sequence[dict[str, Any]]) -> None:
    """Print all results, by type and layout."""
    for dtype, layout in dict.fromkeys((r["dtype"], r["layout"]) for r in results):
        chosen = [r for r in results if (r["dtype"], r["layout"]) == (dtype, layout)]
        print(f"\n{dtype}, {layout}: kernels, bandwidth as a share of the copy's, or of reading's\n")
        headings = ["shape", "variant", "MiB", "copy GB/s", "read GB/s", *KERNELS]
        rows, times = [], []
        for r in chosen:
            shares = [f"{r['kernels'][k]['share']:.2f}" if k in r["kernels"] else "" for k in KERNELS]
            shape = "x".join(map(str, r["shape"]))
            rates = [f"{r[f'{rate}_gb_per_s']:.0f}" for rate in ("copy", "read")]
            rows.append([shape, r["variant"], f"{r['nbytes'] / 2**20:.1f}", *rates, *shares])
            times.append([shape, r["variant"], *(_times(r["kernels"].get(k)) for k in KERNELS)])
        print(table(headings, rows))
        print(f"\n{dtype}, {layout}: kernels, microseconds: measured, and by the model of gpu_model.py\n")
        print(table(["shape", "variant", *KERNELS], times))

        print(f"\n{dtype}, {layout}: layer; microseconds, and the others' time over ours\n")
        headings = [
            "shape",
            "variant",
            "forward",
            "backward",
            "eager",
            "torch_sync",
            "eager",
            "batch_norm",
            "eager",
            "by",
        ]
        rows = []
        for r in chosen:
            ours = r["layers"]["ours"]
            ratios = [
                f"{r['ratios'][name][mode]:.2f}" if mode in r["ratios"].get(name, {}) else "-"
                for name in RIVALS
                for mode in ("graph", "eager")
            ]
            rows.append(
                [
                    "x".join(map(str, r["shape"])),
                    r["variant"],
                    *(f"{ours['graph'][f'{d}_us']:.1f}" for d in ("forward", "backward")),
                    f"{sum(ours['eager'].values()):.1f}",
                    *ratios,
                    r.get("batch_norm_backend", "-"),
                ]
            )
        print(table(headings, rows))
    for note in dict.fromkeys(note for r in results for note in r["notes"]):
        print(note)


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return geometric means, with the worst, by type and layout."""
    found = []
    for dtype, layout in dict.fromkeys((r["dtype"], r["layout"]) for r in results):
        chosen = [r for r in results if (r["dtype"], r["layout"]) == (dtype, layout)]
        large = [r for r in chosen if r["nbytes"] >= LARGE]
        row: dict[str, Any] = {"dtype": dtype, "layout": layout}
        for kernel in KERNELS:
            row[kernel] = [r["kernels"][kernel]["share"] for r in large if kernel in r["kernels"]]
        for name in RIVALS:
            for mode in ("graph", "eager"):
                row[f"{name} {mode}"] = [
                    r["ratios"][name][mode] for r in chosen if mode in r["ratios"].get(name, {})
                ]
        found.append(row)
    return found


class Goal(NamedTuple):
    """What we want to reach, and whether we do; None if nothing of the kind was measured."""

    text: str
    figure: str
    met: bool | None


def goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """Compare the results with what we want."""
    found = []
    shares = {
        f"{kernel}, {r['variant']}, {r['name']}": entry["share"]
        for r in results
        if r["nbytes"] >= LARGE
        for kernel, entry in r["kernels"].items()
    }
    large = f"from {LARGE >> 20} MiB on"
    text = f"every kernel at {GOAL_SHARE:.0%} of the bandwidth of copying, or of reading alone, {large}"
    found.append(_goal(text, shares, GOAL_SHARE, of_the_worst=True))

    def ratios(name: str, layouts: Sequence[str]) -> dict[str, float]:
        return {
            f"{r['variant']}, {r['name']}": r["ratios"][name]["graph"]
            for r in results
            if r["layout"] in layouts and "graph" in r["ratios"].get(name, {})
        }

    for layout, goal in GOAL_TORCH_SYNC.items():
        text = f"{goal:g} times as fast as torch's SyncBatchNorm kernels, {layout}, on geometric mean"
        found.append(_goal(text, ratios("torch_sync", [layout]), goal, of_the_worst=False))
    against = ratios("batch_norm", ["channels_first", "channels_last", "dense"])
    found.append(_goal("nowhere slower than F.batch_norm", against, 1.0, of_the_worst=True))
    found.append(_goal("faster than F.batch_norm on geometric mean", against, 1.0, of_the_worst=False))
    return found


def _goal(text: str, values: Mapping[str, float], goal: float, of_the_worst: bool) -> Goal:
    if not values:
        return Goal(text, "not measured", None)
    mean, worst = geometric_mean(list(values.values())), min(values, key=lambda name: values[name])
    reached = sum(value >= goal for value in values.values())
    figure = (
        f"geometric mean {mean:.2f}, worst {values[worst]:.2f} ({worst}), {reached} of {len(values)} reach it"
    )
    met = values[worst] >= goal if of_the_worst else mean >= goal
    return Goal(text, figure, met)


def print_summary(results: Sequence[dict[str, Any]], host: Mapping[str, Mapping[str, float]]) -> list[Goal]:
    """Print geometric means, the host's costs and the goals; return the goals."""
    if results:
        print(f"\nGeometric means, with the worst in brackets; kernels from {LARGE >> 20} MiB on\n")
        columns = [*KERNELS, *(f"{name} {mode}" for name in RIVALS for mode in ("graph", "eager"))]
        rows = [
            [f"{row['dtype']} {row['layout']}", *(spread(row[column]) for column in columns)]
            for row in summarize(results)
        ]
        print(table(["", *columns], rows))
    if host:
        print(f"\nMicroseconds of the host per call, {'x'.join(map(str, TINY))} float32\n")
        calls = ("forward", "backward", "step")
        print(table(["", *calls], [[n, *(f"{us[call]:.1f}" for call in calls)] for n, us in host.items()]))
    found = goals(results)
    print()
    for goal in found:
        verdict = {True: "met", False: "not met", None: "open"}[goal.met]
        print(f"{verdict:>8}: {goal.text}: {goal.figure}")
    return found


def plot(results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Any | None:
    """Draw bandwidths and ratios over the size of the tensor."""
    if not results:
        return None
    made = new_figure(nrows=1, ncols=3, figsize=(15, 5.5))
    if made is None:
        return None
    figure, (bandwidth, sync, batch_norm) = made

    def size(r: Mapping[str, Any]) -> float:
        return float(r["nbytes"]) / 2**20

    for kernel in KERNELS:
        chosen = [r for r in results if kernel in r["kernels"]]
        shares = [r["kernels"][kernel]["share"] for r in chosen]
        bandwidth.scatter([size(r) for r in chosen], shares, s=9, alpha=0.6, label=kernel)
    bandwidth.axhline(GOAL_SHARE, color="black", linewidth=1, linestyle="--")
    bandwidth.set(title="kernels: bandwidth / the copy's, or reading's")
    for axes, name, key in ((sync, "torch_sync", "layout"), (batch_norm, "batch_norm", "variant")):
        chosen = [r for r in results if "graph" in r["ratios"].get(name, {})]
        for label in dict.fromkeys(r[key] for r in chosen):
            labelled = [r for r in chosen if r[key] == label]
            ratios = [r["ratios"][name]["graph"] for r in labelled]
            axes.scatter([size(r) for r in labelled], ratios, s=12, alpha=0.7, label=label)
        axes.axhline(1, color="black", linewidth=1, linestyle="--")
        axes.set(title=f"layer: time of {name} / cupy_syncbn's (graphs)")
        if chosen:
            axes.set_yscale("log")
    for axes in (bandwidth, sync, batch_norm):
        axes.set_xscale("log")
        axes.set_xlabel("size of a tensor (MiB)")
        axes.grid(alpha=0.3, which="both")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize="small")
    figure.supxlabel(caption(facts), fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None, make_gpu: Callable[[Any], Gpu] = Gpu) -> int:
    """Run the benchmark."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes, float32 and float16, few repeats")
    parser.add_argument("--sweep", action="store_true", help="try launch constants instead")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="only these types")
    for option, constant in CONSTANTS.items():
        default = getattr(launch, constant)
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            type=int,
            metavar="N",
            help=f"{constant} of cupy_syncbn/backends/cuda/launch.py (default {default})",
        )
    parser.add_argument("--no-torch", action="store_true", help="our kernels alone")
    parser.add_argument(
        "--budget-s",
        type=float,
        metavar="S",
        help="seconds after which no case is begun (default 480; --quick 90; --sweep 240)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the results go")
    options = parser.parse_args(arguments)
    budget = options.budget_s or (240 if options.sweep else 90 if options.quick else 480)
    start = time.perf_counter()

    torch = None if options.no_torch else import_gpu_torch()
    try:
        gpu = make_gpu(torch)
    except (ImportError, RuntimeError) as error:
        print(f"this benchmark needs a GPU: {error}", file=sys.stderr)
        return 2
    gc.collect()
    gc.freeze()  # the modules of torch: collections between measurements need not look at them

    dtypes = supported(gpu, options.dtypes or (QUICK_DTYPES if options.quick else DTYPES))
    shapes = SWEEP if options.sweep else QUICK if options.quick else [*MAPS, DENSE]
    effort = MANY if options.sweep else BRIEF if options.quick else FULL
    constants = {
        CONSTANTS[name]: value for name in CONSTANTS if (value := getattr(options, name)) is not None
    }
    pending = cases(shapes, dtypes)
    record: dict[str, Any] = {"gpu": gpu.facts(), "commit": commit(), "launch": constants}
    results: list[dict[str, Any]] = []
    host: dict[str, dict[str, float]] = {}
    error: str | None = None

    def wanted() -> bool:
        return time.perf_counter() - start < budget

    with gpu, launch_constants(constants), termination_raises():
        try:
            if not options.sweep:
                host = measure_host(gpu)
            while pending and wanted():
                case = pending[0]
                launch_of(gpu, case)  # first of all: it may not fit
                try:
                    if options.sweep:
                        results += sweep_case(gpu, case, effort)
                    else:
                        measure_case(gpu, case, effort, wanted, results)
                except Exception as failure:
                    if "OutOfMemory" not in type(failure).__name__:
                        raise
                    print(f"{case.name}: left out: {failure}")
                pending.pop(0)
        except WrongResultError as wrong:
            error = str(wrong)
        except Exception as failure:
            # After an error of CUDA nothing works any more; what was measured before is kept.
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"
    gc.unfreeze()

    facts = circumstances(arguments, 1, ["cupy_syncbn", "cupy", "torch", "numpy"])
    device = record["gpu"]
    facts["machine"] = f"{device['name']}, driver {device['driver']}, CUDA {device['cuda_runtime']}"
    record = {**facts, **record, "seconds": round(time.perf_counter() - start), "error": error}
    record["not_measured"] = [case.name for case in pending]
    figure = None
    if options.sweep:
        record |= {"ranking": print_sweep(results) if results else [], "results": results}
    else:
        print_tables(results)
        found = print_summary(results, host)
        record |= {"host_us": host, "goals": [goal._asdict() for goal in found], "results": results}
        figure = plot(results, facts)
    if pending:
        print(
            f"\nnot measured, for lack of time or after an error: {len(pending)}, from {pending[0].name} on"
        )
    print(f"\n{caption(facts)}; commit {record['commit']}; {record['seconds']} s")
    kind = "-sweep" if options.sweep else "-quick" if options.quick else ""
    slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")
    save(options.output, f"gpu-{slug}{kind}", short(record), figure)
    if error:
        print(f"error: {error}", file=sys.stderr)
    return 1 if error else 0


def short(value: Any) -> Any:
    """Return a record with the digits that mean something, and without the lists that only we needed."""
    if isinstance(value, Mapping):
        return {k: len(v) if k == "constants" else short(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [short(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """Let SIGTERM, which `timeout` sends, be an error: what was measured is still written."""

    def stop(*_: object) -> None:
        raise TimeoutError("terminated")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def supported(gpu: Gpu, dtypes: Sequence[str]) -> list[str]:
    """Return the types that CuPy has arrays of, and say which it has not."""
    found = []
    for dtype in dtypes:
        try:
            gpu.cupy.empty(1, data_type(dtype))
        except Exception as error:
            print(f"{dtype} is left out: CuPy {gpu.cupy.__version__}: {type(error).__name__}: {error}")
        else:
            found.append(dtype)
    return found


if __name__ == "__main__":
    sys.exit(main())
