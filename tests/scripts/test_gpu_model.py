"""The model of the CUDA kernels' times: what it computes from, and what it says."""

import importlib

import numpy as np
import pytest

from cupy_syncbn.backends.cuda import kernels
from cupy_syncbn.backends.cuda.launch import launch_for
from support import machine_code, nvrtc
from support.launcher import REPOSITORY

pytestmark = pytest.mark.mpi_skip


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "benchmarks"))
    return importlib.import_module("gpu_model")


def test_every_instance_for_vectors_is_counted(model):
    names = [n for file in kernels.FILES for t in ("float32", "float16") for n in kernels.instances(file, t)]
    expected = {name for name in names if machine_code.round_of(name)}
    assert model.counts(model.NOW).keys() == expected
    for file in model.NOW, model.BEFORE:
        for row in model.counts(file).values():
            assert row.keys() == {f"sm_{architecture}" for architecture in nvrtc.LENGTHS}
            assert all(each["around"] > 100 and sum(each["pipes"].values()) > 10 for each in row.values())


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("file", ["NOW", "BEFORE"])
def test_every_kernel_is_found(model, file, dtype, columns):
    for name in model.KERNELS:
        for variant in "plain", "relu", "add+relu":
            kernel = model.kernel_on(name, dtype, columns, variant, model.GPUS["H200"], getattr(model, file))
            assert kernel is not None, (name, variant)
            assert kernel.resident in (2, 3, 4)


def test_time_of_one_round(model):
    """Of fewer blocks than are resident: the fixed cost, a turn for each batch of loads, the launch."""
    gpu = model.GPUS["H200"]
    kernel = model.kernel_on("statistics", "float32", False, "plain", gpu)
    shape = (2, 64, 32, 32)
    launch = launch_for((2, 64, 1024), 4, True, gpu.multiprocessors)
    assert launch.blocks <= gpu.multiprocessors
    turns = -(-launch.per_split // (256 * 4))
    cycles = 7000 + turns * 1.15 * 850
    found = model.predict(kernel, shape, 4, False, cycles=7000)
    assert found.seconds == pytest.approx(cycles / 1.83e9 + 2e-6)
    assert found.share == pytest.approx(2 * 64 * 1024 * 4 / 4.3e12 / found.seconds)


def test_fixed_cost_of_a_block(model):
    kernel = model.kernel_on("statistics", "float32", True, "plain", model.GPUS["H200"])
    counted = kernel.counted
    waits = model.WAIT * counted["waits"]
    for rows, own, steps in (1, False, 0), (8, False, 2), (4, True, 5):
        adding = (rows - 1) * counted["row"] + own * counted["own"] + steps * counted["step"]
        expected = 4.5 * (counted["around"] + adding) + waits
        assert kernel.fixed_cycles(model.BlockSums(rows, own, steps)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("view", "itemsize", "expected"),
    [
        ((1 << 15, 256, 1), 4, (4, False, 2)),  # 16 lanes side by side and 16 rows; 4 threads a channel
        ((1 << 15, 64, 1), 2, (8, False, 2)),  # 8 and 32
        ((32, 256, 784), 4, (7, True, 5)),  # 196 vectors of a channel side by side
        ((32, 2048, 49), 4, (4, False, 5)),  # 98 lanes have 8 channels, in 2 rows: 98 values each, 32 threads
        ((32, 64, 3136), 4, (8, False, 0)),  # row by row
    ],
)
def test_sums_over_a_block(model, view, itemsize, expected):
    launch = launch_for(view, itemsize, True, 132)
    assert tuple(model.sums_of(launch, view[2], model.NOW)) == expected


def test_large_tensors_go_at_the_limits_of_the_gpu(model):
    kernel = model.kernel_on("normalize", "float32", True, "plain", model.GPUS["A100"])
    assert min(kernel.limits().values()) == kernel.limits()["memory"] == 1
    assert model.predict(kernel, (2048, 1024, 8, 8), 4, True).share > 0.95
    slow = kernel._replace(gpu=kernel.gpu._replace(alu=0.01))
    share = slow.limits()["ALU"]
    assert share < 0.1
    assert model.predict(slow, (2048, 1024, 8, 8), 4, True).share == pytest.approx(share, rel=0.1)


def test_float64_is_what_small_gpus_lack(model):
    kernel = model.kernel_on("statistics", "float16", True, "plain", model.GPUS["H200"])
    poor = kernel._replace(gpu=model.GPUS["RTX 4090"])
    sums = model.BlockSums(1, False, 0)
    added = poor.fixed_cycles(sums) - kernel.fixed_cycles(sums)
    assert added == pytest.approx(8 * 16 * kernel.counted["float64"] - 4.5 * kernel.counted["around"])


def test_this_engine_is_modelled_as_no_slower_than_the_one_before(model):
    for name, gpu in model.GPUS.items():
        for channels_last in (False, True):
            before, now = (
                model.of_resnet50(gpu, 32, "float32", channels_last, f) for f in (model.BEFORE, model.NOW)
            )
            for kernel in model.KERNELS:
                ratio = [now[kernel][s].seconds / before[kernel][s].seconds for s in now[kernel]]
                assert np.exp(np.mean(np.log(ratio))) < 1.05, (name, kernel)


def test_what_it_prints(model, capsys):
    assert model.main(["--markdown", "--dtypes", "float32"]) == 0
    output = capsys.readouterr().out
    assert output.count("A MODEL: ") == 3
    assert "| float32 NHWC 32x2048x7x7  " in output
    assert "CPI 4.5, round trip 633 cycles, slack 1.15, launch 2 us" in output
    assert "not a measurement" in output


def test_times_for_the_benchmark(model):
    def us(device, kernel="normalize", dtype="float16"):
        return model.modelled_us(kernel, (32, 64, 56, 56), dtype, False, "relu", device)

    assert us("NVIDIA H200") == us("NVIDIA H200", "evaluate") == us("NVIDIA H200", dtype="bfloat16")
    assert 1 < us("NVIDIA H200") < us("NVIDIA GeForce RTX 4090") < 100
    assert us("NVIDIA T4") is None
