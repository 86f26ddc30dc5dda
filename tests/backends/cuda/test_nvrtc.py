"""Every instance of the CUDA kernels, compiled for every architecture by NVRTC, without a GPU.

What a launch depends on is in the assembler's report: registers, shared memory, and none of the local memory
that spilled registers are written to. What the accesses to memory are is in the PTX.
"""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from cupy_syncbn.backends.cuda import kernels, symbols
from cupy_syncbn.backends.cuda.launch import resident
from support import machine_code, nvrtc
from support.launcher import REPOSITORY
from support.missing import skip_without

pytestmark = pytest.mark.mpi_skip

THREADS = 256  # a block: common.cuh
REGISTERS = 65536  # a multiprocessor's, on all architectures
LOADS = 4  # of 16 bytes that a thread has under way: common.cuh

# KiB of shared memory a multiprocessor has: CUDA Programming Guide, "Technical Specifications per Compute
# Capability". From 8.0 on, a block takes 1 KiB more than its own.
SHARED = {75: 64, 80: 164, 90: 228, 100: 228, 120: 100}


LENGTHS = nvrtc.read_lengths(Path(__file__).with_name("machine_code.tsv"))


class Instance(NamedTuple):
    kernel: str
    type: str = ""
    width: int = 1
    columns: bool = False
    residual: bool = False
    activation: str = kernels.ACTIVATIONS[0]

    @classmethod
    def parse(cls, name):
        kernel, _, rest = name.rstrip(">").partition("<")
        if not rest:
            return cls(kernel)
        data_type, width, *flags = rest.split(", ")
        flags = [{"true": True, "false": False}.get(flag, flag) for flag in flags]
        return cls(kernel, data_type, int(width), *flags)

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


def offences(job, compiled):
    """Yield (instance, fact) for all that is not as it must be."""
    expected = set(kernels.instances(job.file, job.dtype))
    yield from ((name, "is not among what was compiled") for name in expected - compiled.kernels.keys())
    yield from ((str(job), warning) for warning in compiled.warnings)
    for name, kernel in compiled.kernels.items():
        instance = Instance.parse(name)
        yield from ((name, fact) for fact in facts_of_resources(kernel, instance, job.architecture))
        yield from ((name, fact) for fact in facts_of_accesses(kernel, instance))
        if instance.width > 1 and job.architecture in nvrtc.LENGTHS:
            most = LENGTHS.get((name, job.architecture))
            yield from ((name, fact) for fact in facts_of_lengths(kernel, most))


def facts_of_resources(kernel, instance, architecture):
    """Yield what a kernel has too much of: local memory, registers, shared memory."""
    if kernel.stack:
        yield f"has {kernel.stack} bytes of stack"
    if kernel.spill_stores or kernel.spill_loads:
        yield f"spills {kernel.spill_stores} bytes and loads {kernel.spill_loads}"
    cap = kernels.REGISTERS
    if kernel.registers > cap:
        yield f"takes {kernel.registers} registers, where {cap} are the cap"
    # Shared memory leaves room for as many blocks as are launched.
    blocks, reserved = resident(instance.width, SHARED[architecture] << 10), 1024 if architecture >= 80 else 0
    if blocks * (kernel.shared + reserved) > SHARED[architecture] * 1024:
        yield f"has {kernel.shared} bytes of shared memory, which leave no room for {blocks} blocks"


def facts_of_lengths(kernel, most):
    """Yield what is longer in the machine code than machine_code.tsv has it."""
    if most is None:
        yield "is not in machine_code.tsv"
        return
    if kernel.loop is None:
        yield "has no loop that loads, stores and computes all of a round"
        return
    names = "instructions a vector", "instructions before the main loop", "registers"
    for name, found, limit in zip(names, (kernel.loop, kernel.entry, kernel.registers), most, strict=True):
        if found > limit:
            yield f"has {found:g} {name}, where {limit:g} are the most: see machine_code.tsv"


def facts_of_accesses(kernel, instance):
    """Yield what is wrong with the instructions: accesses to vectors, atomics, how pivots are split."""
    loads, stores = (count_accesses(kernel, kind, 16) for kind in ("ld", "st"))
    if instance.width == 1:
        if loads or stores:
            yield f"has {loads} loads and {stores} stores of 16 bytes for single elements"
    else:
        if loads < LOADS:
            yield f"has {loads} loads of 16 bytes, where {LOADS} are under way"
        if stores < instance.vector_stores():
            yield f"has {stores} stores of 16 bytes, of {instance.vector_stores()}"
        if not instance.columns and not count_accesses(kernel, "ld", 16 // instance.width):
            yield "has no loads for the edges of rows"
    if atomics := float_atomics(kernel):
        yield f"has atomics on floating point: {atomics}"
    # A mul.f64 may become part of an fma, which does not have the rounding that splits a pivot.
    splittings = (
        {"mul.rn.f64"} if instance.kernel in ("statistics", "centered_squares", "normalize") else set()
    )
    if set(kernel.splittings) != splittings:
        yield f"splits pivots by {set(kernel.splittings) or 'nothing'}, not {splittings or 'nothing'}"


@pytest.fixture(scope="session")
def compiler():
    skip_without(nvrtc.missing())


SAMPLE = {90}
"""That of the GPUs it was measured on: NVRTC takes a minute for each. `pytest -m long` has the others."""


# The file that takes longest first: at the end, no processor is left to work alone.
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=[] if each in SAMPLE else pytest.mark.long) for each in nvrtc.ARCHITECTURES],
)
@pytest.mark.parametrize("file", kernels.FILES[::-1])
def test_instances(compiler, compilations, file, architecture):
    """All compile without a warning, within the resources of a launch, and access memory as they should."""
    found = []
    for job in nvrtc.jobs_of(file, architecture):
        compilations[job].result()  # or its error
        found += [f"{name} {fact}" for name, fact in offences(job, nvrtc.compile_job(job))]
    assert not found, "\n".join([f"{len(found)} offences on sm_{architecture}", *found])


# That the test can fail.


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"stack": 8}, "has 8 bytes of stack"),
        ({"spill_stores": 4}, "spills 4 bytes and loads 0"),
        ({"registers": 255}, "takes 255 registers"),
        ({"shared": 100_000}, "has 100000 bytes of shared memory"),
        ({"accesses": {}}, "has 0 loads of 16 bytes"),
        ({"accesses": {"atom.global.add.f32": 1}}, "has atomics on floating point"),
        ({"splittings": ["fma.rn.f64"]}, "splits pivots by {'fma.rn.f64'}"),
        ({"splittings": []}, "splits pivots by nothing"),
        ({"loop": 80.0}, "has 80 instructions a vector"),
        ({"entry": 1000}, "has 1000 instructions before the main loop"),
        ({"loop": None}, "has no loop"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_offence_is_told(compiler, change, fact):
    job = nvrtc.Job("statistics.cu", "float32", 90)
    compiled = nvrtc.compile_job(job)
    assert list(offences(job, compiled)) == []
    name = next(name for name in compiled.kernels if Instance.parse(name).width > 1)
    changed = compiled.kernels | {name: dataclasses.replace(compiled.kernels[name], **change)}
    found = list(offences(job, dataclasses.replace(compiled, kernels=changed)))
    assert {who for who, _ in found} == {name}
    assert any(told.startswith(fact) for _, told in found), found


def test_what_is_missing_or_warned_of_is_told(compiler):
    job = nvrtc.Job("statistics.cu", "float32", 90)
    compiled = nvrtc.compile_job(job)
    missing, *others = compiled.kernels
    kept = {name: compiled.kernels[name] for name in others}
    changed = dataclasses.replace(compiled, kernels=kept, warnings=["line 3: warning: unused"])
    assert list(offences(job, changed)) == [
        (missing, "is not among what was compiled"),
        (str(job), "line 3: warning: unused"),
    ]


def test_table_has_no_other_instances():
    said = {name for name, _ in LENGTHS}
    files_and_types = itertools.product(kernels.FILES, kernels.TYPES)
    there = itertools.chain(*itertools.starmap(kernels.instances, files_and_types))
    assert said == {name for name in there if machine_code.round_of(name)}


def test_the_model_counts_these_kernels(compiler):
    """Another NVRTC may differ by a little; other kernels need `tests/support/nvrtc.py --profiles` again."""
    results = REPOSITORY / "scripts" / "benchmarks" / "results"
    counts = json.loads((results / "gpu-model-counts.json").read_text())
    for file in "statistics.cu", "normalize.cu":
        for name, kernel in nvrtc.compile_job(nvrtc.Job(file, "float32", 90)).kernels.items():
            if machine_code.round_of(name):
                counted = counts[name]["sm_90"]
                assert abs(counted["waits"] - kernel.profile["waits"]) <= 1
                assert counted["around"] == pytest.approx(kernel.profile["around"], rel=0.1)
                assert sum(kernel.profile["pipes"].values()) == pytest.approx(kernel.loop)
                assert sum(counted["pipes"].values()) == pytest.approx(kernel.loop, rel=0.1)


def test_longer_machine_code_is_seen(compiler):
    """An activation that is found out at run time, and divisions before the loop."""
    name = "normalize<__half, 8, true, false, RELU>"
    source = kernels.source("normalize.cu")
    usual = nvrtc.compile_source(source, 90, (name,)).kernels[name]
    at_run_time = source.replace(
        "const bool is = is_blocked<ACTIVATION>(value);",
        "const bool is = slope == 0 ? is_blocked<RELU>(value) : is_blocked<LEAKY_RELU>(value);",
    ).replace(
        "let_through<ACTIVATION>(value, is, slope);",
        "slope == 0 ? let_through<RELU>(value, is, slope) : let_through<LEAKY_RELU>(value, is, slope);",
    )
    assert at_run_time != source
    assert nvrtc.compile_source(at_run_time, 90, (name,)).kernels[name].loop > 1.3 * usual.loop
    by_reciprocal = "static_cast<int>(__fdividef(static_cast<float>(a) + 0.5f, static_cast<float>(b)))"
    divided = source.replace(by_reciprocal, "a / b")
    assert divided != source
    assert nvrtc.compile_source(divided, 90, (name,)).kernels[name].entry > usual.entry + 10


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


def test_no_lambda_is_a_template():
    """NVRTC 12.9 takes one for a function of the host."""
    for file in kernels.FILES:
        assert not re.search(r"\]\([^)]*\bauto\b", kernels.source(file))


@pytest.mark.parametrize("options", [("-DSTREAMING_STORES",), ("-DLOADS=8",)])
def test_variants_that_the_sweep_tries(compiler, options):
    """Those of gpu.py: they are compiled into what they are called."""
    _, name = kernels.normalize("float16", 8, False, False, "RELU")
    source = kernels.source("normalize.cu")
    kernel = nvrtc.compile_source(source, 90, (name,), (*nvrtc.OPTIONS, *options)).kernels[name]
    loads, stores = (8, 8) if "-DLOADS=8" in options else (LOADS, LOADS)
    assert count_accesses(kernel, "ld", 16) == loads
    assert sum(n for access, n in kernel.accesses.items() if re.match(r"st\.global\..*v4", access)) == stores
    assert any(".cs." in access for access in kernel.accesses) == ("-DSTREAMING_STORES" in options)
    spared = kernel if "-DLOADS=8" not in options else dataclasses.replace(kernel, registers=0)
    assert not list(facts_of_resources(spared, Instance.parse(name), 90))
    assert kernel.registers <= 128  # for two blocks


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("file", kernels.FILES)
def test_symbols_are_what_instances_are_called(compiler, file, every):
    """In a source that makes one itself, as older releases of CuPy get it."""
    for dtype in kernels.TYPES:
        names = kernels.instances(file, dtype)
        for name in names if every else (names[0], names[-1]):
            found = nvrtc.entries(kernels.source(file) + symbols.instantiation(name), 90)
            assert found - {symbols.CENTERED_SQUARES} == {symbols.symbol(name)} - {symbols.CENTERED_SQUARES}
            assert symbols.symbol(name) in found
