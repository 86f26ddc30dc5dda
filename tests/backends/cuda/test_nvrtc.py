"""Every instance of the CUDA kernels, compiled for every architecture by NVRTC, without a GPU.

What a launch depends on is in the assembler's report: registers, shared memory, and none of the local memory
that spilled registers are written to. What the accesses to memory are is in the PTX.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from cupy_syncbn.backends.cuda import kernels
from support import nvrtc

pytestmark = pytest.mark.mpi_skip

THREADS = 256  # a block: common.cuh
REGISTERS = 65536  # a multiprocessor's, on all architectures
LOADS = 4  # of 16 bytes that a thread has under way: common.cuh

# KiB of shared memory a multiprocessor has: CUDA Programming Guide, "Technical Specifications per Compute
# Capability". From 8.0 on, a block takes 1 KiB more than its own.
SHARED = {75: 64, 80: 164, 90: 228, 100: 228, 120: 100}


class Instance(NamedTuple):
    kernel: str
    type: str = ""
    width: int = 1
    columns: bool = False
    residual: bool = False
    activation: bool = False

    @classmethod
    def parse(cls, name):
        kernel, _, rest = name.rstrip(">").partition("<")
        if not rest:
            return cls(kernel)
        data_type, width, *flags = rest.split(", ")
        return cls(kernel, data_type, int(width), *(flag == "true" for flag in flags))

    def vector_stores(self):
        """Return the stores of 16 bytes that the loop over the tensor has."""
        if self.width == 1:
            return 0
        if self.kernel == "normalize":
            return LOADS // 2 if self.residual else LOADS
        return LOADS // 2 if self.kernel == "input_gradient" or self.residual else 0


def access_bytes(instruction):
    """Return how many bytes a load or store such as ld.global.nc.v4.f32 is of."""
    vector, bits = re.search(r"(?:\.v(\d))?\.[busf](\d+)$", instruction).groups()
    return int(vector or 1) * int(bits) // 8


def count_accesses(kernel, kind, size):
    """Return how many there are in the PTX, but for the loads from L2 of what other blocks have summed."""
    return sum(
        count
        for instruction, count in kernel.accesses.items()
        if re.match(rf"{kind}\.global\.(?!cg\.)", instruction) and access_bytes(instruction) == size
    )


def float_atomics(kernel):
    return [access for access in kernel.accesses if re.search(r"^(atom|red)\..*\.b?f\d", access)]


@pytest.fixture(scope="session")
def compiler():
    if reason := nvrtc.missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def compilations(request, compiler):
    """Return the results of all jobs, which come while the tests are at work on the first."""
    parameters = (item.callspec.params for item in request.session.items if hasattr(item, "callspec"))
    jobs = dict.fromkeys(p["compiled"] for p in parameters if "compiled" in p)
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {job: pool.submit(nvrtc.compile_job, job) for job in jobs}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session", params=nvrtc.JOBS, ids=str)
def compiled(request, compilations):
    return compilations[request.param].result()


@pytest.fixture
def job(request):
    return request.node.callspec.params["compiled"]


def test_all_instances_compile_without_a_warning(compiled, job):
    assert set(compiled.kernels) == set(kernels.instances(job.file, job.dtype))
    assert compiled.warnings == []


def test_nothing_is_in_local_memory(compiled):
    local = {
        name: f"{kernel.stack} bytes of stack, {kernel.spill_stores} spilled"
        for name, kernel in compiled.kernels.items()
        if kernel.stack or kernel.spill_stores or kernel.spill_loads
    }
    assert local == {}


def test_registers_are_under_the_cap(compiled):
    above = {
        name: kernel.registers
        for name, kernel in compiled.kernels.items()
        if kernel.registers > kernels.REGISTERS[Instance.parse(name).width]
    }
    assert above == {}


def test_shared_memory_leaves_room_for_the_blocks(compiled, job):
    # As many as the cap on registers is for.
    reserved = 1024 if job.architecture >= 80 else 0
    excess = {}
    for name, kernel in compiled.kernels.items():
        blocks = REGISTERS // (THREADS * kernels.REGISTERS[Instance.parse(name).width])
        if blocks * (kernel.shared + reserved) > SHARED[job.architecture] * 1024:
            excess[name] = f"{blocks} blocks of {kernel.shared} bytes"
    assert excess == {}


def test_vectors_are_accessed_by_16_bytes(compiled):
    for name, kernel in compiled.kernels.items():
        instance = Instance.parse(name)
        loads, stores = (count_accesses(kernel, kind, 16) for kind in ("ld", "st"))
        if instance.width == 1:
            assert (loads, stores) == (0, 0), name
        else:
            assert loads >= LOADS, name
            assert stores >= instance.vector_stores(), name
            edges = count_accesses(kernel, "ld", 16 // instance.width)
            assert instance.columns or edges > 0, name


def test_no_atomic_is_floating_point(compiled):
    for name, kernel in compiled.kernels.items():
        assert float_atomics(kernel) == [], name


def test_the_splitting_of_pivots_keeps_its_roundings(compiled):
    """A mul.f64 may become part of an fma, which has none."""
    for name, kernel in compiled.kernels.items():
        has_pivots = Instance.parse(name).kernel in ("statistics", "centered_squares", "normalize")
        assert set(kernel.splittings) == ({"mul.rn.f64"} if has_pivots else set()), name


# That these tests can fail.


def compile_planted(body, arguments="float* x", bounds=""):
    source = f'extern "C" __global__ void {bounds} planted({arguments}) {{ {body} }}'
    return nvrtc.compile_source(source, 90, ("planted",))


def test_a_spill_is_seen(compiler):
    body = """
        float values[48];
        #pragma unroll
        for (int i = 0; i < 48; ++i) values[i] = x[i * 1024 + threadIdx.x];
        #pragma unroll
        for (int i = 0; i < 48; ++i) x[threadIdx.x * 48 + 47 - i] = values[i];
    """
    spilled = compile_planted(body, bounds="__launch_bounds__(1024, 2)").kernels["planted"]
    assert spilled.registers == 32
    assert min(spilled.stack, spilled.spill_stores, spilled.spill_loads) > 0
    roomy = compile_planted(body, bounds="__launch_bounds__(1024, 1)").kernels["planted"]
    assert roomy.stack == roomy.spill_stores == roomy.spill_loads == 0


def test_an_array_in_local_memory_is_seen(compiler):
    body = "float values[300]; for (int i = 0; i < 300; ++i) values[i] = x[i]; x[0] = values[k];"
    kernel = compile_planted(body, "float* x, int k").kernels["planted"]
    assert (kernel.stack, kernel.spill_stores) == (1200, 0)


def test_shared_memory_is_seen(compiler):
    body = (
        "__shared__ float values[300]; values[threadIdx.x] = x[0]; __syncthreads(); x[1] = values[x[2] > 0];"
    )
    assert compile_planted(body).kernels["planted"].shared == 1200


def test_accesses_are_seen(compiler):
    kernel = compile_planted(
        "x[0] = x[1]; y[0] = y[1]; z[0] = z[1];", "float* x, float4* y, double2* z"
    ).kernels["planted"]
    for kind in ("ld", "st"):
        assert count_accesses(kernel, kind, 4) == 1
        assert count_accesses(kernel, kind, 16) == 2


@pytest.mark.parametrize("data_type", ["float", "double", "__half2"])
def test_an_atomic_in_floating_point_is_seen(compiler, data_type):
    source = f"""
        #include <cuda_fp16.h>
        extern "C" __global__ void used({data_type}* x) {{ x[1] = atomicAdd(x, {data_type}()); }}
        extern "C" __global__ void unused({data_type}* x) {{ atomicAdd(x, {data_type}()); }}
        extern "C" __global__ void integer(unsigned int* x) {{ atomicAdd(x, 1u); }}
    """
    found = nvrtc.compile_source(source, 90, ("used", "unused", "integer")).kernels
    assert [len(float_atomics(found[name])) for name in found] == [1, 1, 0]


def test_a_warning_is_seen(compiler):
    (warning,) = compile_planted("int unused;").warnings
    assert '"unused" was declared but never referenced' in warning


def test_an_error_raises_with_the_log(compiler):
    with pytest.raises(nvrtc.CompileError, match='identifier "undefined" is undefined'):
        compile_planted("x[0] = undefined;")
    with pytest.raises(nvrtc.CompileError, match="absent"):
        nvrtc.compile_source("__global__ void there() {}", 90, ("absent",))
