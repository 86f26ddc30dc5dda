"""The core on a processor of another kind, which an emulator stands for: the same bits, of sums too."""

import importlib.util
import shutil
import struct
import subprocess

import numpy as np
import pytest

from cupy_syncbn.backends.cpu import loading
from support.core import TRAILER, TYPES, Case, assert_same_bits, compute, draw_case, inputs_of
from support.launcher import REPOSITORY

pytestmark = [pytest.mark.mpi_skip, pytest.mark.long]

if loading.choice().core is None:
    pytest.skip(f"the compiled core {loading.choice().why_none}", allow_module_level=True)

from cupy_syncbn.backends.cpu import native  # noqa: E402

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"
PACKAGES = "Debian: apt-get install g++-aarch64-linux-gnu qemu-user"

spec = importlib.util.spec_from_file_location("build_core", REPOSITORY / "scripts" / "build_core.py")
build_core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_core)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Return the command that runs driver.cpp, compiled for the other processor."""
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} cannot be found: {PACKAGES}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", COMPILER)
        compiler = build_core.find_compiler()
    assert compiler.machine == "aarch64"
    folder = tmp_path_factory.mktemp("aarch64")
    driver = build_core.Compilation("driver", "tests/backends/cpu/driver.cpp", (f"-I{build_core.CORE}",), {})
    objects = []
    for compilation in (*build_core.kernel_compilations(compiler.machine), driver):
        objects.append(str(folder / f"{compilation.name}.o"))
        subprocess.run(compilation.command(compiler, objects[-1]), check=True, cwd=REPOSITORY)
    target = str(folder / "driver")
    subprocess.run([*compiler.command, *objects, "-o", target], check=True)
    return [EMULATOR, "-L", LIBRARIES, target]


def message_of(case, inputs):
    """Return a case as the driver reads it."""
    weight = np.ones(case.shape[1]) if inputs.weight is None else inputs.weight
    bias = np.zeros(case.shape[1]) if inputs.bias is None else inputs.bias
    header = struct.pack(
        "=7qd",
        list(TYPES).index(case.dtype),
        *case.shape,
        case.slope is not None,
        case.residual,
        case.training,
        case.slope or 0.0,
    )
    tensors = [a.tobytes() for a in (inputs.x, inputs.dy, inputs.residual) if a is not None]
    channels = [a.astype("f8").tobytes() for a in (weight, bias, inputs.mean, inputs.var)]
    return b"".join([header, *tensors, *channels])


def results_of(case, inputs):
    """Return what the driver is to answer, by the core on this processor."""
    found = compute(native, case, inputs)
    C = case.shape[1]
    lengths = {"vector": 4 * C + 1, "squares": C if case.dtype == "float64" else 0, "sums": 2 * C}
    if not case.training and case.dtype == "float64":  # nobody else needs them then
        local = native.statistics(inputs.x, TRAILER)
        found["squares"] = native.centered_squares(local[1], local[0], TRAILER, 0)
    names = ["vector", "squares", "y", "dresidual", "sums", "dx"]
    return {name: found[name][: lengths.get(name)] for name in names if name in found}


def check_cases(program, cases):
    inputs = [inputs_of(case) for case in cases]
    message = b"".join(map(message_of, cases, inputs))
    done = subprocess.run(program, input=message, capture_output=True, timeout=600)
    assert done.returncode == 0, (done.returncode, done.stderr.decode(errors="replace"))
    at = 0
    for case, arrays in zip(cases, inputs, strict=True):
        for name, expected in results_of(case, arrays).items():
            actual = np.frombuffer(done.stdout, expected.dtype, expected.size, at).reshape(expected.shape)
            at += expected.nbytes
            assert_same_bits(actual, expected, name, case)
    assert at == len(done.stdout)


@pytest.mark.parametrize("dtype", TYPES)
def test_drawn_cases(program, dtype):
    check_cases(program, [draw_case(seed, dtype) for seed in range(100)])


# Rows, small maps and columns, with tails.
SHAPES = {"channels first": (3, 5, 1037), "small maps": (19, 13, 7), "channels last": (70, 129, 1)}
SHAPES |= {"dense": (517, 3, 1), "beyond a tile": (18, 2049, 1), "one value": (1, 1, 1)}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("slope", [None, 0.0, 0.01, -0.5])
@pytest.mark.parametrize("dtype", TYPES)
def test_walks(program, dtype, slope, special):
    check_cases(
        program,
        [
            Case(dtype, shape, slope, residual, training, 3.0, special=special, seed=seed)
            for seed, shape in enumerate(SHAPES.values())
            for residual in (False, True)
            for training in (False, True)
        ],
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bits(program, dtype):
    """What is loaded, scaled and stored: of subnormals, ties, infinities and NaN too."""
    case = Case(dtype, (1, 1, 1 << 16), training=False)
    values = np.arange(1 << 16, dtype=np.uint16).view(TYPES[dtype]).reshape(case.shape)
    for scale in 1.0, 2.0**-10, 2.0**4, 3.0:
        inputs = inputs_of(case)._replace(x=values, mean=np.zeros(1), var=np.full(1, 1 / scale**2))
        message = message_of(case, inputs)
        done = subprocess.run(program, input=message, capture_output=True, timeout=600)
        expected = results_of(case, inputs)["y"]
        start = 5 * 8
        actual = np.frombuffer(done.stdout, expected.dtype, expected.size, start).reshape(expected.shape)
        assert_same_bits(actual, expected, "y", case)
