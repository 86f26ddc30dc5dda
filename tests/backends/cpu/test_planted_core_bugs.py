"""Bugs planted in the sources of the compiled core, one at a time: the tests of test_core.py find each.

A core is compiled for one type of elements and one level, without optimization, in half the time, and
tested in a process of its own, since a stray access ends it.
"""

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from planted import FOUND

from cupy_syncbn.backends.cpu import loading
from support.launcher import REPOSITORY, TESTS, clean_environment, finish

pytestmark = pytest.mark.mpi_skip

DEADLINE = 600
BACKENDS = Path("cupy_syncbn", "backends")
CORE = BACKENDS / "cpu" / "core"

if loading.choice().core is None:
    pytest.skip(f"the compiled core {loading.choice().why_none}", allow_module_level=True)

spec = importlib.util.spec_from_file_location("build_core", REPOSITORY / "scripts" / "build_core.py")
build_core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_core)


# ---- Bugs ----


class Bug(NamedTuple):
    """`old` is there once in `file`, and becomes `new`; `check`, a test of test_core.py, is to find it."""

    file: str
    old: str
    new: str
    dtype: str = "float32"
    check: str = "test_drawn_cases"
    level: str = "baseline"


LARGE = "test_large_outputs"
EDGES = "test_edges_of_memory"
TINY = "test_tiny_tensors"
PIECES = "test_edges_of_pieces"
ONE_WAY = "test_sums_of_what_rounds_one_way"
ZEROS = "test_zeros_before_the_activation"
SQUARES = "test_squares_beyond_float32"
PRODUCTS = "test_products_beyond_float32"
FAR_OFF = "test_a_guess_of_the_pivot_that_is_far_off"
NOT_FINITE = "test_running_statistics_that_are_not_finite"
LEAKS = "test_calls_leave_nothing_behind"
BITS = "test_every_16_bits_at_every_level"
NANS = "test_parameters_that_are_nan"

BUGS = {
    # Sums
    "a tail of a row is counted twice": Bug(
        "lanes.hpp", "lane >= static_cast<Integer>(which.skipped)", "lane >= 0", "float16"
    ),
    "a tail of a row is left out": Bug("lanes.hpp", "if (i < n) body(n - W, From{W - (n - i)});", ""),
    "a lane is added twice, and another not": Bug(
        "lanes.hpp", "{lanes[0], lanes[1], lanes[2], lanes[3]}", "{lanes[0], lanes[1], lanes[2], lanes[2]}"
    ),
    "long chains of a row": Bug("walk.hpp", "CHUNK = 512;", "CHUNK = 1 << 20;", check=ONE_WAY),
    "long chains of a column": Bug("walk.hpp", "GROUP = 16;", "GROUP = 1 << 20;", check=ONE_WAY),
    "the last row, which is not whole, is not added up": Bug(
        "walk.hpp", "rows = walk.rows + (tile < walk.rest);", "rows = walk.rows;"
    ),
    "an element beyond pairs of a column is left out": Bug(
        "walk.hpp", "if (i < end) {\n                s[0] += sum[i];", "if (i < end) {", "bfloat16"
    ),
    "one of four rows is left out": Bug(
        "walk.hpp", "(a[2] + a[3]), (a[0] * b[0]", "(a[2] + a[2]), (a[0] * b[0]"
    ),
    "no sum of squares beyond float32": Bug(
        "kernels.cpp", "is_far || !std::isfinite(square)", "is_far", check=SQUARES
    ),
    "no sum of products beyond float32": Bug(
        "kernels.cpp", "!std::isfinite(task.sum[c]) || !std::isfinite(task.product[c])", "false"
    ),
    "no second look at a pivot that is far away": Bug("kernels.cpp", "if (is_far || ", "if (", check=FAR_OFF),
    "a pivot that is not rounded to the accumulator's type": Bug(
        "kernels.cpp", "static_cast<double>(static_cast<A>(mean)) : 0", "mean : 0"
    ),
    "a pivot of 24 bits": Bug(
        "formulas.h", "2199023255553.0);  // 2^41", "536870913.0);  // 2^29", "float64"
    ),
    "a wrong way from the shift to the pivot": Bug(
        "formulas.h", "rest * (2 * sum + n * rest);", "rest * (2 * sum - n * rest);"
    ),
    "a wrong way to the mean of all ranks": Bug(
        "formulas.h",
        "square - distance * (2 * sum - n * distance)",
        "square - distance * (2 * sum)",
        "float64",
    ),
    "a count too many": Bug("module.cpp", "vector[4 * C] = n;", "vector[4 * C] = n + 1;"),
    # Channels
    "samples for channels in rows": Bug(
        "walk.hpp", "i64 c = start % shape.C;", "i64 c = start / shape.C % shape.C;"
    ),
    "samples for channels in columns": Bug(
        "walk.hpp",
        "left = shape.S - first % shape.S;\n        if (shape.S == 1)\n",
        "left = shape.S;\n        if (shape.S == 1)\n",
    ),
    "a row of the wrong channel at the end of a tile": Bug(
        "walk.hpp",
        "++i) values[i] = static_cast<A>(constants[c]);",
        "++i) values[i] = static_cast<A>(constants[c - (i == n - 1 && c)]);",
    ),
    # Memory
    "a whole vector is written in a short row": Bug(
        "kernels.cpp", "std::memcpy(to, y, n * sizeof(T));", "std::memcpy(to, y, sizeof y);", "float64", TINY
    ),
    "a whole vector is read in a short row": Bug(
        "kernels.cpp",
        "y[W];\n        std::memcpy(x, from, n * sizeof(T));",
        "y[W];\n        std::memcpy(x, from, sizeof x);",
        check=TINY,
    ),
    "a last piece is shorter than a vector": Bug(
        "walk.hpp", "end < width && width - end < 8 ? end - 8 : end", "end", check=PIECES
    ),
    "the guess of a pivot reads behind the data": Bug(
        "kernels.cpp", "((N - 1) * C + c) * S + S / 2", "((N - 1) * C + c) * S + S - 1", check=EDGES
    ),
    "y over x: the last vector is read after it was written": Bug(
        "kernels.cpp", " : last[k];", " : load(from + k * stride + i, All{});"
    ),
    "whole lines are stored beyond the end": Bug(
        "walk.hpp", "to + LINE <= end; to += LINE", "to < end; to += LINE", "float16", LARGE
    ),
    "the first bytes before a whole line are not stored": Bug(
        "walk.hpp", "std::memcpy(to, from, head);", "", "bfloat16", LARGE
    ),
    "lines are stored where they do not begin": Bug(
        "walk.hpp", "(-reinterpret_cast<uintptr_t>(to) % LINE, end - to)", "(0, end - to)", check=LARGE
    ),
    "what is left in the buffer is not stored": Bug(
        "walk.hpp", "        copy(used_);\n", "", "float64", LARGE
    ),
    "what was kept of a line is taken from the buffer's front": Bug(
        "walk.hpp", "std::memmove(buffer_, buffer_ + copied, kept * sizeof(T));", "", check=LARGE
    ),
    "the last row, which is not whole, is not written": Bug(
        "walk.hpp", "if (tile < walk.rest)\n", "if (false)\n", "bfloat16"
    ),
    "the last rows of a piece are not written": Bug(
        "walk.hpp", "row < stop; ++row)\n                job.", "row < stop - 1; ++row)\n                job."
    ),
    # Masks
    "a mask's rows are a byte short": Bug(
        "walk.hpp", "mask_width = (width + 7) / 8;", "mask_width = width / 8;"
    ),
    "a mask's bit is that of the element before": Bug(
        "lanes.hpp", "static_cast<int32_t>(bits >> shift)", "static_cast<int32_t>(bits << 1 >> shift)"
    ),
    "bits of the next byte of a mask are not looked at": Bug(
        "lanes.hpp", "shift + W > 8 ?", "false ?", "float16"
    ),
    "the second half of a byte takes the place of the first": Bug(
        "lanes.hpp", "mask[i / 8] |= bits << 4;", "mask[i / 8] = bits << 4;", "float64"
    ),
    "bits of lanes that do not count are written": Bug("lanes.hpp", "    bits >>= which.skipped;\n", ""),
    # Elements
    "float16 rounds ties away from zero": Bug("lanes.hpp", "0xFFF + ((body >> 13) & 1)", "0x1000", "float16"),
    "float16 rounds to zero": Bug(
        "lanes.hpp", "_mm256_cvtps_ph((__m256)v, 0)", "_mm256_cvtps_ph((__m256)v, 3)", "float16", level="v3"
    ),
    "float16 has no subnormals": Bug(
        "lanes.hpp", "(subnormal & is_small) |", "(subnormal & is_small & 0) |", "float16", BITS
    ),
    "a NaN of float16 becomes infinity": Bug(
        "lanes.hpp", "(is_nan & (0x0200u | ((body >> 13) & 0x3FF)))", "(is_nan & 0)", "float16", BITS
    ),
    "bfloat16 rounds ties away from zero": Bug(
        "lanes.hpp", "0x7FFF + ((bits >> 16) & 1)", "0x8000 + (bits & 0)", "bfloat16", level="v3"
    ),
    "a NaN of bfloat16 becomes zero": Bug("lanes.hpp", "(half & is_number)", "half", "bfloat16", NANS),
    "ReLU blocks NaN": Bug("formulas.h", "        return value <= 0;", "        return !(value > 0);"),
    "ReLU lets the gradient through at zero": Bug(
        "formulas.h", "        return value <= 0;", "        return value < 0;", "float16", ZEROS
    ),
    "the leaky ReLU's slope at zero is one": Bug(
        "formulas.h", "return !(value > 0);", "return value < 0;", check=ZEROS
    ),
    "ReLU multiplies by zero": Bug(
        "formulas.h", "blocked ? zero : value;", "blocked ? zero * value : value;"
    ),
    "dresidual is of the first of four rows": Bug(
        "kernels.cpp",
        "store(dresidual + line + i, g, which);",
        "store(dresidual + i, g, which);",
        check=PIECES,
    ),
    "dresidual is the gradient before the activation": Bug(
        "kernels.cpp",
        "store(dresidual + line + i, g, which);",
        "store(dresidual + line + i, load(static_cast<const T*>(this->task.dy) + at + i, which), which);",
    ),
    "the residual is not added": Bug(
        "kernels.cpp", "value += load(residual + k * stride + i, which);", "(void)residual;", "bfloat16"
    ),
    "the mean's share of the gradient is dropped": Bug(
        "formulas.h", "* factor + constant)) * scale;", "* factor)) * scale;", "float64"
    ),
    "16 bits round the product with the slope twice": Bug(
        "module.cpp", "PyArray_ITEMSIZE(x.array) > 2", "PyArray_ITEMSIZE(x.array) > 1", "float16"
    ),
    # In place
    "a weight close to zero is used": Bug("module.cpp", "weights[c] = invertible(weights[c]);", "(void)c;"),
    "a weight close to zero loses its sign": Bug("formulas.h", "copysign(least, weight)", "least", "float64"),
    "y is not inverted": Bug("formulas.h", "(y > 0 ? one : inverse_slope)", "one", "float16"),
    "the mean of z is that of x": Bug("module.cpp", "saved.mean[c] = biases[c];", "(void)c;"),
    "the weight of z is that of x": Bug("module.cpp", "saved.invstd[c] = 1 / weights[c];", "", "bfloat16"),
    "dx over dy: the last vector is read after it was written": Bug(
        "kernels.cpp", " : last[k], value{};", " : load(dy + k * stride + i, All{}), value{};"
    ),
    "products beyond float32 are of y": Bug(
        "kernels.cpp", "value = before_leaky_relu(value, 1 / slope);", "", check=PRODUCTS
    ),
    # Channels' values
    "the variance of running_var is biased": Bug(
        "formulas.h", "return var * (count / fmax(count - 1, 1.0));", "(void)count; return var;"
    ),
    "an infinity in a running statistic stays": Bug(
        "formulas.h",
        "return keep == 0 ? value : keep * old_value + momentum * value;",
        "return keep * old_value + momentum * value;",
        check=NOT_FINITE,
    ),
    "a NaN of a variance becomes zero": Bug(
        "formulas.h", "(m2 < 0 ? 0 : m2)", "(m2 > 0 ? m2 : 0)", check=NOT_FINITE
    ),
    "gradients of parameters are not scaled": Bug(
        "module.cpp", "dbias[c] = of_parameters[c] * by;", "dbias[c] = of_parameters[c];", "float64"
    ),
    "strides of parameters are forgotten": Bug(
        "module.cpp",
        "to[c] = *reinterpret_cast<const float*>(at);",
        "to[c] = reinterpret_cast<float*>(from.data())[c];",
        check="test_views_of_channels",
    ),
    # Memory of a call
    "a reference to a result is kept": Bug(
        "module.cpp",
        "return Reference(PyTuple_Pack(2, result.get(), sums.get()));",
        "Py_INCREF(sums.get()); return Reference(PyTuple_Pack(2, result.get(), sums.get()));",
        check=LEAKS,
    ),
    "a reference to an argument is kept where another is wrong": Bug(
        "module.cpp",
        "return PyTuple_GetItem(tuple, i);",
        "return Py_XNewRef(PyTuple_GetItem(tuple, i));",
        check=LEAKS,
    ),
    "a reference is kept by an error": Bug(
        "module.cpp",
        "~Reference() { Py_XDECREF(object_); }",
        "~Reference() { if (!PyErr_Occurred()) Py_XDECREF(object_); }",
        check=LEAKS,
    ),
}

USUAL = ("a mask's rows are a byte short", "y over x: the last vector is read after it was written")
"""What is run without `pytest -m long`."""


# ---- Compiling and testing ----

# Stands for the types that are not compiled.
OTHERS = """
#include "walk.hpp"
namespace core {
#define NOTHING(element)                                                   \\
    extern const Passes passes_baseline_##element __attribute__((weak)); \\
    const Passes passes_baseline_##element{};
NOTHING(float16)
NOTHING(bfloat16)
NOTHING(float32)
NOTHING(float64)
}  // namespace core
"""


def plant(text, bug):
    """Return the text of a file with a bug."""
    if text.count(bug.old) != 1:
        raise LookupError(f"{bug.old!r} is {text.count(bug.old)} times in {bug.file}: update this test")
    return text.replace(bug.old, bug.new)


def source_of(bug, root=REPOSITORY):
    return root / (BACKENDS if bug.file == "formulas.h" else CORE) / bug.file


class Workshop:
    """Compiles cores of one type and level, as they are or with a bug, and tests them."""

    def __init__(self, compiler, folder):
        self._compiler, self._folder = compiler, folder
        self._unchanged = self._sources("unchanged")

    def _sources(self, name, bug=None):
        """Return a folder with the sources, as they lie in the project."""
        folder = self._folder / name.replace("/", " ")
        shutil.copytree(REPOSITORY / CORE, folder / CORE, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / BACKENDS / "formulas.h", folder / BACKENDS)
        (folder / CORE / "others.cpp").write_text(OTHERS)
        if bug is not None:
            file = source_of(bug, folder)
            file.write_text(plant(file.read_text(), bug))
        return folder

    def _object(self, folder, compilation):
        target = folder / f"{compilation.name}.o"
        if not target.exists():
            self._run(compilation.command(self._compiler, target), folder)
        return target

    def _run(self, command, folder):
        done = finish(command, DEADLINE, cwd=folder)
        assert done.returncode == 0, f"{command}:\n{done.stderr[:4000]}"

    def core(self, dtype, level, name="unchanged core", bug=None):
        """Return the extension; what the bug does not change is compiled once."""
        kernels = {each.name: each for each in build_core.kernel_compilations(self._compiler.machine)}
        kernel = kernels[f"kernels-{level}-{dtype}"]
        options = [each for each in kernel.options if not each.startswith("-DCORE_LEVEL")]
        kernel = kernel._replace(options=(*options, "-DCORE_LEVEL=baseline"))
        module = build_core.module_compilation()
        module = module._replace(options=(*module.options, "-DCORE_ONE_LEVEL"))
        others = build_core.Compilation("others", f"{CORE}/others.cpp", (), {})
        folder = self._unchanged if bug is None else self._sources(name, bug)

        def is_changed(compilation):  # headers are everyone's
            return bug is not None and (
                not bug.file.endswith(".cpp") or bug.file == Path(compilation.source).name
            )

        objects = [
            self._object(folder if is_changed(each) else self._unchanged, each) for each in (kernel, module)
        ]
        objects.append(self._object(self._unchanged, others))
        target = self._folder / f"{name.replace('/', ' ')}-{level}-{dtype}.so"
        link = [*self._compiler.command, "-shared", *map(str, objects), *self._compiler.link_options]
        self._run([*link, "-o", str(target)], self._folder)
        return target


def outcome_of(extension, check, dtype):
    """Return whether a test finds something in a core, and what."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = clean_environment(PYTHONPATH=path, CUPY_SYNCBN_ISA="baseline", OPENBLAS_NUM_THREADS="1")
    program = Path(__file__).with_name("planted.py")
    done = finish(
        [sys.executable, "-W", "ignore", program, extension, check, dtype], DEADLINE, env=environment
    )
    if done.returncode == 0:
        return False, "nothing"
    if -done.returncode in (
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGABRT,
    ):  # glibc aborts where its heap is broken
        return True, f"signal {-done.returncode}"
    assert done.returncode == FOUND, f"the check itself failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return True, done.stdout


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    try:
        compiler = build_core.find_compiler()
        build_core.module_compilation()
    except build_core.CannotBuildError as reason:
        pytest.skip(f"the core cannot be compiled here: {reason}")
    compiler = compiler._replace(options=(*compiler.options, "-O0"))
    return Workshop(compiler, tmp_path_factory.mktemp("cores"))


def need_level(level):
    """Skip the test where this processor cannot run a level."""
    if not loading.choice().core.levels().get(level):
        pytest.skip(f"{level} cannot run on this processor, or was not compiled")


def long_but_for(names, usual):
    return [pytest.param(name, marks=() if name in usual else pytest.mark.long) for name in names]


@pytest.mark.parametrize("name", long_but_for(BUGS, USUAL))
def test_bug_is_found(workshop, name):
    bug = BUGS[name]
    need_level(bug.level)
    is_found, what = outcome_of(workshop.core(bug.dtype, bug.level, name, bug), bug.check, bug.dtype)
    assert is_found, f"{bug.check} does not find it"
    print(what)


# ---- That it is the bugs that fail ----

CHECKS = sorted({(bug.dtype, bug.level, bug.check) for bug in BUGS.values()})
USUAL_CHECKS = {(BUGS[name].dtype, BUGS[name].level, BUGS[name].check) for name in USUAL}


@pytest.mark.parametrize(
    ("dtype", "level", "check"),
    [pytest.param(*each, marks=() if each in USUAL_CHECKS else pytest.mark.long) for each in CHECKS],
)
def test_check_passes_without_a_bug(workshop, dtype, level, check):
    need_level(level)
    is_found, what = outcome_of(workshop.core(dtype, level), check, dtype)
    assert not is_found, what


def test_all_bugs_can_be_planted():
    """Also those that only `pytest -m long` compiles: a table that is out of date shows at once."""
    wrong = []
    for name, bug in BUGS.items():
        try:
            plant(source_of(bug).read_text(), bug)
        except LookupError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


def test_a_bug_that_cannot_be_planted_is_an_error():
    for old in "no such line", "the":
        with pytest.raises(LookupError):
            plant("the text and the bug", Bug("walk.hpp", old, ""))
