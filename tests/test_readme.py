"""What README.md and the docstrings show, runs as it is written."""

import doctest
import re
import subprocess
import sys

import pytest
from helpers import REPOSITORY, clean_environment

from cupy_syncbn import layers

pytestmark = pytest.mark.serial

TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_blocks_run(code, tmp_path):
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120,
        env=clean_environment(PYTHONPATH=str(REPOSITORY)), cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr


def test_commands_name_files_that_exist():
    commands = [code for language, code in BLOCKS if language == "bash"]
    files = re.findall(r"scripts/[\w/.]+", " ".join(commands))
    assert {"scripts/train_digits.sh", "scripts/test.sh"} <= set(files)
    assert all((REPOSITORY / file).is_file() for file in files)


def test_links_name_files_that_exist():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", TEXT)
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_docstrings():
    result = doctest.testmod(layers)
    assert result.attempted > 0
    assert result.failed == 0
