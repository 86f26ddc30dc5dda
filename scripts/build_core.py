"""Compile the CPU core: hatchling's build hook, and a command that builds it in place.

    python scripts/build_core.py                 # beside the sources, as `pip install --editable .` does
    env $(python scripts/build_core.py --sanitize) python -m pytest tests/backends/cpu

The second makes a copy of the package in build/sanitized with AddressSanitizer and UndefinedBehaviorSanitizer
in the core, and prints the variables under which Python takes that one. It needs g++. CXX, CXXFLAGS, CPPFLAGS
and LDFLAGS are honoured. What is compiled is kept in build/core, under the hash of all that goes into it.

Without a compiler, or something else that it needs, the hook makes a wheel of Python alone, and warns. With
CUPY_SYNCBN_REQUIRE_CORE=1 that is an error.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # only a build needs it, not the command
    BuildHookInterface = object

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cupy_syncbn"
CORE = "cupy_syncbn/backends/cpu/core"
EXTENSION = "cupy_syncbn/backends/cpu/_core.abi3.so"
CACHE = ROOT / "build" / "core"
SANITIZED = ROOT / "build" / "sanitized"
KEPT_DAYS = 14
"""Files that no build has used for longer are deleted."""

ELEMENTS = ("float16", "bfloat16", "float32", "float64")
LEVELS = {"baseline": (), "v3": ("-march=x86-64-v3",), "v4": ("-march=x86-64-v4",)}
OPTIONS = (
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra",
    "-Wno-psabi",
)  # fmt: skip
LIMITED_API = "0x030B0000"
"""CPython 3.11's: what the tag of the wheel says."""
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

# Loads an extension as what it is to be, and shows the levels that run here.
_LOAD = """
import sys, numpy
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
name, path, *expected = "cupy_syncbn.backends.cpu._core", *sys.argv[1:]
spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, path))
core = module_from_spec(spec)
spec.loader.exec_module(core)
assert [core.SOURCES, core.VERSION] == expected, [core.SOURCES, core.VERSION]
print(*(level for level, runs in core.levels().items() if runs))
"""


class CannotBuildError(Exception):
    """The reason why no core can be built here."""


# ---- What is compiled, and by what ----
class Compiler(NamedTuple):
    """A C++ compiler, with the options of the environment."""

    command: tuple[str, ...]
    version: str
    machine: str
    """What it compiles for, such as x86_64."""
    options: tuple[str, ...]
    """CPPFLAGS and CXXFLAGS, and those of the sanitizers."""
    link_options: tuple[str, ...]


class Compilation(NamedTuple):
    """One object of the core."""

    name: str
    source: str
    options: tuple[str, ...]
    headers: dict[str, str]
    """Folders of headers from elsewhere, and the versions that stand for what lies there."""

    def command(self, compiler: Compiler, target: Path | str) -> list[str]:
        """Return the command that makes the object, in the root of the project."""
        own = (*OPTIONS, *self.options, *(f"-I{folder}" for folder in self.headers))
        return [*compiler.command, *own, *compiler.options, "-c", self.source, "-o", str(target)]


def find_compiler(sanitize: bool = False) -> Compiler:
    """Return the compiler: CXX, or the first of the usual names; raise CannotBuildError if there is none."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    command = chosen or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not command:
        raise CannotBuildError("there is no C++ compiler: none of c++, g++ and clang++ is on the PATH")
    version, machine = (_run([*command, option]) for option in ("--version", "-dumpmachine"))
    cpp, cxx, link = (shlex.split(os.environ.get(name, "")) for name in ("CPPFLAGS", "CXXFLAGS", "LDFLAGS"))
    extra = ("-O1", "-g", "-fno-omit-frame-pointer", *SANITIZERS) if sanitize else ()
    link_extra = SANITIZERS if sanitize else ()
    return Compiler(
        tuple(command),
        version,
        machine.strip().split("-")[0],
        (*cpp, *cxx, *extra),
        (*cxx, *link, *link_extra),
    )


def kernel_compilations(machine: str, sanitize: bool = False) -> list[Compilation]:
    """Return the objects of kernels.cpp for a machine; they take no headers of Python or NumPy.

    With sanitizers, which take as long to compile again, one level is enough: they differ in few lines.
    """
    levels = LEVELS if machine == "x86_64" and not sanitize else {"baseline": ()}
    return [
        Compilation(
            f"kernels-{level}-{element}",
            f"{CORE}/kernels.cpp",
            (*options, f"-DCORE_LEVEL={level}", f"-DCORE_ELEMENT={element}"),
            {},
        )
        for element in ELEMENTS
        for level, options in levels.items()
    ]


def module_compilation() -> Compilation:
    """Return the object of module.cpp; raise CannotBuildError if this Python cannot take it."""
    if sys.platform != "linux":
        raise CannotBuildError(f"the core is made for Linux, and this is {sys.platform}")
    if sys.implementation.name != "cpython":
        raise CannotBuildError(f"the core is made for CPython, and this is {sys.implementation.name}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise CannotBuildError("this Python is a free-threaded one, for which there is no stable ABI")
    python = sysconfig.get_paths()["include"]
    if not Path(python, "Python.h").is_file():
        raise CannotBuildError(f"Python.h is not in {python}: Debian has it in python3-dev")
    try:
        import numpy
    except ImportError as error:
        raise CannotBuildError(f"NumPy's headers are needed: {error}") from None
    found = numpy.get_include()
    if not Path(found, "numpy", "arrayobject.h").is_file() or int(numpy.__version__.split(".")[0]) < 2:
        raise CannotBuildError(f"NumPy {numpy.__version__} in {found} has not the headers of NumPy 2")
    macros = {
        "Py_LIMITED_API": LIMITED_API,
        "CORE_SOURCES": f'"{_sources()["sources_hash"]()}"',
        "CORE_VERSION": f'"{_version()}"',
    }
    options = tuple(f"-D{name}={value}" for name, value in macros.items())
    headers = {python: f"Python {sys.version}", found: f"NumPy {numpy.__version__}"}
    return Compilation("module", f"{CORE}/module.cpp", options, headers)


# The package cannot be imported while it is built: these files of it can be run.
def _version() -> str:
    return str(runpy.run_path(str(PACKAGE / "_version.py"))["__version__"])


def _sources() -> dict[str, Any]:
    return runpy.run_path(str(PACKAGE / "backends" / "cpu" / "sources.py"))


# ---- The build ----
def build(sanitize: bool = False) -> Path:
    """Return the extension in the cache, compiled as far as it has to be.

    Raises
    ------
    CannotBuildError
        If anything is missing, or fails.
    """
    sources = _sources()["sources"]()
    if not sources:
        raise CannotBuildError(f"there are no sources in {CORE}")
    module, compiler, cache = module_compilation(), find_compiler(sanitize), _cache()
    kernels = kernel_compilations(compiler.machine, sanitize)
    if len(kernels) == len(ELEMENTS):
        module = module._replace(options=(*module.options, "-DCORE_ONE_LEVEL"))
    objects_wanted = [*kernels, module]
    # module.cpp has the hash of all sources in its options; the kernels do not depend on it.
    contents = [(path.name, path.read_bytes()) for path in sources if path.name != "module.cpp"]

    def compiled(compilation: Compilation) -> Path:
        # Where headers from elsewhere lie does not count: pip unpacks NumPy into a new folder for each build.
        options = compilation._replace(headers={}).command(compiler, "")
        versions = sorted(compilation.headers.values())
        key = (options, versions, compiler.version, contents)
        return _made(cache, f"{compilation.name}.o", key, lambda o: _run(compilation.command(compiler, o)))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        pending = [pool.submit(compiled, each) for each in objects_wanted]
        try:
            objects = [each.result() for each in pending]
        finally:  # one that fails is the end of all
            pool.shutdown(cancel_futures=True)

    def link(target: Path) -> None:
        _run([*compiler.command, "-shared", *map(str, objects), *compiler.link_options, "-o", str(target)])
        variables = sanitizer_variables(compiler) if sanitize else {}
        _run([sys.executable, "-c", _LOAD, str(target), _sources()["sources_hash"](), _version()], variables)

    key = ([path.name for path in objects], compiler)
    return _made(cache, "_core.abi3.so", key, link)


def _made(cache: Path, name: str, key: object, make: Callable[[Path], object]) -> Path:
    """Return the file of the cache that is made by `make` from all that is in `key`.

    It gets its name when it is complete, so that builds at the same time do not disturb each other.
    """
    path = cache / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:20]}-{name}"
    if path.exists():
        path.touch()
        return path
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        target = Path(scratch, name)
        make(target)
        target.replace(path)
    return path


def _cache() -> Path:
    """Return the folder of what is kept, without what is old; a temporary one if the tree is read-only."""
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=CACHE).close()
    except OSError:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # the wheel is written before
        return Path(folder)
    oldest = time.time() - KEPT_DAYS * 86400
    for path in CACHE.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another build deletes as well
            if path.stat().st_mtime >= oldest:
                continue
            if path.is_dir():  # of a build that was killed
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    return CACHE


def _run(command: Sequence[str], variables: dict[str, str] | None = None) -> str:
    """Run a command in the root of the project, and return its output; pass its warnings on."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=os.environ | (variables or {}),
        )
    except OSError as error:
        raise CannotBuildError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        raise CannotBuildError(f"status {done.returncode} of {shlex.join(command)}\n{done.stderr[:4000]}")
    if done.stderr:
        print(done.stderr, end="", file=sys.stderr)
    return done.stdout


def place(extension: Path, package: Path = PACKAGE) -> Path:
    """Put the extension into a package: beside the old one first, which processes may have loaded."""
    target = package.parent / EXTENSION
    beside = target.with_suffix(f".{os.getpid()}")
    try:
        shutil.copy(extension, beside)
        beside.replace(target)
    except OSError as error:
        raise CannotBuildError(f"{target.parent} cannot be written to: {error}") from None
    return target


def is_required() -> bool:
    """Tell whether a build without the core is an error."""
    return os.environ.get("CUPY_SYNCBN_REQUIRE_CORE") == "1"


class Core(BuildHookInterface):  # type: ignore[misc, valid-type]
    """Hatchling's hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the core, and make the wheel one of this platform; or leave it one of Python alone."""
        try:
            extension = build()
            # Who has installed the package, and starts Python in the clone, imports the one there.
            with contextlib.nullcontext() if version == "editable" else contextlib.suppress(CannotBuildError):
                place(extension)
        except CannotBuildError as error:
            if is_required():
                raise
            self.app.display_warning(f"NumPy will compute on CPUs, without the compiled core: {error}")
            return
        if version == "standard":
            build_data["force_include"][str(extension)] = EXTENSION
            build_data["pure_python"] = False
            build_data["tag"] = f"cp311-abi3-{_platform()}"


def _platform() -> str:
    from packaging.tags import platform_tags  # hatchling's

    return next(each for each in platform_tags() if not each.startswith(("manylinux", "musllinux")))


# ---- The command ----
def sanitizer_variables(compiler: Compiler) -> dict[str, str]:
    """Return the variables under which Python can load what has sanitizers; g++ has them as libraries."""
    # They come first of all libraries; that of C++ with them, whose exceptions they watch.
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    libraries = [_run([*compiler.command, f"-print-file-name={name}"]).strip() for name in names]
    if not all(os.path.isabs(each) for each in libraries):
        raise CannotBuildError(f"{compiler.command[0]} has not all of {', '.join(names)}: use g++ for them")
    return {
        "LD_PRELOAD": ":".join(map(os.path.realpath, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


def main() -> int:
    """Build in place, or a copy with sanitizers; return the exit status."""
    parser = argparse.ArgumentParser(description="Compile the CPU core beside its sources.")
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="build a copy of the package with sanitizers, print its variables",
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        extension = build(arguments.sanitize)
        if not arguments.sanitize:
            print(f"{place(extension)}, in {time.monotonic() - start:.1f} s")
            return 0
        package = SANITIZED / PACKAGE.name
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        place(extension, package)
        path = os.pathsep.join(filter(None, (str(SANITIZED), os.environ.get("PYTHONPATH"))))
        variables = sanitizer_variables(find_compiler()) | {
            "PYTHONPATH": path,
            "PYTHONSAFEPATH": "1",  # else `python -m` takes the package in the current folder
            "CUPY_SYNCBN_REQUIRE_CORE": "1",
        }
        print(shlex.join(f"{name}={value}" for name, value in variables.items()))
    except CannotBuildError as error:
        print(f"the core cannot be built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
