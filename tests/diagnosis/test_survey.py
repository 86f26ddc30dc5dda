"""`python -m cupy_syncbn` and show_config: what they tell, their exit status, that NumPy is enough."""

import io
import json
import os
import shlex
import shutil
import sys
import tomllib
from ctypes.util import find_library

import numpy as np
import pytest
from mpi4py import MPI

import cupy_syncbn
from cupy_syncbn import show_config
from cupy_syncbn.backends.cpu import loading
from cupy_syncbn.comm import small_objects
from cupy_syncbn.comm.transports import TRANSPORTS
from cupy_syncbn.diagnosis import report, self_test
from cupy_syncbn.diagnosis import survey as config
from support import nccl_stand_in
from support.launcher import REPOSITORY, clean_environment, finish, launch, other_python, run, vendor_of

KEYS = {
    "versions",
    "mpi",
    "launch",
    "cpu",
    "cuda",
    "ranks",
    "transport",
    "self_test",
    "problems",
    "next_steps",
    "ok",
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("CUPY_SYNCBN_TRANSPORT", raising=False)
    monkeypatch.delenv("CUPY_SYNCBN_TIMEOUT", raising=False)


@pytest.fixture
def gpus(world, cupy, monkeypatch):
    """Give each rank a GPU of its own, where layers are by default."""
    if "StandIn" not in type(cupy).__name__:
        pytest.skip("there is no emulator beside a real GPU")
    import cuda_emulator

    monkeypatch.delenv("CUPY_SYNCBN_DEVICE")
    cuda_emulator.devices.count = world.size
    cupy.cuda.Device(world.rank).use()
    yield cupy
    cupy.cuda.Device(0).use()
    cuda_emulator.devices.count = 1


# ---- show_config ----
def test_dict(world):
    facts = show_config("dicts")
    assert set(facts) == KEYS
    assert facts["ok"]
    assert facts["problems"] == []
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["versions"]["cupy_syncbn"] == cupy_syncbn.__version__
    assert facts["mpi"]["library"] == MPI.get_vendor()[0]
    assert facts["launch"]["size"] == world.size
    assert facts["cpu"] == loading.facts()
    assert {row["isa"] for row in facts["ranks"]} == {loading.choice().isa}
    assert [row["rank"] for row in facts["ranks"]] == list(range(world.size))
    assert sorted(row["local_rank"] for row in facts["ranks"]) == list(range(world.size))
    assert 0 < facts["self_test"]["deviation"] < 1e-6
    assert json.loads(json.dumps(facts)) == facts
    everyones = world.comm.allgather(facts["ranks"])
    assert everyones == [facts["ranks"]] * world.size


def test_report_is_printed_by_rank_0(world):
    file = io.StringIO()
    assert show_config(file=file) is None
    text = file.getvalue()
    assert bool(text) == (world.rank == 0)
    if world.rank == 0:
        rows = text.split("rank  host")[1].split("\n\n")[0].splitlines()[1:]
        assert [row.split()[0] for row in rows] == [str(rank) for rank in range(world.size)]
        assert "passed (worst deviation" in text
        assert f"CPU:   {loading.status()}"[:60] in text


def test_unknown_mode():
    with pytest.raises(ValueError, match="'stdout' or 'dicts'"):
        show_config("json")


def test_default_transport_by_shared_gpus(world, gpus, monkeypatch):
    monkeypatch.setattr(gpus.cuda.runtime, "deviceGetPCIBusId", lambda device: "0000:01:00.0")
    facts = show_config("dicts")
    assert facts["ok"]
    assert facts["self_test"]["device"] == "cuda"
    assert {row["pci"] for row in facts["ranks"]} == {"0000:01:00.0"}
    assert facts["transport"]["chosen"] == (None if world.size == 1 else "mpi")
    assert all(row["transport"] == facts["transport"]["chosen"] for row in facts["ranks"])


def test_shared_gpu_is_what_nccl_lacks(world, gpus, monkeypatch):
    nccl_stand_in.install(monkeypatch, gpus)
    monkeypatch.setattr(gpus.cuda.runtime, "deviceGetPCIBusId", lambda device: "0000:01:00.0")
    monkeypatch.setenv("CUPY_SYNCBN_TRANSPORT", "nccl")
    facts = show_config("dicts")
    assert facts["ok"] == (world.size == 1)
    if world.size > 1:
        assert "ranks 0 and 1 share GPU 0000:01:00.0" in facts["problems"][0]


def test_auto_is_nccl_with_a_gpu_each(world, gpus, monkeypatch):
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("this MPI may not be called by several threads")
    nccl_stand_in.install(monkeypatch, gpus)
    before = len(nccl_stand_in.made)
    facts = show_config("dicts")
    assert facts["ok"], facts
    if world.size > 1:
        assert facts["transport"]["chosen"] == "nccl"
        assert len(nccl_stand_in.made) == before + 1  # the self-test took it
    assert len({row["pci"] for row in facts["ranks"]}) == world.size


def test_gpu_broken_on_the_last_rank(world, gpus, monkeypatch):
    def get_device():
        raise ZeroDivisionError("a broken\ninstallation " + 300 * "é")  # of any kind, however long

    if world.rank == world.size - 1:
        monkeypatch.setattr(gpus.cuda.runtime, "getDevice", get_device)
    facts = show_config("dicts")
    assert [row["gpu"] is None for row in facts["ranks"]] == [False] * (world.size - 1) + [True]
    assert "a broken installation" in facts["ranks"][-1]["why_no_gpu"]
    assert f"rank {world.size - 1}: a broken" in facts["transport"]["lacks"]["cuda-aware-mpi"]
    assert facts["self_test"]["passed"]  # on the CPU
    assert "a broken" in facts["problems"][0]


def test_devices_that_differ_are_a_problem(world, gpus, monkeypatch):
    if world.rank == world.size - 1:
        monkeypatch.setenv("CUPY_SYNCBN_DEVICE", "cpu")
    facts = show_config("dicts")
    assert facts["self_test"]["passed"]
    assert facts["self_test"]["device"] == "cpu"
    assert facts["ok"] == (world.size == 1)


@pytest.mark.parametrize("variable", ["CUPY_SYNCBN_TRANSPORT", "CUPY_SYNCBN_DEVICE", "CUPY_SYNCBN_TIMEOUT"])
def test_variable_that_means_nothing(monkeypatch, variable):
    monkeypatch.setenv(variable, "bogus")
    facts = show_config("dicts")
    assert not facts["ok"]
    assert "'bogus'" in facts["problems"][0]


@pytest.mark.parametrize(
    ("variable", "value"), [("CUPY_SYNCBN_TRANSPORT", "mpi"), ("CUPY_SYNCBN_TIMEOUT", "77")]
)
def test_variable_that_differs(world, monkeypatch, variable, value):
    if world.rank == world.size - 1:
        monkeypatch.setenv(variable, value)
    facts = show_config("dicts")
    assert facts["ok"] == (world.size == 1)
    if world.size > 1:
        (problem,) = facts["problems"]
        assert f"{variable} must be the same on all ranks" in problem
        assert f"on rank {world.size - 1}" in problem
    assert world.comm.allgather(facts["problems"]) == [facts["problems"]] * world.size


@pytest.mark.parametrize("which", ["first", "last"])
def test_timeout_that_means_nothing_on_one_rank(world, monkeypatch, which):
    """All ranks tell of it."""
    bad = 0 if which == "first" else world.size - 1
    if world.rank == bad:
        monkeypatch.setenv("CUPY_SYNCBN_TIMEOUT", "10 minutes")
    facts = show_config("dicts")
    assert facts["self_test"]["passed"]
    assert facts["problems"] == [
        f"expected CUPY_SYNCBN_TIMEOUT to be seconds above 0 (got '10 minutes' on rank {bad})"
    ]


@pytest.mark.parametrize("isa", ["numpy", "baseline"])
def test_core_of_some_ranks_alone(world, monkeypatch, isa):
    """Another level is another processor; NumPy is a mistake that all wait for."""
    isa = isa if world.rank == world.size - 1 else "v3"
    monkeypatch.setattr(loading, "_choice", loading.choice()._replace(isa=isa))
    facts = show_config("dicts")
    assert facts["self_test"]["passed"]
    is_problem = world.size > 1 and facts["ranks"][-1]["isa"] == "numpy"
    assert len(facts["problems"]) == is_problem
    if is_problem:
        assert f"rank {world.size - 1} computes by NumPy, rank 0 by the compiled core" in facts["problems"][0]


def test_empty_transport_counts_as_unset(monkeypatch):
    monkeypatch.setenv("CUPY_SYNCBN_TRANSPORT", "")
    facts = show_config("dicts")
    assert facts["ok"]
    assert (facts["transport"]["requested"], facts["transport"]["by"]) == ("auto", "default")


def test_longest_row_fits_into_a_message():
    reason, name = report.REASON * "x", config._NAME * "x"
    row = (
        name,
        10**6,
        "cuda",
        reason + "a",
        "baseline",
        name + "a",
        name + "b",
        reason + "b",
        name + "c",
        name + "d",
        reason,
    )
    assert len(row) == len(config._Row._fields)
    small_objects.pack(row)


def test_gpus_are_bound_by_local_rank(world, gpus):
    gpus.cuda.Device(0).use()
    facts = config.survey(bind=True)
    assert gpus.cuda.runtime.getDevice() == world.rank
    assert len({row["pci"] for row in facts["ranks"]}) == world.size


def test_wrong_sum_is_found(world, monkeypatch):
    """One rank's error is everyone's failure."""
    right = self_test._batch
    if world.rank == world.size - 1:
        changes = iter([1])  # the data of the layer, not those of the reference

        def wrong(rank):
            x, dy = right(rank)
            x[0, 0, 0] += next(changes, 0)
            return x, dy

        monkeypatch.setattr(self_test, "_batch", wrong)
    facts = show_config("dicts")
    assert not facts["self_test"]["passed"]
    assert not facts["ok"]
    assert facts["self_test"]["deviation"] > 1e-4
    assert "FAILED" in report.verdict(facts)


def test_error_on_one_rank(world, monkeypatch):
    if world.rank == world.size - 1:
        monkeypatch.setattr(self_test, "_batch", lambda rank: (np.zeros(3, "f4"), np.zeros(3, "f4")))
    facts = show_config("dicts")
    assert not facts["ok"]
    assert "rank" in facts["self_test"]["error"]


def test_every_transport_is_told_of():
    """One that was added and forgotten here would be left out of the report."""
    facts = show_config("dicts")["transport"]
    assert {"auto", *facts["notes"]} == {"auto", *facts["lacks"]} == set(TRANSPORTS)


def test_driver_decides_what_to_install():
    versions = {"cupy": None, "ml_dtypes": "1"}
    launch_ = {"size": 2, "launcher": "PMI_RANK"}
    for driver, major in (("12.4", 12), ("13.0", 13), ("14.1", 13)):
        (step,) = config._next_steps(versions, {"error": None}, {"driver": driver}, launch_, gpus=True)
        assert step.endswith(f": pip install 'cupy-cuda{major}x[ctk]' nvidia-nccl-cu{major}")
        assert driver in step


def test_what_installs_cupy_is_what_the_extras_name():
    """A clone is not where everyone is: the report names packages that indexes have."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for major in (12, 13):
        words = shlex.split(config._cupy_for(major))
        assert words[2:] == [name.partition(">")[0] for name in extras[f"cuda{major}"]]


# ---- python -m cupy_syncbn ----
def start(*arguments, **variables):
    return run(
        [sys.executable, *arguments], clean_environment(**{"PYTHONPATH": str(REPOSITORY)} | variables), 100
    )


BLOCKED = """
import runpy, sys
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("mpi4py", "cupy", "ml_dtypes"):
            raise ModuleNotFoundError("No module named " + repr(name))
sys.meta_path.insert(0, Blocker)
sys.argv = ["cupy_syncbn", {}]
runpy.run_module("cupy_syncbn", run_name="__main__")
"""


@pytest.mark.mpi_skip
def test_with_numpy_only(tmp_path):
    status, output = start("-c", BLOCKED.format(""), PATH=str(tmp_path))  # no launcher on it
    assert status == 0, output
    for text in (
        "mpi4py not installed",
        "pip install mpi4py mpich",
        "mpirun -n 4",
        "single process",
        "passed",
    ):
        assert text in output
    assert "Traceback" not in output


NO_DRIVER = pytest.mark.skipif(
    find_library("cuda") is not None or shutil.which("nvidia-smi") is not None, reason="there is a driver"
)


@NO_DRIVER
@pytest.mark.mpi_skip
def test_machine_of_cpus_alone_hears_of_cpus_alone():
    """Whoever has no GPU did nothing wrong: no advice on CuPy, and no table of its transports."""
    status, output = start("-c", BLOCKED.format(""))
    assert status == 0, output
    assert "GPUs:  none here, and none needed" in output
    for text in ("cupy-cuda", "CuPy", "nccl", "cuda-aware-mpi", "driver", "transport"):
        assert text not in output


@NO_DRIVER
@pytest.mark.mpi_skip
@pytest.mark.parametrize("variables", [{"CUPY_SYNCBN_TRANSPORT": "nccl"}, {"CUPY_SYNCBN_DEVICE": "cuda"}])
def test_what_needs_a_gpu_and_is_asked_for_is_explained(variables):
    status, output = start("-c", BLOCKED.format(""), **variables)
    assert status == 1, output
    for text in ("CuPy not installed", "no driver", "cuda-aware-mpi", "cupy-cuda13x[ctk]", "problem: "):
        assert text in output


@pytest.mark.mpi_skip
def test_json_with_numpy_only():
    status, output = start("-c", BLOCKED.format("'--json'"))
    facts = json.loads(output)
    assert status == 0
    assert set(facts) == KEYS
    assert facts["versions"]["mpi4py"] is None
    assert facts["mpi"]["error"]
    assert all(lack == facts["mpi"]["error"] for lack in facts["transport"]["lacks"].values())


@pytest.mark.mpi_skip
def test_mpi4py_without_a_library(tmp_path):
    """`import mpi4py` works then; `from mpi4py import MPI` raises."""
    package = tmp_path / "mpi4py"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '4.9'\nclass rc: initialize = True\n")
    (package / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')\n")
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    status, output = start("-m", "cupy_syncbn", PYTHONPATH=path, PATH=str(tmp_path))
    assert status == 0, output
    assert "mpi4py 4.9" in output
    assert "cannot load MPI library" in output
    assert "pip install mpi4py mpich" in output
    status, output = start("-m", "cupy_syncbn", PYTHONPATH=path, PMI_RANK="0")
    assert status == 1
    assert "a launcher started this process, but MPI cannot be used" in " ".join(output.split())
    assert start("-m", "cupy_syncbn", PYTHONPATH=path, PMI_RANK="1") == (1, "")


@pytest.mark.mpi_skip
def test_srun_that_starts_single_processes():
    variables = {"SLURM_JOB_ID": "812", "SLURM_STEP_NUM_TASKS": "4"}
    status, output = start("-m", "cupy_syncbn", **variables, SLURM_PROCID="0")
    assert status == 1
    assert "SLURM_JOB_ID 812" in output
    assert "4 processes were started, but each is alone" in output
    assert start("-m", "cupy_syncbn", **variables, SLURM_PROCID="1") == (1, "")


@pytest.mark.mpi_skip
def test_mpi_is_not_initialised():
    code = "import sys, cupy_syncbn; cupy_syncbn.show_config(); assert 'mpi4py.MPI' not in sys.modules"
    status, output = start("-c", code)
    assert status == 0, output
    assert MPI.get_vendor()[0] in output


@pytest.mark.mpi_skip
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_closed_pipe(options):
    """As of `python -m cupy_syncbn | head -1`, once head has seen its line."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = clean_environment(PYTHONPATH=str(REPOSITORY))
    process = finish([sys.executable, "-m", "cupy_syncbn", *options], 100, env=environment, stdout=writer)
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.mpi_skip
def test_help():
    status, output = start("-m", "cupy_syncbn", "--help")
    assert status == 0
    assert "--json" in output


@pytest.mark.mpi_skip
def test_version():
    assert start("-m", "cupy_syncbn", "--version") == (0, f"cupy_syncbn {cupy_syncbn.__version__}\n")


@pytest.mark.mpi_skip
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be NCCL")
@pytest.mark.parametrize("transport", ["nccl", "cuda-aware-mpi", "bogus"])
def test_forced_transport_in_one_process(transport):
    status, output = start("-m", "cupy_syncbn", CUPY_SYNCBN_TRANSPORT=transport)
    assert status == 1
    assert output.count("problem: ") == 1
    assert "Traceback" not in output


@pytest.fixture(params=["this", "other"])
def python(request):
    return sys.executable if request.param == "this" else other_python()


@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize("runner", [[], ["-m", "mpi4py"]], ids=["alone", "mpi4py"])
def test_three_ranks(python, runner):
    command, status, output = launch(python, 3, [*runner, "-m", "cupy_syncbn"], 100)
    assert status == 0, (command, output)
    assert output.count("self-test on 3 ranks") == output.count("cupy_syncbn 0.") == 1
    assert vendor_of(python) in output


@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be NCCL")
@pytest.mark.parametrize("transport", ["nccl", "bogus"])
def test_forced_transport_on_three_ranks(python, transport):
    _, status, output = launch(
        python, 3, ["-m", "mpi4py", "-m", "cupy_syncbn"], 100, CUPY_SYNCBN_TRANSPORT=transport
    )
    assert status not in (0, None), output
    assert output.count("problem: ") == 1
    assert "Traceback" not in output


ON_ONE_RANK = """
import os, runpy
from mpi4py import MPI
if MPI.COMM_WORLD.rank == {}:
    os.environ["CUPY_SYNCBN_TIMEOUT"] = "10 minutes"
runpy.run_module("cupy_syncbn", run_name="__main__")
"""


@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize("rank", [0, 2])
def test_one_rank_with_a_bad_timeout_stays_in_step(rank):
    _, status, output = launch(sys.executable, 3, ["-m", "mpi4py", "-c", ON_ONE_RANK.format(rank)], 100)
    assert status not in (0, None), output
    assert "self-test on 3 ranks, device cpu: passed" in output
    assert f"(got '10 minutes' on rank {rank})" in output
    assert output.count("problem: ") == 1
    assert "Traceback" not in output
