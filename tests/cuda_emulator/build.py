"""Compiles kernels with g++ into libraries that are kept between runs.

A library is named by the hash of all that goes into it, and is written under another name first, so any
number of processes may build at once. A lock lets one of them do the work that the others wait for.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import prepass

NATIVE = Path(__file__).parent / "native"

_COMMON = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-threadsafe-statics",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
)
# The hooks of both sanitizers are in native/sanitizer_hooks.h.
_SANITIZERS = (
    "-fsanitize=thread",
    "--param=tsan-distinguish-volatile=1",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=alignment,null,bounds,object-size,shift,integer-divide-by-zero,signed-integer-overflow,return,bool",
)


def _contraction():
    """Return the options to round a * b + c once, as NVRTC does: nothing changes without the instruction."""
    processor = Path("/proc/cpuinfo")
    has_fma = processor.is_file() and re.search(r"^flags\s*:.*\bfma\b", processor.read_text(), re.MULTILINE)
    return ("-ffp-contract=fast", *(["-mfma"] if has_fma else []))


MODES = {"checked": ("-O1", "-g1", *_SANITIZERS), "fast": ("-O2", "-g0", *_contraction())}

# What holds cuda_fp16.h, crt/host_defines.h and nv/target: the pip packages of CUDA 13, and of CUDA 12.
_INCLUDE_DIRECTORIES = (
    "nvidia/cu13/include",
    "nvidia/cu13/include/cccl",
    "nvidia/cuda_runtime/include",
    "nvidia/cuda_nvcc/include",
    "nvidia/cuda_cccl/include",
    "cupy/_core/include/cupy/_cccl/libcudacxx",
)
_NEEDED_HEADERS = {
    "cuda_fp16.h": "nvidia-cuda-runtime",
    "crt/host_defines.h": "nvidia-cuda-crt",
    "nv/target": "nvidia-cuda-cccl",
}


class BuildError(RuntimeError):
    """g++ does not compile the kernels."""


def compiler():
    return os.environ.get("CXX", "g++")


@functools.cache
def include_directories():
    found = [Path(base, name) for base in sys.path for name in _INCLUDE_DIRECTORIES]
    return tuple(str(directory) for directory in found if directory.is_dir())


@functools.cache
def available():
    """Return None, or the reason why the emulator cannot work here."""
    if sys.platform != "linux":
        return "the CUDA emulator needs Linux"
    if not shutil.which(compiler()):
        return f"the CUDA emulator needs a C++ compiler ({compiler()} is not there)"
    if "clang" in _compiler_version():
        return "the CUDA emulator needs g++ (clang calls other hooks)"
    for header, package in _NEEDED_HEADERS.items():
        if not any(Path(directory, header).exists() for directory in include_directories()):
            return f"the CUDA emulator needs NVIDIA's {header}: pip install '{package}==13.*'"
    return None


@functools.cache
def cache_directory():
    """Return the directory of the libraries, which nobody else can write to."""
    chosen = os.environ.get("CUPY_SYNCBN_EMULATOR_CACHE")
    directory = Path(chosen or Path(tempfile.gettempdir(), f"cupy_syncbn_emulator_{os.getuid()}"))
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if directory.stat().st_uid != os.getuid():
        raise BuildError(f"{directory} belongs to another user: set CUPY_SYNCBN_EMULATOR_CACHE")
    return directory


def build_runtime():
    """Return the path of the runtime's library."""

    def commands(scratch):
        options = ("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-shared")
        yield [compiler(), *options, str(NATIVE / "runtime.cpp"), "-o", str(scratch), "-ldl"]

    return _build("runtime", ".so", (_native_text(), _compiler_version()), commands)


def build_kernels(code, names, options=(), mode="checked"):
    """Return the path of the library of the kernels `names` of the CUDA source `code`.

    Kernel number i of `names` is exported as ``emu_kernel_<i>``.
    """
    runtime = build_runtime()
    own = (*_COMMON, *MODES[mode])
    flags = (*own, *(f"-I{directory}" for directory in include_directories()))
    header = _precompiled_header(own, flags)
    exports = "".join(f"EMU_EXPORT({number}, {name})\n" for number, name in enumerate(names))
    text = f'#line 1 "kernels.cu"\n{prepass.rewrite(code)}\n#line 1 "exports"\n{exports}'

    def commands(scratch):
        # The line table calls the file by its name, whatever a #line at its top says.
        source, compiled = scratch.with_name("kernels.cu"), scratch.with_suffix(".o")
        source.write_text(text)
        compile_only = ("-include", str(header), "-x", "c++", "-c", str(source), "-o", str(compiled))
        yield [compiler(), *flags, *options, *compile_only]
        # Without the flags of the sanitizers, which would bring their libraries in. The hooks are found in
        # the runtime; one that is missing there is an error here.
        link = ("-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic", f"-Wl,-rpath,{runtime.parent}")
        yield [compiler(), *link, str(compiled), str(runtime), "-o", str(scratch)]

    return _build("kernels", ".so", (text, str(header), str(runtime), own, options), commands)


def build_all(requests, jobs=None):
    """Build several libraries at once; `requests` are arguments of `build_kernels`."""
    requests = list(requests)
    if not requests:
        return []
    build_runtime()
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda arguments: build_kernels(*arguments), requests))


def _precompiled_header(own, flags):
    """Return a header to include; beside it lies its compiled form, which g++ takes if it can.

    To read NVIDIA's headers takes longer than to compile a dozen kernels. Of these counts what they say, and
    not where they are, so that all environments with the same ones share the libraries.
    """
    text = (NATIVE / "cuda_on_cpu.h").read_text() + (NATIVE / "interface.h").read_text()

    def commands(scratch):
        yield [compiler(), *flags, "-x", "c++-header", str(NATIVE / "cuda_on_cpu.h"), "-o", str(scratch)]

    compiled = _build("header", ".h.gch", (text, _compiler_version(), own, _nvidia_text()), commands)
    header = compiled.with_suffix("")
    if not header.exists():
        temporary = header.with_name(f"{header.name}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(f'#include "{NATIVE / "cuda_on_cpu.h"}"\n')
        os.replace(temporary, header)
    return header


@functools.cache
def _nvidia_text():
    """Return the headers that are included directly: they tell the version of the rest."""
    found = [Path(directory, name) for name in _NEEDED_HEADERS for directory in include_directories()]
    return [path.read_text() for path in found if path.exists()]


def _compiler_version():
    return _version(compiler())


@functools.cache
def _version(command):
    return subprocess.run([command, "--version"], capture_output=True, text=True).stdout.splitlines()[0]


@functools.cache
def _native_text():
    return "".join(path.read_text() for path in sorted(NATIVE.iterdir()) if path.suffix in (".h", ".cpp"))


def _build(kind, suffix, ingredients, commands):
    """Return the file made of these ingredients; `commands(scratch)` make it at the path `scratch`."""
    recipe = Path(__file__).read_text()
    key = hashlib.sha256(repr((ingredients, recipe)).encode()).hexdigest()[:20]
    path = cache_directory() / f"{kind}-{key}{suffix}"
    if path.exists():
        return path
    with _locked(path.with_name(f"{kind}-{key}.lock")):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch_directory:
                scratch = Path(scratch_directory, f"built{suffix}")
                for command in commands(scratch):
                    _run(command)
                os.replace(scratch, path)
    return path


@contextlib.contextmanager
def _locked(path):
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"g++ failed: {' '.join(command)}\n{done.stderr[-6000:]}")
