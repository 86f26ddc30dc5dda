"""What README.md and the pages of scripts/docs show, runs as it is written.

tests/test_api.py runs the docstrings' examples.
"""

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

import cupy_syncbn
from support.launcher import REPOSITORY, TESTS, clean_environment, finish, launch

pytestmark = pytest.mark.mpi_skip

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "scripts" / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def skip_without_its_library(code):
    for library in re.findall(r"(?m)^import (torch|jax)$", code):
        pytest.importorskip(library, reason=f"a program within {library}, which is not installed")


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_blocks_run(code, tmp_path):
    skip_without_its_library(code)
    environment = clean_environment(PYTHONPATH=str(REPOSITORY))
    process = finish([sys.executable, "-W", "error", "-c", code], 120, env=environment, cwd=tmp_path)
    assert process.returncode == 0, process.stderr


# What runs the commands that no test here does.
CI = (REPOSITORY / ".ci" / "run").read_text()
ELSEWHERE = {
    "git clone URL-OF-THIS-REPOSITORY": "no host yet, so that there is no URL to try",
    "bash scripts/train_digits.sh": CI,
    "bash scripts/test.sh": CI,
    ". .venv/bin/activate": CI,
    "pip install . mpich": CI,
    "pip install '.[cuda13]' mpich": "test_extras_exist",  # takes gigabytes, and a GPU
    "sbatch scripts/slurm/cpu.sh": "test_slurm.py",
    "sbatch --nodes=4 scripts/slurm/gpu.sh": "test_slurm.py",
    "qsub scripts/pbs/job.sh": "test_slurm.py",
    "bash scripts/gpu_check.sh": "test_gpu_check.py",
}
COMMANDS = [
    line.partition(" #")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
]
# And those within sentences
SPOKEN = [c for c in re.findall(r"`((?:mpirun|python) [^`]+)`", TEXT) if "NAME" not in c]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_blocks_run(command):
    if command.startswith("mpirun"):
        assert f" {command}\n" in CI  # beside `pip install`, whose environment it shows
        return
    (known,) = [known for known in ELSEWHERE if command.startswith(known)]
    runs = ELSEWHERE[known]
    if runs is CI:
        assert re.search(rf"(?m)^ *{re.escape(command)}$", re.sub(r"(PIP_QUIET|PYTHON)=\S+ ", "", CI))
    elif runs.endswith(".py"):
        assert all(
            Path(file).name in (TESTS / "scripts" / runs).read_text()
            for file in re.findall(r"scripts/\S+", command)
        )


def test_extras_exist():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"\.\[(\w+)\]", TEXT)
    assert named
    assert set(named) <= set(extras)


LAUNCHED = [c for c in dict.fromkeys(COMMANDS + SPOKEN) if c.startswith("mpirun")]


@pytest.mark.launch
@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_blocks_run_on_ranks(code, tmp_path):
    skip_without_its_library(code)
    (tmp_path / "program.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{code}")
    arguments = ["-W", "error", "-m", "mpi4py", str(tmp_path / "program.py")]
    is_ours = not re.search(r"(?m)^import (torch|jax)$", code)  # each rank imports those for seconds
    told, status, output = launch(sys.executable, 3 if is_ours else 2, arguments, 120)
    assert status == 0, f"{told}\n{output}"
    if "print(" in code:
        found = re.findall(r"rank (\d) of 3: ([^,]*), the same on all ranks", output)
        assert sorted(rank for rank, _ in found) == ["0", "1", "2"]
        assert len({weights for _, weights in found}) == 1


@pytest.mark.launch
@pytest.mark.parametrize("command", LAUNCHED)
def test_launches_run(command, tmp_path):
    """Also those with the example as train.py."""
    code = next(code for language, code in BLOCKS if language == "python")
    (tmp_path / "train.py").write_text(code)
    words = [str(tmp_path / word) if word == "train.py" else word for word in shlex.split(command)]
    assert words[:2] == ["mpirun", "-n"]
    assert words[3] == "python"
    if "pytest" in words:
        words.append("--collect-only")
    told, status, output = launch(sys.executable, int(words[2]), words[4:], 120)
    assert status == 0, f"{told}\n{output}"
    if f"`{command}` prints" in README:
        shown = re.findall(rf"(?m)^    (rank \d of {words[2]}: .*)$", README)
        printed = re.findall(rf"rank \d of {words[2]}: .*?on all ranks", output)
        assert sorted(shown) == sorted(printed) != []


@pytest.mark.parametrize("command", [c for c in SPOKEN if c.startswith("python ")])
def test_programs_named_in_sentences(command):
    """Another test runs them: it names the file."""
    words = shlex.split(command)
    if words[1] == "-m":
        assert words[2] in ("cupy_syncbn", "mpi4py")
        return
    file = REPOSITORY / words[1]
    others = [path.read_text() for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    assert words[1] == "train.py" or file.is_file()
    assert words[1] == "train.py" or any(file.name in text or file.stem in text for text in others)


def test_environment_variables_are_listed_in_one_place():
    sources = [path.read_text() for path in (REPOSITORY / "cupy_syncbn").rglob("*.py")]
    read = re.findall(r"""environ(?:\.get\(|\[|\.pop\()["'](CUPY_SYNCBN_\w+)""", "\n".join(sources))
    assert sorted(re.findall(r"(?m)^\| (CUPY_SYNCBN_\w+) \|", TEXT)) == sorted(set(read))


def anchors(page):
    """Return the anchors that the headings of a page get, on GitHub and from Sphinx."""
    headings = re.findall(r"(?m)^##+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_name_files_and_headings_that_exist(page):
    links = re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text(encoding="utf-8"))
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_public_names_are_listed():
    """Each once, in the README, with what it is."""
    (section,) = re.findall(r"(?ms)^## Public names$(.*?)^## ", README)
    rows = re.findall(r"(?m)^\| (`.*?`) \| .{10,} \|$", section)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(cupy_syncbn.__all__)


def test_first_screen():
    """A picture, the commands and an example with its output, in 40 lines that are not empty."""
    screen, _, rest = README.partition("\n## Contents")
    assert rest
    last = screen.index("the same on all ranks\n\n")
    lines = [line for line in screen[:last].splitlines() if line.strip() and not line.startswith("```")]
    assert len(lines) <= 40
    for part in "](scripts/figures/", "bash scripts/train_digits.sh", "bash scripts/test.sh", "```python":
        assert part in screen[:last]
    assert README.count("\n") <= 250
