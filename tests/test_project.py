"""The project's papers: workflows, issue form, citation, changelog and metadata agree with each other."""

import re
import tomllib

import pytest

import cupy_syncbn
from support.launcher import REPOSITORY

pytestmark = pytest.mark.mpi_skip

GITHUB = REPOSITORY / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
METADATA = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def load(path):
    """Return what a YAML file holds; YAML 1.1 takes the key `on` for True."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.load(path.read_text(), yaml.BaseLoader)


def runs(workflow):
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow(path):
    workflow = load(path)
    assert set(workflow) <= {"name", "on", "permissions", "concurrency", "jobs"}
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert set(job) <= {"runs-on", "container", "timeout-minutes", "env", "strategy", "steps"}
        assert int(job["timeout-minutes"]) > 0
        for step in job["steps"]:
            assert set(step) <= {"name", "uses", "with", "run", "if"}
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v1"))
    files = [word for run in runs(workflow) for word in re.findall(r"[\w.]+/[\w./-]+", run)]
    assert all((REPOSITORY / file).exists() for file in files if file.startswith((".ci/", "cupy_syncbn/")))
    assert "has not run yet" in " ".join(path.read_text().replace("\n#", " ").split())  # until it has


def test_pushes_run_ci():
    workflow = load(GITHUB / "workflows" / "ci.yml")
    assert "pull_request" in workflow["on"]
    assert "bash .ci/run" in runs(workflow)


def test_tags_build_wheels():
    workflow = load(GITHUB / "workflows" / "wheels.yml")
    assert workflow["on"]["push"] == {"tags": ["v*"]}
    wheel = workflow["jobs"]["wheel"]
    assert [each["machine"] for each in wheel["strategy"]["matrix"]["include"]] == ["x86_64", "aarch64"]
    assert wheel["env"]["CUPY_SYNCBN_REQUIRE_CORE"] == "1"
    assert any("auditwheel repair" in run for run in runs(workflow))
    tested = {f"3.{minor}" for minor in re.findall(r"cp3(\d+)-cp3\1\b", "\n".join(runs(workflow)))}
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(METADATA["classifiers"]))
    assert tested == set(classified)
    uploaded = [step["with"]["path"] for job in workflow["jobs"].values() for step in job["steps"]
                if "upload" in step.get("uses", "")]  # fmt: skip
    assert uploaded == ["dist/*.tar.gz", "dist/*.whl"]


def test_tag_is_compared_with_the_version():
    (command,) = [run for run in runs(load(GITHUB / "workflows" / "wheels.yml")) if "GITHUB_REF_NAME" in run]
    line = re.search(r'"(__version__.*)" (\S+)', command)
    expected = line[1].replace("\\", "").replace("${GITHUB_REF_NAME#v}", cupy_syncbn.__version__)
    assert expected in (REPOSITORY / line[2]).read_text().splitlines()


def test_issue_form_asks_for_the_report():
    form = load(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")
    assert form["name"]
    assert form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"])
    assert all(field["validations"] == {"required": "true"} for field in fields.values())
    assert "python -m cupy_syncbn --json" in fields["report"]["attributes"]["label"]


def test_citation():
    citation = load(REPOSITORY / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == cupy_syncbn.__version__
    assert citation["license"] == METADATA["license"]
    assert citation["authors"] == METADATA["authors"]
    assert all(citation[key] for key in ("message", "title", "abstract", "type"))


def test_changelog_begins_with_this_version():
    headings = re.findall(r"(?m)^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text())
    assert headings[0] == cupy_syncbn.__version__


@pytest.mark.parametrize("name", ["SECURITY", "SUPPORT"])
def test_short_pages(name):
    assert len((GITHUB / f"{name}.md").read_text().splitlines()) == 2
