"""scripts/train_digits.py, run as its user would, on few steps."""

import os
import re
import sys

import pytest

from support.launcher import OVERSUBSCRIBE, REPOSITORY, clean_environment, find_launcher, run, vendor_of

DEADLINE = 120
SCRIPT = str(REPOSITORY / "scripts" / "train_digits.py")
WAYS = ("local BatchNorm", "SyncBatchNorm", "one process")

# 8 images over 3 ranks are 2, 3 and 3. 1498 = 187 * 8 + 2: the last batch is 0, 1 and 1.
SMALL = ("--epochs", "1", "--batch", "8")
FEW = ("--epochs", "1", "--batch", "64")  # steps enough to disagree

# Runs the script without what it is about.
SABOTAGE = f"""
import runpy, sys
import cupy_syncbn
cupy_syncbn.convert_sync_batchnorm = lambda module: module
sys.argv = [{SCRIPT!r}, *sys.argv[1:]]
runpy.run_path({SCRIPT!r}, run_name="__main__")
"""


def environment():
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    # A launcher that writes to a pipe may take the encoding of the C locale.
    variables = clean_environment(PYTHONPATH=path, PYTHONIOENCODING="utf-8", CUPY_SYNCBN_TIMEOUT="60")
    variables.pop("OMP_NUM_THREADS", None)  # the script's own business
    if os.geteuid() == 0:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return variables


def run_ranks(ranks, *arguments):
    options = OVERSUBSCRIBE.get(vendor_of(sys.executable), [])
    command = [find_launcher(sys.executable), *options, "-n", str(ranks), sys.executable, "-W", "error"]
    # The launcher may put what comes from stderr into the middle of a line of the table.
    variables = environment() | {"TQDM_DISABLE": "1"}
    return run([*command, "-m", "mpi4py", *arguments], variables, DEADLINE)


def table(output):
    """Return test accuracy, test loss, train loss and difference of each way."""
    rows = {}
    for name in WAYS:
        (row,) = re.findall(
            rf"{name} +([\d.]+)% +([\d.]+) +([\d.]+) +(\S+) +[\d.]+\s*$", output, re.MULTILINE
        )
        rows[name] = tuple(map(float, row))
    return rows


def check(status, output, picture, tolerance=1e-9):
    assert status == 0, output
    rows = table(output)
    accuracy, _, train_loss, _ = rows["SyncBatchNorm"]
    assert accuracy > 50  # guessing is right in 10 % of all cases
    assert train_loss < 2.3  # and costs log(10)
    assert rows["one process"][3] == 0
    assert f"tolerance {tolerance:.0e}: they agree" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"the curves: {picture}" in output
    assert "the seconds differ, and on several ranks the row of local BatchNorm" in output
    return rows


@pytest.mark.long
@pytest.mark.mpi_skip
def test_one_process(tmp_path):
    command = [sys.executable, "-W", "error", SCRIPT, *SMALL, "--plot", str(tmp_path / "curves.png")]
    status, output = run(command, environment(), DEADLINE)
    rows = check(status, output, tmp_path / "curves.png")
    assert "step/s" in output  # the progress bar
    assert rows["local BatchNorm"] == rows["one process"]
    assert rows["SyncBatchNorm"][3] <= 1e-9


@pytest.mark.long  # the main job, test_slurm.py and the test below run on ranks as well
@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-3)])
def test_three_ranks(tmp_path, dtype, tolerance):
    picture = tmp_path / "curves.png"
    status, output = run_ranks(3, SCRIPT, *SMALL, "--dtype", dtype, "--plot", str(picture))
    rows = check(status, output, picture, tolerance)
    assert rows["local BatchNorm"][3] > 0.1  # the negative control: the statistics do matter
    if dtype == "float64":
        assert rows["SyncBatchNorm"][3] <= tolerance
        assert rows["SyncBatchNorm"][:3] == rows["one process"][:3]


@pytest.mark.launch
@pytest.mark.mpi_skip
def test_disagreement_is_an_error(tmp_path):
    program = tmp_path / "sabotaged.py"
    program.write_text(SABOTAGE)
    status, output = run_ranks(3, str(program), *FEW, "--plot", "")
    assert status == 1, output
    assert "DO NOT AGREE" in output


@pytest.mark.launch
@pytest.mark.mpi_skip
@pytest.mark.parametrize("ranks", [0, 3])
def test_picture_is_checked_before_the_training(tmp_path, ranks):
    arguments = [SCRIPT, *SMALL, "--plot", str(tmp_path / "missing" / "curves.png")]
    if ranks:
        status, output = run_ranks(ranks, *arguments)
    else:
        status, output = run([sys.executable, *arguments], environment(), DEADLINE)
    assert status not in (0, None), output
    assert output.count("missing/curves.png: ") == 1
    assert "name another file, or '' for no picture" in output
    assert "step/s" not in output
    assert "Traceback" not in output
