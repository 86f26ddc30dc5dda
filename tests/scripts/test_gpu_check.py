"""The command for a machine with a GPU, and its parts, on a machine without one."""

import datetime
import importlib
import os
import re
import shutil
import sys
import zipfile

import numpy as np
import pytest

from cupy_syncbn.backends.cuda import kernels
from support.launcher import REPOSITORY, clean_environment, finish

pytestmark = pytest.mark.mpi_skip


# ---- scripts/sanitize.py ----
@pytest.fixture
def sanitize(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    return importlib.import_module("sanitize")


# float64 has a kernel more than the others, and 16-bit types have the widest vectors.
OFTEN = ("float64", "float16")


@pytest.mark.parametrize(
    "dtype", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.long) for name in kernels.TYPES]
)
def test_every_instance_is_run(sanitize, cupy, dtype):
    import cuda_emulator as emulator

    emulator.stats.reset()
    for run in sanitize.runs([dtype]):
        sanitize.check(cupy, run)
    if hasattr(cupy.RawModule, "prebuild"):  # only the emulator tells what was launched
        launched = {name for name, *_ in emulator.stats.launches}
        assert launched == {name for file in kernels.FILES for name in kernels.instances(file, dtype)}


def test_a_fifth_of_the_runs_has_all_that_a_run_has(sanitize):
    every, fifth = (list(sanitize.runs(kernels.TYPES))[::step] for step in (1, 5))
    assert len(fifth) < len(every) / 4
    for field in sanitize.Run._fields:
        assert {getattr(run, field) for run in fifth} == {getattr(run, field) for run in every}
    assert {(run.walk, run.dtype) for run in fifth} == {(run.walk, run.dtype) for run in every}


def test_wrong_result_is_found(sanitize, fast_cupy, monkeypatch):
    right = sanitize.sync_batch_norm

    def wrong(x, *arguments, **options):
        y, saved = right(x, *arguments, **options)
        if not isinstance(x, np.ndarray):
            y[0, 0] = 0
        return y, saved

    monkeypatch.setattr(sanitize, "sync_batch_norm", wrong)
    with pytest.raises(ArithmeticError, match=r"float32, matrix, vectors, .*: y is off by"):
        sanitize.check(fast_cupy, sanitize.Run("matrix, vectors", "float32", False, None))


def test_sanitize_needs_a_gpu(tmp_path):
    environment = clean_environment(PYTHONPATH=str(REPOSITORY), CUDA_VISIBLE_DEVICES="")
    finished = finish([sys.executable, str(REPOSITORY / "scripts" / "sanitize.py")], 120, env=environment)
    assert finished.returncode == 2
    assert "this needs a GPU: " in finished.stderr


# ---- scripts/gpu_check.sh ----
TOOLS = (
    "bash cat chmod cut date dirname env find git grep head mkdir mktemp sed sleep tail timeout tr uname wc"
)
PARTS = [
    *(
        "environment",
        "compile",
        "instances",
        "graphs",
        "nccl",
        "tests",
        "ranks-1",
        "ranks-2",
        "ranks-4",
        "cuda-aware",
        "benchmark-quick",
    ),
    *(f"sanitizer-{tool}" for tool in ("memcheck", "racecheck", "initcheck", "synccheck")),
    "benchmark-full",
]
SMI = "[ $# -gt 0 ] && echo 'NVIDIA Fake 1' || echo 'CUDA Version: 13.0'"


@pytest.fixture
def machine(tmp_path):
    """Return a function that runs the command on a machine that has these programs, given as shell code."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("awk", *TOOLS.split()):
        if shutil.which(tool):
            (folder / tool).symlink_to(shutil.which(tool))

    def run(*arguments, programs=(), python=sys.executable, **environment):
        for name, code in dict(programs).items():
            (folder / name).write_text(f"#!{shutil.which('bash')}\n{code}\n")
            (folder / name).chmod(0o755)
        variables = {
            "PATH": str(folder),
            "PYTHON": python,
            "TMPDIR": str(tmp_path),
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [
            "bash",
            str(REPOSITORY / "scripts" / "gpu_check.sh"),
            "--output",
            str(tmp_path / "results"),
        ]
        environment = clean_environment(**variables, **environment)
        return finish([*command, *arguments], 120, env=environment, cwd=tmp_path)

    return run


def stubs(**special):
    """Return the variables that give every part another command."""
    return {
        f"GPU_CHECK_STUB_{part.replace('-', '_')}": special.get(
            part.replace("-", "_"), f"echo {part} is well"
        )
        for part in PARTS
    }


def report_of(tmp_path):
    today = datetime.datetime.now(datetime.UTC).date()
    (path,) = (tmp_path / "results").glob("*.md")
    # The date may have changed since.
    assert path.name in {f"gpu-nvidia-fake-1-{today - datetime.timedelta(days)}.md" for days in (0, 1)}
    text = path.read_text()
    for private in (str(REPOSITORY), str(tmp_path), os.uname().nodename):
        assert private not in text
    return text


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] in PARTS]


def test_no_gpu(machine, tmp_path):
    finished = machine()
    assert finished.returncode == 2
    assert finished.stderr == "no NVIDIA GPU to check: nvidia-smi is not on the PATH\n"
    finished = machine(programs={"nvidia-smi": "echo no devices were found; exit 6"})
    assert finished.returncode == 2
    assert "nvidia-smi says: no devices were found" in finished.stderr
    assert not (tmp_path / "results").exists()


def test_gpu_that_cupy_cannot_use(machine, tmp_path):
    finished = machine(programs={"nvidia-smi": SMI})
    assert finished.returncode == 2, finished.stderr
    assert "the GPU cannot be used: CuPy cannot use the GPU: " in finished.stderr
    (row,) = rows_of(report_of(tmp_path))
    assert row[:2] == ["environment", "FAILED (3)"]


def test_all_pass(machine, tmp_path):
    finished = machine(programs={"nvidia-smi": SMI}, CUPY_SYNCBN_COMMIT="abc", **stubs())
    assert finished.returncode == 0, finished.stderr
    text = report_of(tmp_path)
    assert text.startswith("# NVIDIA Fake 1, ")
    assert "commit abc" in text
    assert [row[:2] for row in rows_of(text)] == [[part, "passed"] for part in PARTS]
    assert [row[3] for row in rows_of(text)] == [f"{part} is well" for part in PARTS]
    assert "### compile: passed" in text


def test_failures_are_reported_and_do_not_stop_it(machine, tmp_path):
    special = stubs(
        tests=f"echo in {REPOSITORY}/tests '1 failed | 3 passed'; exit 1",
        graphs="exit 5",
        ranks_2="echo begun; sleep 30",
        benchmark_full="echo with $0 $1",
    )
    finished = machine(programs={"nvidia-smi": SMI}, GPU_CHECK_STUB_LIMIT="1", **special)
    assert finished.returncode == 1
    results = {row[0]: row[1:] for row in rows_of(report_of(tmp_path))}
    assert list(results) == PARTS
    assert results["tests"][0] == "FAILED (1)"
    assert results["tests"][2] == "in ./tests 1 failed / 3 passed"
    assert results["graphs"][0] == "no tests"
    assert results["ranks-2"][0] == "TIMEOUT"
    assert results["ranks-2"][2] == "begun"
    assert results["benchmark-full"][2] == "with --budget-s 0"
    others = [results[part][0] for part in PARTS if part not in ("tests", "graphs", "ranks-2")]
    assert set(others) == {"passed"}


def test_choice_of_stages_and_a_second_run(machine, tmp_path):
    programs = {"nvidia-smi": SMI}
    finished = machine("--stages", "sanitizer,ranks-2", "--quick", programs=programs, **stubs())
    assert finished.returncode == 0, finished.stderr
    finished = machine("--stages", "tests", programs=programs, **stubs(tests="false"))
    assert finished.returncode == 1
    text = report_of(tmp_path)
    assert text.count("# NVIDIA Fake 1") == 1
    assert text.count("## Run of ") == 2
    expected = [["environment", "passed"], ["ranks-2", "passed"], ["sanitizer-memcheck", "passed"]]
    expected += [["environment", "passed"], ["tests", "FAILED (1)"]]
    assert [row[:2] for row in rows_of(text)] == expected
    assert machine("--list").stdout.split() == [*PARTS, "sweep"]
    finished = machine("--stages", "testing", programs=programs)
    assert finished.returncode == 2
    assert "there is no stage testing" in finished.stderr


IN_MINUTES = [
    *("environment", "compile", "instances", "graphs", "nccl", "benchmark-quick"),
    *("sanitizer-memcheck", "sanitizer-racecheck", "tests", "ranks-2"),
]


def test_minutes(machine, tmp_path):
    """What has passed is left out of the next call; of tests that are stopped, the files that are through."""
    seen = "tests/a.py::x PASSED", "tests/b.py::y PASSED", "tests/b.py::z FAILED", "tests/c.py::v PASSED"
    seen = " ".join(f"'{line}'" for line in (*seen, "tests/d.py::w SKIPPED"))
    programs, call = {"nvidia-smi": SMI}, ("--minutes", "1")
    failing = stubs(tests=f"printf '%s\\n' {seen}; exit 124", nccl="exit 1", instances="exit 124")
    finished = machine(*call, programs=programs, CUPY_SYNCBN_COMMIT="abc", **failing)
    assert finished.returncode == 1
    text = report_of(tmp_path)
    results = {row[0]: row[1] for row in rows_of(text)}
    assert list(results) == IN_MINUTES
    assert (results["tests"], results["nccl"]) == ("FAILED (124)", "FAILED (1)")
    assert results["instances"] == "stopped"
    assert "\nFiles of the tests that are through: tests/a.py tests/c.py\n" in text
    (log,) = (tmp_path / "results").glob("*.log")
    assert "== tests: FAILED (124)\ntests/a.py::x PASSED\n" in log.read_text()

    for commit, again in (("abc", ["instances", "nccl", "tests"]), ("abd", IN_MINUTES[2:])):
        stopped = stubs(tests="echo tests/d.py::w PASSED; exit 124")
        finished = machine(*call, programs=programs, CUPY_SYNCBN_COMMIT=commit, **stopped)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        run = report_of(tmp_path).rpartition("## Run of ")[2]
        assert [row[0] for row in rows_of(run)] == ["environment", "compile", *again]
        assert {row[0]: row[1] for row in rows_of(run)}["tests"] == "stopped"
        assert ("tests/a.py" in run) == (commit == "abc")
    assert machine("--minutes", "a", programs=programs).returncode == 2


def test_minutes_begin_with_the_tests_that_are_left(machine, tmp_path):
    tell = f'echo "${{0##*/}} $*" >>{tmp_path}/told; [ "$1" = -c ] && echo MPICH; exit 0'
    programs = {"nvidia-smi": SMI, "python": tell, "compute-sanitizer": tell}
    (tmp_path / "results").mkdir()
    name = tmp_path / "results" / "gpu-nvidia-fake-1-2020-01-01.md"
    through = "Files of the tests that are through: tests/nn/test_cupy_layers.py"
    name.write_text(
        f"## Run of 10:00 UTC: commit abc, 9 s\n\n| graphs | passed | 3 | 1 passed |\n\n{through}\n"
    )
    python = str(tmp_path / "bin" / "python")
    finished = machine("--minutes", "2", programs=programs, python=python, CUPY_SYNCBN_COMMIT="abc")
    assert finished.returncode == 1, "there is no mpirun"
    told = (tmp_path / "told").read_text()
    tests = next(line for line in told.splitlines() if "not nccl and not graph" in line)
    assert "tests/backends/cuda/test_kernels.py" in tests
    assert "test_cupy_layers" not in tests
    assert "-W default" in tests
    assert "-k graph" not in told
    assert "python scripts/sanitize.py\n" in told
    assert re.search("compute-sanitizer --tool racecheck .* scripts/sanitize.py --every 5\n", told)


def test_rehearsal(tmp_path):
    """All of it, on the emulator: a stage that cannot run is found here, and not on a GPU."""
    command = ["bash", str(REPOSITORY / "scripts" / "gpu_check.sh"), "--rehearse", "--minutes", "9"]
    command += ["--output", str(tmp_path / "results"), "--logs", str(tmp_path / "logs")]
    environment = clean_environment(PYTHON=sys.executable, CUPY_SYNCBN_COMMIT="abc")
    for expected in IN_MINUTES, ["environment", "compile"]:
        finished = finish(command, 540, env=environment, cwd=tmp_path)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        report = max((tmp_path / "results").glob("gpu-emulated-gpu-*.md")).read_text()
        rows = rows_of(report.rpartition("## Run of ")[2])
        assert [row[:2] for row in rows] == [[part, "passed"] for part in expected]
    assert len(list((tmp_path / "results").iterdir())) <= 8


def test_budget(machine, tmp_path):
    finished = machine("--budget", "5", "--stages", "tests", programs={"nvidia-smi": SMI}, **stubs())
    assert finished.returncode == 1
    assert [row[1] for row in rows_of(report_of(tmp_path))] == ["not run", "not run"]


def test_limits_are_those_that_the_header_says():
    text = (REPOSITORY / "scripts" / "gpu_check.sh").read_text()
    header = " ".join(line.lstrip("# ") for line in text.split("set -euo")[0].splitlines())
    said = dict(re.findall(r"([a-z-]+) (\d+)(?= for each|[,;.])", header.partition("each may take:")[2]))
    body = text.partition('case "$part" in')[2].partition("esac")[0]
    usual = re.search(r"COMMAND=\(\) LIMIT=(\d+)", text)[1]
    branches = re.findall(r"^        ([a-z*-]+)\)(.*?);;$", body, re.MULTILINE | re.DOTALL)
    limits = {name.removesuffix("-*"): re.findall(r"LIMIT=(\d+)", code) or [usual] for name, code in branches}
    assert {name: [limit] for name, limit in said.items()} == limits


@pytest.mark.parametrize("library", ["libmpi.so.40", "libmpi.so.12"])
def test_mpi_of_a_wheel(machine, tmp_path, library):
    with zipfile.ZipFile(tmp_path / "mpi.whl", "w") as wheel:
        code = f'#!{shutil.which("bash")}\necho "$MPI4PY_LIBMPI" "$@" >>{tmp_path}/told\n'
        wheel.writestr("mpi-1.data/data/bin/mpirun", code)
        wheel.writestr(f"mpi-1.data/data/lib/{library}", "")
        wheel.writestr("mpi-1.data/data/lib/libmpi.so", "")
    # Where Python is, there may be another mpirun.
    real = {
        "nvidia-smi": SMI,
        "python": f'[ "$2" != zipfile ] || exec {sys.executable} "$@"',
        "mpirun": "false",
    }
    # The script works in the folder of the project, and programs that it starts in others.
    logs = str(tmp_path / "logs")
    logs = os.path.relpath(logs, REPOSITORY) if library.endswith("40") else logs
    arguments = "--mpi", str(tmp_path / "mpi.whl"), "--logs", logs, "--stages", "ranks-2"
    finished = machine(*arguments, programs=real, python=str(tmp_path / "bin" / "python"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    told = (tmp_path / "told").read_text()
    expected = tmp_path / "logs" / "mpi" / "mpi-1.data" / "data" / "lib" / library
    assert told.startswith(f"{expected} -n 2 {tmp_path}/bin/python -m mpi4py -m pytest")
    finished = machine("--mpi", "absent.whl", programs=real, python=str(tmp_path / "bin" / "python"))
    assert finished.returncode == 2
    assert "--mpi absent.whl: cannot unpack it" in finished.stderr


def test_commands(machine, tmp_path):
    """What is run, shown by programs that only tell their arguments."""
    tell = f'echo "$(basename "$0") $*" >>{tmp_path}/told; [ "$1" = -c ] && echo Open MPI; exit 0'
    tell = tell.replace('$(basename "$0")', "${0##*/}")
    programs = {"nvidia-smi": SMI, "python": tell, "mpirun": tell, "compute-sanitizer": tell}
    finished = machine(programs=programs, python=str(tmp_path / "bin" / "python"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    told = (tmp_path / "told").read_text()
    python = tmp_path / "bin" / "python"
    tests = next(line for line in told.splitlines() if line.startswith("python -m pytest"))
    assert {"tests/backends/cuda/test_kernels.py", "tests/test_cupy_functional.py"} <= set(tests.split())
    assert "test_cuda_emulator" not in tests
    for ranks in (1, 2, 4):
        assert f"mpirun --oversubscribe -n {ranks} {python} -m mpi4py -m pytest" in told
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert f"compute-sanitizer --tool {tool} --error-exitcode 1" in told
    assert "python scripts/sanitize.py --compile" in told
    assert "python scripts/benchmarks/gpu.py --quick --output " in told
    assert told.splitlines()[-1].endswith("--budget-s 480")
    assert machine("--stages", "sweep", python=str(python)).returncode == 0
    assert "python scripts/benchmarks/gpu.py --sweep --output " in (tmp_path / "told").read_text()
    # Without them:
    (tmp_path / "bin" / "mpirun").unlink()
    (tmp_path / "bin" / "compute-sanitizer").unlink()
    (tmp_path / "bin" / "python").write_text(f'#!{shutil.which("bash")}\n[ "$1" != - ]\n')
    finished = machine("--stages", "ranks-1,sanitizer-memcheck", python=str(python), CUDA_HOME=str(tmp_path))
    assert finished.returncode == 1
    missing = [row for row in rows_of(report_of(tmp_path)) if row[1] == "missing"]
    assert [row[0] for row in missing][:1] == ["ranks-1"]
    assert "mpirun" in missing[0][3]
    if not os.path.exists("/usr/local/cuda/bin/compute-sanitizer"):
        assert "compute-sanitizer" in missing[1][3]
