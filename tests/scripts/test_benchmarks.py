"""The benchmark scripts run and leave their files. How fast anything is, no test asserts."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

import cuda_emulator
from cupy_syncbn.backends.cpu import loading
from support.launcher import REPOSITORY, clean_environment, finish, launch, other_python

pytestmark = pytest.mark.mpi_skip

PLOTS = importlib.util.find_spec("matplotlib") is not None
TORCH = importlib.util.find_spec("torch") is not None


def run(script, folder, *arguments):
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    env = clean_environment(PYTHONPATH=path, PYTHONIOENCODING="utf-8")
    command = [sys.executable, str(REPOSITORY / "scripts" / "benchmarks" / script), "--quick", *arguments]
    finished = finish([*command, "--output", str(folder)], 120, env=env, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    (path,) = folder.glob("*.json")
    text = path.read_text()
    assert str(folder) not in text
    assert str(REPOSITORY) not in text
    record = json.loads(text)
    assert {"machine", "date", "versions", "threads", "command"} <= record.keys()
    assert re.fullmatch(rf"{Path(script).stem}(-[a-z-]+)?-{record['date']}\.json", path.name)
    pictures = list(folder.glob("*.png"))
    assert len(pictures) == PLOTS
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
    return finished.stdout, record


def headings(output, first):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()]
    return [row for row in rows if row[0] == first]


def test_cpu(tmp_path):
    output, record = run("cpu.py", tmp_path, "--repeats", "2")
    expected = ["shape", "ours ms", "torch ms", "ratio", "quartiles", "ours/limit", "copy GB/s", "peak"]
    assert headings(output, "shape") == [expected] * 13
    assert ("torch is not installed" in output) is not TORCH
    kinds = {key.split(",")[0] for key in record["summary"]} - {"resnet50", "zero_grad_us"}
    assert kinds == {"float32", "float32-nhwc", "float16", "bfloat16", "float64"}
    assert min(record["summary"]["zero_grad_us"].values()) > 0
    for result in record["results"]:
        assert result["ours_ms"] > 0
        assert ("ratio" in result) is TORCH
        assert result["peak"] >= 1  # y itself


@pytest.mark.long
def test_cpu_without_the_core(tmp_path):
    output, record = run("cpu.py", tmp_path, "--repeats", "2", "--kinds", "dense", "--isa", "numpy")
    assert "computed by: NumPy, as CUPY_SYNCBN_ISA says; 1 rank(s)" in output
    assert (record["cpu"], record["ranks"]) == ("numpy", 1)
    assert [result["shape"] for result in record["results"]] == [[8, 64], [64, 128], [256, 1024]]


@pytest.mark.long
@pytest.mark.skipif(not TORCH, reason="measures a layer of torch, which is not installed")
def test_cpu_of_the_torch_layer(tmp_path):
    output, record = run("cpu.py", tmp_path, "--repeats", "2", "--kinds", "dense", "--torch-layer")
    assert len(headings(output, "shape")) == 1
    assert "--torch-layer" in record["command"]
    assert all(result["ratio"] > 0 for result in record["results"])


@pytest.mark.launch
def test_cpu_on_ranks(tmp_path):
    """A rank cannot restart with other threads, as its MPI has started: it says what goes before mpirun."""
    script = str(REPOSITORY / "scripts" / "benchmarks" / "cpu.py")
    arguments = ["-m", "mpi4py", script, "--quick", "--kinds", "dense", "--output", str(tmp_path)]
    _, status, output = launch(sys.executable, 2, arguments, 120)
    assert status == 1
    (words,) = set(re.findall(r"put env (.*?) before mpirun", output))
    variables = dict(word.split("=") for word in words.split())
    for name in variables.keys() & {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}:
        assert variables.pop(name) == "1"  # as `launch` has it
    _, status, output = launch(sys.executable, 2, arguments, 120, **variables)
    assert status == 0, output
    (path,) = tmp_path.glob("cpu-ranks-quick-*.json")
    assert json.loads(path.read_text())["ranks"] == 2


def test_cpu_counts_the_batch_norms_of_resnet50(monkeypatch):
    cpu = imported(monkeypatch, "cpu")
    layers = cpu.resnet50(8)
    assert layers.total() == 53
    # A batch norm has two parameters per channel: 53 120 in torchvision's resnet50.
    assert sum(2 * shape[1] * times for (shape, _), times in layers.items()) == 53_120
    assert layers[(8, 128, 56, 56), "relu"] == 1  # before the strided convolution: v1.5
    assert len({shape for shape, _ in layers}) == 12


@pytest.mark.launch
def test_exchange(tmp_path):
    output, record = run("exchange.py", tmp_path)
    assert [row[0] for row in headings(output, "ranks, C")] == ["ranks, C"] * 2
    assert set(record["measured"]) == {"2", "4"}
    for by_channels in record["measured"].values():
        for times in by_channels.values():
            assert min(times.values()) > 0
    for times in record["model"]["us"].values():
        for modelled in times.values():
            assert 0 < modelled["2"] < modelled["16384"]


@pytest.mark.parametrize("where", ["CPU", "emulated GPU"])
def test_memory(tmp_path, where):
    if where == "emulated GPU" and (reason := cuda_emulator.available()):
        pytest.skip(reason)
    output, record = run("memory.py", tmp_path, "--emulate" if where == "emulated GPU" else "--time")
    assert headings(output, "normalization") == [["normalization", "peak, MiB", "in tensors", "of fused"]]
    peaks = record["peak_bytes"]
    most = 0.75 if where == "CPU" and loading.choice().core is None else 0.6  # NumPy works on whole arrays
    assert 10 * record["tensor_bytes"] < peaks["in place"] <= most * peaks["fused"]
    assert peaks["fused"] < 0.8 * peaks["plain"]
    assert ("time" in record) == (where == "CPU")


def imported(monkeypatch, name):
    """Return a benchmark as a module."""
    folder = REPOSITORY / "scripts" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


def test_scaling(tmp_path):
    output, record = run("scaling.py", tmp_path)
    assert "Assumptions: Network(wire=1.2e-06" in output
    assert len(headings(output, "ranks/per node, C")) == 2
    assert len(record["rows"]) == 12
    for row in record["rows"]:
        assert row["us"]["ours"] <= 1.05 * row["us"]["doubling"]
        assert row["us"]["ours"] < row["us"]["allgather"]


@pytest.mark.launch
@pytest.mark.parametrize("library", ["this", pytest.param("other", marks=pytest.mark.long)])
def test_scaling_counts_as_real_ranks_do(library):
    python = sys.executable if library == "this" else other_python()
    command = [python, str(REPOSITORY / "scripts" / "benchmarks" / "scaling.py"), "--validate", "--quick"]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = clean_environment(PYTHONPATH=path, OMP_NUM_THREADS="1")
    finished = finish(command, 120, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert "agree in 18 cases" in finished.stdout


@pytest.mark.long
def test_scaling_agrees_with_another_simulator(monkeypatch, capsys):
    smpi = imported(monkeypatch, "smpi")
    if not shutil.which("smpirun"):
        pytest.skip("there is no smpirun (Debian: libsimgrid-dev)")
    assert smpi.main([]) == 0
    assert capsys.readouterr().out.count("\n| ") == 2 + 5
    monkeypatch.setattr(smpi, "simulate", lambda *_: importlib.import_module("scaling").Outcome(20e-6))
    with pytest.raises(SystemExit, match=r"'64', '0', '20.0', .* more than 12% apart"):
        smpi.compare(64, 8)


def test_scaling_finds_what_does_not_agree(monkeypatch):
    scaling = imported(monkeypatch, "scaling")
    monkeypatch.setattr(scaling, "launch", lambda nodes: [[260, 0, 8, 16_640], [260, 1, 12, 12_529]])
    with pytest.raises(SystemExit, match=r"\(12, 12528\)"):
        scaling.validate(["0011"])
    monkeypatch.setitem(scaling.REFERENCE, (64, 8), (27, 82, 241))
    with pytest.raises(SystemExit, match="more than 5%"):
        scaling.reproduce([(64, 8)])


def test_scaling_counts_the_sums_of_resnet50(monkeypatch):
    """Two for each of its 53 batch norms; halving helps between nodes alone."""
    scaling = imported(monkeypatch, "scaling")
    assert sum(scaling.RESNET50.values()) == 53
    within, between = scaling.resnet50(8, 8), scaling.resnet50(64, 8)
    assert within["ours"] == within["doubling"]
    assert within["ours"] < between["ours"] < 0.95 * between["doubling"]


def test_scaling_counts_what_makes_groups(monkeypatch):
    """Messages grow with the logarithm of ranks; groups at once cost what one does."""
    scaling = imported(monkeypatch, "scaling")
    few, many = scaling.groups(16, 4), scaling.groups(64, 4)
    assert (few["messages"], many["messages"]) == (6 * 4, 6 * 6)
    assert many["split_group"] < many["one group"]
    assert many["new_group for each node"] > 10 * many["split_group"]


@pytest.mark.long
def test_simulated_sums_keep_their_targets(monkeypatch):
    """With 1024 channels, and no worse than doubling where vectors are short; nor is the choice far off."""
    scaling = imported(monkeypatch, "scaling")
    us = {case: 1e6 * scaling.seconds_of("ours", *case, 1024) for case in [(64, 8), (4096, 64)]}
    assert us[64, 8] < 55
    assert us[4096, 64] < 100
    for case in (64, 8), (256, 64), (1024, 8), (1024, 64):
        schedule, nodes = scaling.Schedule(scaling.blocks(*case)), scaling.blocks(*case)
        for channels in 64, 128, 1024:
            length = scaling.length_of(channels)
            times = [
                scaling.simulate(scaling.ours(schedule, length, each, scaling.PYTHON), nodes).seconds
                for each in range(7)
            ]
            chosen = times[schedule.halvings(8 * length)]
            assert chosen < 1.05 * min(times), (case, channels)


@pytest.mark.launch
def test_overlap(tmp_path):
    script = str(REPOSITORY / "scripts" / "benchmarks" / "overlap.py")
    _, status, output = launch(
        sys.executable, 2, ["-m", "mpi4py", script, "--quick", "--output", str(tmp_path)], 120
    )
    assert status == 0, output
    (path,) = tmp_path.glob("overlap-*-quick-*.json")
    record = json.loads(path.read_text())
    assert record["ranks"] == 2
    assert list(record["ms"]) == ["computing", "sums", "behind", "started", "tested"]
    assert record["ms"]["behind"] > record["ms"]["sums"] > 0


def test_accuracy(tmp_path):
    if reason := cuda_emulator.available():
        pytest.skip(reason)
    output, record = run("accuracy.py", tmp_path, "--emulate")
    methods = [
        "ours",
        "our kernels",
        *(["torch"] if TORCH else []),
        "E[x²]-E[x]²",
        "Welford",
        "first-value shift",
    ]
    wire = ["mean, m2: median", "worst", "pivoted: median", "worst"]
    assert headings(output, "mean/sd") == [["mean/sd", *methods], ["mean/sd", *wire]]
    assert record["methods"] == methods
    for row in record["variance"]:
        assert row["errors"]["ours"] < 1e-6, row["data"]
        assert row["errors"]["our kernels"] < 1e-6, row["data"]
    for row in record["wire"]:
        _, worst = row["errors"]["pivoted"]
        assert worst < 1e-7, row["data"]
    assert [row["data"] for row in record["variance"]] == ["0", "100", "1000", "10000", "100000", "outlier"]
