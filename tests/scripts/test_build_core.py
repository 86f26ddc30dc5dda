"""scripts/build_core.py: what it compiles, what it keeps, and what comes of it without a compiler.

Most tests take a stand-in for the compiler, which writes down how it is called. One core is really compiled.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest

from support.launcher import REPOSITORY, clean_environment, finish

pytestmark = pytest.mark.mpi_skip

DEADLINE = 120

KERNELS = """
#include "../../formulas.h"
#define JOIN(level, element) kernel_##level##_##element
#define NAME(level, element) JOIN(level, element)
extern "C" double NAME(CORE_LEVEL, CORE_ELEMENT)(double x) { return twice(x); }
"""
MODULE = """
#include <Python.h>
#include <numpy/arrayobject.h>
extern "C" double kernel_baseline_float16(double);
static PyObject *levels(PyObject *, PyObject *) { return Py_BuildValue("{sO}", "baseline", Py_True); }
static PyObject *use(PyObject *, PyObject *) { return PyFloat_FromDouble(kernel_baseline_float16(2)); }
static PyObject *use_after_free(PyObject *, PyObject *) {
    volatile double *values = new double[4]();
    delete[] values;
    return PyFloat_FromDouble(values[2]);
}
static PyObject *overflow(PyObject *, PyObject *) {
    volatile int largest = 2147483647;
    return PyLong_FromLong(largest + 1);
}
static PyMethodDef methods[] = {
    {"levels", levels, METH_NOARGS, ""}, {"use", use, METH_O, ""}, {"overflow", overflow, METH_NOARGS, ""},
    {"use_after_free", use_after_free, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_core", "", -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__core() {
    import_array();
    PyObject *core = PyModule_Create(&definition);
    PyModule_AddStringConstant(core, "SOURCES", CORE_SOURCES);
    PyModule_AddStringConstant(core, "VERSION", CORE_VERSION);
    return core;
}
"""

# Writes its arguments down, and a file behind -o. A shell starts faster than Python, and calls are many.
COMPILER = r"""#!/bin/sh
case "$*" in
*--version*) echo "${{STAND_IN_VERSION:-stand-in 1.0}}"; exit ;;
*-dumpmachine*) echo "${{STAND_IN_MACHINE:-x86_64-linux-gnu}}"; exit ;;
esac
{failure}
line=$(printf '%s\037' "$@")
printf '%s\n' "$line" >> '{log}'
while [ "$1" != -o ]; do shift; done
echo "made by a stand-in" > "$2"
"""


def make_project(folder):
    """Make a copy of the project with a small core in place of its own, and return it."""
    for name in ("scripts", "cupy_syncbn"):
        ignored = (
            "__pycache__",
            "*.so",
            "core",
            "native.py",
            "formulas.h",
            "benchmarks",
            "examples",
            "figures",
        )
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns(*ignored))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(REPOSITORY / name, folder)
    backends = folder / "cupy_syncbn" / "backends"
    (backends / "cpu" / "core").mkdir()
    (backends / "formulas.h").write_text("inline double twice(double x) { return x + x; }\n")
    (backends / "cpu" / "core" / "kernels.cpp").write_text(KERNELS)
    (backends / "cpu" / "core" / "module.cpp").write_text(MODULE)
    (backends / "cpu" / "native.py").write_text('"""Stands for what calls the core."""\n')
    return folder


class Application:
    """Keeps what the hook shows."""

    def __init__(self):
        self.warnings = []
        self.display_warning = self.warnings.append


class Project:
    """A project with the stand-in for a compiler, and the script as a module."""

    def __init__(self, folder):
        self.folder, self.log = make_project(folder), folder / "log"
        self.core = folder / "cupy_syncbn" / "backends" / "cpu" / "core"
        self.placed = self.core.with_name("_core.abi3.so")
        self.compiler = str(folder / "stand-in")
        self.make_compiler()
        spec = importlib.util.spec_from_file_location("build_core", folder / "scripts" / "build_core.py")
        self.script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.script)

    def make_compiler(self, failure=""):
        Path(self.compiler).write_text(COMPILER.format(log=self.log, failure=failure))
        Path(self.compiler).chmod(0o755)

    def calls(self):
        """Return the calls of the compiler since the last time."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line.removesuffix("\x1f").split("\x1f") for line in lines]

    def initialize(self, version="standard"):
        """Run the hook as hatchling does; return what it changed, and its warnings."""
        hook = object.__new__(self.script.Core)
        hook.__dict__["_BuildHookInterface__app"] = hook.__dict__["app"] = app = Application()
        build_data = {"force_include": {}, "pure_python": True}
        hook.initialize(version, build_data)
        return build_data, app.warnings


@pytest.fixture
def project(tmp_path, monkeypatch):
    found = Project(tmp_path)
    for name in "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUPY_SYNCBN_REQUIRE_CORE":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", found.compiler)
    monkeypatch.setattr(found.script, "_LOAD", "")  # what the stand-in writes can be no library
    return found


def compiled(calls):
    return sorted(call[call.index("-c") + 1].rsplit("/")[-1] for call in calls if "-c" in call)


# ---- What is compiled ----
MARCH = {"baseline": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}


@pytest.mark.parametrize(
    ("machine", "levels"), [("x86_64-conda-linux-gnu", MARCH), ("aarch64-linux-gnu", {"baseline": []})]
)
def test_commands(project, monkeypatch, machine, levels):
    monkeypatch.setenv("STAND_IN_MACHINE", machine)
    monkeypatch.setenv("CXXFLAGS", "-O3 '-DTWO=1 2'")
    monkeypatch.setenv("CPPFLAGS", "-DONE")
    monkeypatch.setenv("LDFLAGS", "-Wl,-z,now")
    project.script.build()
    calls = project.calls()
    kernels = [call for call in calls if any(each.endswith("kernels.cpp") for each in call)]
    common = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
    expected = [
        [*common, "-Wno-psabi", *march, f"-DCORE_LEVEL={level}", f"-DCORE_ELEMENT={element}",
         "-DONE", "-O3", "-DTWO=1 2", "-c", "cupy_syncbn/backends/cpu/core/kernels.cpp", "-o"]
        for level, march in levels.items()
        for element in ("float16", "bfloat16", "float32", "float64")
    ]  # fmt: skip
    assert sorted(call[:-1] for call in kernels) == sorted(expected)
    (module,) = [call for call in calls if any(each.endswith("module.cpp") for each in call)]
    assert {"-DPy_LIMITED_API=0x030B0000", f"-I{numpy.get_include()}", "-ffp-contract=off"} <= set(module)
    assert f'-DCORE_SOURCES="{project.script._sources()["sources_hash"]()}"' in module
    assert f'-DCORE_VERSION="{project.script._version()}"' in module
    (link,) = [call for call in calls if "-shared" in call]
    assert len([each for each in link if each.endswith(".o")]) == len(kernels) + 1
    assert "-Wl,-z,now" in link
    assert len(calls) == len(kernels) + 2


def test_compiler_of_several_words(project, monkeypatch):
    monkeypatch.setenv("CXX", f"env LANG=C {project.compiler} -m64")
    project.script.build()
    assert all(call[0] == "-m64" for call in project.calls())


# ---- What is kept ----
def change(project, monkeypatch, what):
    if what == "nothing":
        return
    if what == "place of the headers":
        elsewhere = project.folder / "elsewhere"
        (elsewhere / "numpy").mkdir(parents=True)
        (elsewhere / "numpy" / "arrayobject.h").write_text("")
        monkeypatch.setattr(numpy, "get_include", lambda: str(elsewhere))
    elif what == "compiler":
        monkeypatch.setenv("STAND_IN_VERSION", "stand-in 2.0")
    elif what == "CXXFLAGS":
        monkeypatch.setenv("CXXFLAGS", "-g")
    elif what == "LDFLAGS":
        monkeypatch.setenv("LDFLAGS", "-g")
    elif what == "version":
        version = project.folder / "cupy_syncbn" / "_version.py"
        version.write_text('__version__ = "9.9"\n')
    else:
        path = project.core / what
        path.write_text(path.read_text() + "// changed\n" if path.exists() else "")


@pytest.mark.parametrize(
    ("what", "kernels", "module", "links"),
    [
        ("nothing", 0, 0, 0),
        ("place of the headers", 0, 0, 0),
        ("module.cpp", 0, 1, 1),
        ("version", 0, 1, 1),
        ("kernels.cpp", 12, 1, 1),
        ("../../formulas.h", 12, 1, 1),
        ("new.hpp", 12, 1, 1),
        ("CXXFLAGS", 12, 1, 1),
        ("compiler", 12, 1, 1),
        ("LDFLAGS", 0, 0, 1),
    ],
)
def test_what_is_unchanged_is_not_compiled_again(project, monkeypatch, what, kernels, module, links):
    before = project.script.build()
    project.calls()
    change(project, monkeypatch, what)
    after = project.script.build()
    calls = project.calls()
    assert compiled(calls) == ["kernels.cpp"] * kernels + ["module.cpp"] * module
    assert len([call for call in calls if "-shared" in call]) == links
    assert (before == after) == (what in ("nothing", "place of the headers"))


def test_two_builds_at_once(project):
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(project.script.build) for _ in range(3)]
        (path,) = {each.result() for each in futures}
    assert path.exists()
    names = [each.name.split("-", 1)[1] for each in project.script.CACHE.iterdir()]
    assert len(names) == len(set(names)) == 14  # and nothing that is half made


def test_what_is_old_goes(project):
    path = project.script.build()
    old, used = project.script.CACHE / "0000-kernels-v3-float32.o", path
    old.write_text("")
    killed = project.script.CACHE / "tmp_of_a_build_that_was_killed"
    killed.mkdir()
    for each in old, used, killed:
        os.utime(each, (time.time() - 30 * 86400,) * 2)
    for each in project.script.CACHE.iterdir():
        if each not in (old, used, killed):
            os.utime(each, (time.time() - 10 * 86400,) * 2)
    project.calls()
    project.script.build()
    assert not old.exists()
    assert not killed.exists()
    assert project.script.CACHE.joinpath(used.name).exists()
    assert compiled(project.calls()) == []


def test_tree_that_cannot_be_written_to(project):
    (project.folder / "build").write_text("a file, where the folder should be")
    project.placed.mkdir()  # and nothing can take its place
    build_data, warnings = project.initialize()
    (source,) = build_data["force_include"]
    assert Path(source).exists()
    assert not build_data["pure_python"]
    assert warnings == []
    build_data, warnings = project.initialize("editable")
    assert "cannot be written to" in warnings[0]


# ---- The hook ----
def test_wheel(project):
    build_data, warnings = project.initialize()
    ((source, target),) = build_data["force_include"].items()
    assert Path(source).read_bytes() == project.placed.read_bytes()
    assert target == "cupy_syncbn/backends/cpu/_core.abi3.so"
    assert not build_data["pure_python"]
    assert build_data["tag"] == f"cp311-abi3-{sysconfig.get_platform().replace('-', '_')}"
    assert warnings == []


def test_editable(project):
    assert project.initialize("editable") == ({"force_include": {}, "pure_python": True}, [])
    first = project.placed.stat().st_ino
    project.initialize("editable")
    assert project.placed.stat().st_ino != first  # a process that has it loaded keeps the old one
    assert sorted(each.name for each in project.placed.parent.glob("_core*.so")) == [project.placed.name]


def no_compiler(project, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(project.core))
    return "none of c++, g++ and clang++ is on the PATH"


def wrong_compiler(project, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    return "no-such-compiler cannot be run"


def failing_compiler(project, monkeypatch):
    project.make_compiler("case $* in *CORE_LEVEL=v4*) echo bad value for -march >&2; exit 1 ;; esac")
    return "bad value for -march"


def broken_library(project, monkeypatch):
    monkeypatch.setattr(project.script, "_LOAD", "raise ImportError('undefined symbol')")
    return "undefined symbol"


def no_python_header(project, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(project.core)})
    return "Python.h is not in"


def no_numpy(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    return "NumPy's headers are needed"


def no_numpy_headers(project, monkeypatch):
    monkeypatch.setattr(numpy, "get_include", lambda: str(project.core))
    return "has not the headers of NumPy 2"


def old_numpy(project, monkeypatch):
    monkeypatch.setattr(numpy, "__version__", "1.26.4")
    return "NumPy 1.26.4"


def free_threaded(project, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": 1}.get)
    return "a free-threaded one"


def another_python(project, monkeypatch):
    monkeypatch.setattr(sys, "implementation", types.SimpleNamespace(name="pypy"))
    return "this is pypy"


def another_system(project, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    return "this is darwin"


def no_sources(project, monkeypatch):
    shutil.rmtree(project.core)
    return "there are no sources in"


LACKS = [
    no_compiler, wrong_compiler, failing_compiler, broken_library, no_python_header, no_numpy,
    no_numpy_headers, old_numpy, free_threaded, another_python, another_system, no_sources,
]  # fmt: skip


@pytest.mark.parametrize("version", ["standard", "editable"])
@pytest.mark.parametrize("lack", LACKS)
def test_without_a_core_the_wheel_is_pure(project, monkeypatch, lack, version):
    project.placed.write_text("an old one, which is not to be shipped")
    words = lack(project, monkeypatch)
    build_data, (warning,) = project.initialize(version)
    assert build_data == {"force_include": {}, "pure_python": True}
    assert words in warning
    assert "NumPy will compute" in warning
    monkeypatch.setenv("CUPY_SYNCBN_REQUIRE_CORE", "1")
    with pytest.raises(project.script.CannotBuildError) as caught:
        project.initialize(version)
    assert words in str(caught.value)


# ---- A core that is really compiled ----
@pytest.fixture(scope="session")
def compiled_project(tmp_path_factory):
    """Return a project whose core has been compiled in place."""
    if not shutil.which("g++"):
        pytest.skip("compiles, and there is no g++")
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        pytest.skip("compiles an extension, and there is no Python.h")
    folder = make_project(tmp_path_factory.mktemp("compiled"))
    status, output = start(folder, "scripts/build_core.py")
    assert status == 0, output
    assert "_core.abi3.so, in " in output
    return folder


def start(folder, *arguments, **variables):
    """Run Python in a folder; return the exit status and the output."""
    environment = clean_environment(PYTHONPATH=str(folder), CXX="g++", CUPY_SYNCBN_ISA="")
    for name in "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUPY_SYNCBN_REQUIRE_CORE":
        environment.pop(name, None)
    command = [sys.executable, *arguments]
    done = finish(command, DEADLINE, cwd=folder, env=environment | variables, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


TELL = "from cupy_syncbn.backends.cpu import loading; print(loading.status(), loading.__file__)"


def test_in_place(compiled_project):
    status, output = start(compiled_project, "-c", TELL, CUPY_SYNCBN_REQUIRE_CORE="1")
    assert (status, output.split(" /")[0]) == (0, "compiled core, baseline")


def test_core_that_is_older_than_its_sources(compiled_project, tmp_path):
    """Of a clone that has been changed."""
    copy = shutil.copytree(compiled_project, tmp_path / "changed")
    header = copy / "cupy_syncbn" / "backends" / "formulas.h"
    header.write_text(header.read_text() + "\n")
    status, output = start(copy, "-c", TELL)
    assert status == 0, output
    assert "NumPy, since the compiled core was built from other sources" in output
    status, output = start(copy, "-c", TELL, CUPY_SYNCBN_REQUIRE_CORE="1")
    assert status == 1
    assert "ImportError: CUPY_SYNCBN_REQUIRE_CORE is set" in output


@pytest.mark.parametrize(
    ("mistake", "words"),
    [("use_after_free", "heap-use-after-free"), ("overflow", "signed integer overflow"), ("levels", "")],
)
def test_sanitizers(compiled_project, mistake, words):
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout
    if not os.path.isabs(found.strip()):
        pytest.skip("compiles with sanitizers, and g++ has no libasan.so")
    command = [sys.executable, "scripts/build_core.py", "--sanitize"]
    done = finish(command, DEADLINE, cwd=compiled_project, env=clean_environment(CXX="g++"))
    assert done.returncode == 0, done.stderr
    variables = dict(each.split("=", 1) for each in done.stdout.split())
    code = f"from cupy_syncbn.backends.cpu.loading import core; core().{mistake}(); print(core().__file__)"
    status, output = start(compiled_project, "-c", code, **variables)
    assert (status == 0) == (mistake == "levels"), output
    assert words in output
    if status == 0:
        assert "/build/sanitized/cupy_syncbn/" in output


def build_wheel(folder, target, **variables):
    """Build a wheel; return its name, and its files by their names."""
    pytest.importorskip("hatchling", reason="builds wheels, and hatchling is not installed")
    command = ("-m", "hatchling", "build", "--target", "wheel", "--directory", str(target))
    status, output = start(folder, *command, **variables)
    assert status == 0, output
    (path,) = target.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(target / "installed")
        return path.name, {name: archive.read(name) for name in archive.namelist()}, output


def test_wheels(compiled_project, tmp_path):
    name, files, _ = build_wheel(compiled_project, tmp_path / "core", CUPY_SYNCBN_REQUIRE_CORE="1")
    assert name.endswith(f"-cp311-abi3-{sysconfig.get_platform().replace('-', '_')}.whl")
    extension = "cupy_syncbn/backends/cpu/_core.abi3.so"
    sources = {
        f"cupy_syncbn/backends/{each}"
        for each in ("formulas.h", "cpu/core/kernels.cpp", "cpu/core/module.cpp")
    }
    assert sources < set(files)
    assert files[extension] == (compiled_project / extension).read_bytes()
    (metadata,) = [text.decode() for each, text in files.items() if each.endswith("/WHEEL")]
    assert "Root-Is-Purelib: false" in metadata
    assert "Tag: cp311-abi3-" in metadata
    status, output = start(tmp_path / "core" / "installed", "-c", TELL, CUPY_SYNCBN_REQUIRE_CORE="1")
    assert (status, output.split(" /")[0]) == (0, "compiled core, baseline"), output

    (compiled_project / ".gitignore").unlink()  # even if nothing else keeps the old library out
    name, files, output = build_wheel(compiled_project, tmp_path / "pure", CXX="false")
    assert name.endswith("-py3-none-any.whl")
    assert "NumPy will compute on CPUs, without the compiled core: status 1 of false" in output
    assert sources < set(files)
    assert not [each for each in files if each.endswith(".so")]
    (metadata,) = [text.decode() for each, text in files.items() if each.endswith("/WHEEL")]
    assert "Root-Is-Purelib: true" in metadata
    status, output = start(tmp_path / "pure" / "installed", "-m", "cupy_syncbn")
    assert status == 0, output
    assert "CPU:   NumPy, since the compiled core was not built with this installation" in output
