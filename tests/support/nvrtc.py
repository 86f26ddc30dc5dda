"""NVRTC through ctypes: compile the CUDA kernels for any architecture, with no GPU, no driver and no CuPy.

    python tests/support/nvrtc.py [architecture ...]
    python tests/support/nvrtc.py --lengths >tests/backends/cuda/machine_code.tsv
    python tests/support/nvrtc.py --profiles >scripts/benchmarks/results/gpu-model-counts.json

prints the registers per thread and the shared memory per block of every instance; or how long the machine
code is of those that read vectors, as test_nvrtc.py holds it to; or what scripts/benchmarks/gpu_model.py
computes with, of float32 and float16. Results are kept, by all that they depend
on, in the folder CUPY_SYNCBN_NVRTC_CACHE, or else in a temporary one of the system.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import NamedTuple

from cupy_syncbn.backends.cuda import kernels

try:
    from support import machine_code
except ModuleNotFoundError:  # run as a script
    import machine_code

PACKAGES = (
    "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl", machine_code.PACKAGE,
)  # fmt: skip
"""The compiler, those whose headers cuda_fp16.h and cuda_bf16.h are and include, and the disassembler."""

ARCHITECTURES = (75, 80, 90, 100, 120)
"""The oldest one that CUDA 13 compiles for, and those of data centres and desktops since."""

OPTIONS = (*kernels.OPTIONS, "-ftz=true")
"""What CuPy gives NVRTC: it adds the second one."""

SPLITTER = "0d4280000000000800"
"""As PTX has it: the constant 2^41 + 1 of round_to_12_bits in formulas.h."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the assembler and the PTX tell of a kernel."""

    registers: int  # a thread
    shared: int  # bytes per block
    stack: int  # bytes per thread: arrays in local memory, and spilled registers
    spill_stores: int  # bytes
    spill_loads: int  # bytes
    accesses: dict[str, int]  # how many instructions of each kind the PTX has, such as ld.global.nc.v4.f32
    splittings: list[str]  # what the PTX does with SPLITTER, such as mul.rn.f64
    loop: float | None = None  # instructions a vector of 16 bytes in the machine code's main loop
    entry: int | None = None  # and before it; None where no vectors are read
    profile: dict | None = None  # of machine_code.Profile


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compilation made, by the names that it was asked for."""

    kernels: dict[str, Kernel]
    warnings: list[str]
    cubin_bytes: int


class CompileError(Exception):
    """NVRTC refused; the message has its log."""


class Job(NamedTuple):
    """A file of kernels, the type of data and the architecture to compile it for."""

    file: str
    dtype: str
    architecture: int

    def __str__(self):
        return f"{self.file}-{self.dtype}-sm_{self.architecture}"


def jobs_of(file: str, architecture: int) -> list[Job]:
    """Return the jobs that compile a file for an architecture, for all types of data."""
    return [Job(file, dtype, architecture) for dtype in kernels.TYPES]


def missing() -> str | None:
    """Return what is missing here to compile, or None."""
    for package in PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"{package} is not installed"
    if not _library_file().is_file():
        return f"there is no {_library_file()}"
    return None


def _folder() -> Path:
    return Path(str(metadata.distribution(PACKAGES[0]).locate_file("nvidia/cu13")))


def _includes() -> list[str]:
    return [f"-I{_folder() / folder}" for folder in ("include", "include/cccl")]


def _library_file() -> Path:
    return _folder() / "lib" / "libnvrtc.so.13"


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_library_file()))
    program, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t)
    texts = ctypes.POINTER(text)
    arguments = {
        "nvrtcCreateProgram": (ctypes.POINTER(program), text, text, ctypes.c_int, texts, texts),
        "nvrtcDestroyProgram": (ctypes.POINTER(program),),
        "nvrtcAddNameExpression": (program, text),
        "nvrtcCompileProgram": (program, ctypes.c_int, texts),
        "nvrtcGetLoweredName": (program, text, texts),
    }
    for output in ("ProgramLog", "PTX", "CUBIN"):
        arguments[f"nvrtcGet{output}Size"] = (program, size)
        arguments[f"nvrtcGet{output}"] = (program, text)
    for name, types in arguments.items():
        getattr(library, name).argtypes = types
    library.nvrtcGetErrorString.restype = text
    return library


class _Program:
    """A source on its way through NVRTC; a context manager."""

    def __init__(self, source: str):
        self._handle = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram", ctypes.byref(self._handle), source.encode(), b"source.cu", 0, None, None
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._call("nvrtcDestroyProgram", ctypes.byref(self._handle))

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(_library(), function)(*arguments)
        if status != 0:
            log = self.output("ProgramLog").decode() if function == "nvrtcCompileProgram" else ""
            raise CompileError(f"{function}: {_library().nvrtcGetErrorString(status).decode()}\n{log}")

    def compile(self, options: list[str], names: tuple[str, ...]) -> None:
        for name in names:
            self._call("nvrtcAddNameExpression", self._handle, name.encode())
        texts = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        self._call("nvrtcCompileProgram", self._handle, len(options), texts)

    def mangled(self, name: str) -> str:
        result = ctypes.c_char_p()
        self._call("nvrtcGetLoweredName", self._handle, name.encode(), ctypes.byref(result))
        return (result.value or b"").decode()

    def output(self, kind: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{kind}Size", self._handle, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{kind}", self._handle, buffer)
        return buffer.raw if kind == "CUBIN" else buffer.value


def compile_source(
    source: str, architecture: int, names: tuple[str, ...], options: tuple[str, ...] = OPTIONS
) -> Compiled:
    """Compile the kernels that `names` tells, such as ``normalize<float, 4>``, out of CUDA C++.

    Raises
    ------
    CompileError
        With NVRTC's log, if the source or a name is in error.
    """
    with _Program(source) as program:
        program.compile([f"-arch=sm_{architecture}", *options, "--ptxas-options=-v", *_includes()], names)
        log, ptx, cubin = (program.output(kind) for kind in ("ProgramLog", "PTX", "CUBIN"))
        found = _kernels(log.decode(), ptx.decode())
        mangled = {program.mangled(name): name for name in names}
        counted = dict(machine_code.counts(cubin, mangled))
        return Compiled(
            kernels={name: _with_counts(found[key], counted.get(name)) for key, name in mangled.items()},
            warnings=[
                line for line in log.decode().splitlines() if re.search(r"warning( #[\w-]+)?\s*:", line)
            ],
            cubin_bytes=len(cubin),
        )


def entries(source: str, architecture: int) -> set[str]:
    """Return what the kernels of a source are called in its PTX."""
    with _Program(source) as program:
        program.compile([f"-arch=compute_{architecture}", *OPTIONS, *_includes()], ())
        return set(re.findall(r"\.entry (\w+)\(", program.output("PTX").decode()))


def _with_counts(kernel: Kernel, counted: machine_code.Counts | None) -> Kernel:
    if counted is None:
        return kernel
    profile = counted.profile and counted.profile._asdict()
    return dataclasses.replace(kernel, loop=counted.loop, entry=counted.entry, profile=profile)


def _kernels(log: str, ptx: str) -> dict[str, Kernel]:
    """Return kernels by mangled name, from what ``--ptxas-options=-v`` adds to the log, and from PTX."""
    accesses, splittings = {}, {}
    for name, body in re.findall(r"\.entry (\w+)\((.*?)^}", ptx, re.DOTALL | re.MULTILINE):
        accesses[name] = collections.Counter(re.findall(r"(?<![\w.%$])(?:ld|st|atom|red)\.[\w.:]+", body))
        # By itself, or from the register that it is moved to.
        operands = "|".join([SPLITTER, *re.findall(rf"mov\.[bf]64\s+(%\w+), {SPLITTER};", body)])
        splittings[name] = re.findall(rf"\b(?!mov\.)([a-z]\w*\.[\w.]+)\s[^;\n]*(?:{operands})\b", body)
    found = {}
    _, *sections = re.split(r"Compiling entry function '(\w+)'", log)
    for name, section in zip(sections[::2], sections[1::2], strict=True):
        used = re.search(r"Used (\d+) registers.*", section)
        # One of these lines is the kernel's own, others are of functions that it calls.
        local = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", section
        )
        if not used or not local:
            raise ValueError(f"the assembler's output is not as expected:\n{section}")
        shared = re.search(r"(\d+) bytes smem", used[0])
        stack, stores, loads = (sum(map(int, column)) for column in zip(*local, strict=True))
        found[name] = Kernel(
            int(used[1]), int(shared[1]) if shared else 0, stack, stores, loads, dict(accesses[name]),
            splittings[name],
        )  # fmt: skip
    return found


def compile_job(job: Job) -> Compiled:
    """Compile all instances that a job is about, or read what came of it before."""
    source, names = kernels.source(job.file), kernels.instances(job.file, job.dtype)
    versions = [metadata.version(package) for package in PACKAGES]
    programs = [Path(file).read_text(encoding="utf-8") for file in (__file__, machine_code.__file__)]
    key = [source, names, OPTIONS, job.architecture, versions, programs]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    file = _cache() / f"{job}-{digest[:32]}.json"
    with open(file.with_suffix(".lock"), "w") as lock:  # who else wants it waits for what comes of it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            record = json.loads(file.read_text(encoding="utf-8"))
            return Compiled(**record | {"kernels": {k: Kernel(**v) for k, v in record["kernels"].items()}})
        compiled = compile_source(source, job.architecture, names)
        with tempfile.NamedTemporaryFile("w", dir=_cache(), delete=False, encoding="utf-8") as part:
            json.dump(dataclasses.asdict(compiled), part)
        os.replace(part.name, file)  # at once: who is interrupted leaves no half of it
    return compiled


def prepare(job: Job) -> None:
    """Let `compile_job` find a result: what another process returns would be memory of the tests' own."""
    compile_job(job)


@functools.cache
def _cache() -> Path:
    default = Path(tempfile.gettempdir(), f"cupy_syncbn-nvrtc-{os.getuid()}")
    folder = Path(os.environ.get("CUPY_SYNCBN_NVRTC_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _compile_all(architectures: Iterable[int]) -> dict[str, dict[int, Kernel]]:
    """Return all instances, by name and architecture."""
    jobs = [Job(*job) for job in product(reversed(kernels.FILES), kernels.TYPES, architectures)]
    rows: dict[str, dict[int, Kernel]] = collections.defaultdict(dict)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job, compiled in zip(jobs, pool.map(compile_job, jobs), strict=True):
            for name, kernel in compiled.kernels.items():
                rows[name][job.architecture] = kernel
    return rows


LENGTHS = (80, 90, 100, 120)
"""The architectures whose machine code is counted."""


def _lengths() -> str:
    """Return how long the machine code of all instances is that read vectors."""
    lines = [
        "# Instructions per vector of 16 bytes in the main loop, and before it; registers per thread.",
        "# They are the most in test_nvrtc.py. Who changes one says why; --lengths prints them anew.",
        "\t".join(["instance", *(f"sm_{architecture}" for architecture in LENGTHS)]),
    ]
    for name, row in _compile_all(LENGTHS).items():
        if machine_code.round_of(name):
            cells = (f"{kernel.loop:g} {kernel.entry} {kernel.registers}" for kernel in row.values())
            lines.append("\t".join([name, *cells]))
    return "\n".join(lines)


def _profiles() -> str:
    """Return the counts that the model is made of, an instance a line."""
    lines = []
    for name, row in _compile_all(LENGTHS).items():
        if machine_code.round_of(name) and re.search(r"<(float|__half),", name):
            found = {f"sm_{a}": {"registers": k.registers} | (k.profile or {}) for a, k in row.items()}
            lines.append(f"{json.dumps(name)}: {json.dumps(found)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def read_lengths(file: Path) -> dict[tuple[str, int], tuple[float, ...]]:
    """Return what `--lengths` printed, by instance and architecture."""
    heads, *rows = (line.split("\t") for line in file.read_text().splitlines() if not line.startswith("#"))
    architectures = [int(head.removeprefix("sm_")) for head in heads[1:]]
    return {
        (name, architecture): tuple(map(float, cell.split()))
        for name, *cells in rows
        for architecture, cell in zip(architectures, cells, strict=True)
    }


def _table(architectures: list[int]) -> str:
    """Return a table of all instances; registers are followed by +stack where there is one."""
    rows = _compile_all(architectures)
    heads = "".join(f"{f'sm_{architecture}':>8}" for architecture in architectures)
    lines = [f"{'registers per thread, shared bytes per block':64}{heads}"]
    for name, row in rows.items():
        cells = [f"{k.registers}+{k.stack}" if k.stack else f"{k.registers}" for k in row.values()]
        shared = max(kernel.shared for kernel in row.values())
        lines.append(f"{name:56}{shared:8}" + "".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Print registers and shared memory of all kernels.")
    parser.add_argument(
        "architectures",
        nargs="*",
        type=int,
        metavar="architecture",
        help="such as 90; all that the tests compile for if none is given",
    )
    parser.add_argument("--lengths", action="store_true", help="how long their machine code is")
    parser.add_argument("--profiles", action="store_true", help="what gpu_model.py computes with")
    options = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    if options.lengths or options.profiles:
        print(_lengths() if options.lengths else _profiles())
        return
    print(_table(options.architectures or list(ARCHITECTURES)))


if __name__ == "__main__":
    main()
