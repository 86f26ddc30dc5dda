"""The pages of scripts/docs; tests/test_readme.py runs what they show, and .ci/run builds them."""

import json
import re
import runpy

import pytest

import cupy_syncbn
from support.launcher import REPOSITORY
from test_api import INTERNAL

pytestmark = pytest.mark.mpi_skip

DOCS = REPOSITORY / "scripts" / "docs"


def test_every_public_name_has_a_page():
    parts = re.split(r"(?m)^\.\. currentmodule:: (\S+)\n", (DOCS / "api.rst").read_text())
    pages = {}
    for module, text in zip(parts[1::2], parts[2::2], strict=True):
        lists = re.findall(
            r"(?m)^\.\. autosummary::\n   :toctree: api\n   :nosignatures:\n\n((?:   \w+\n)+)", text
        )
        pages[module] = sorted(" ".join(lists).split())
    modules = {"cupy_syncbn": cupy_syncbn.__all__}
    for library in "torch", "jax":
        path = REPOSITORY / "cupy_syncbn" / "interop" / f"{library}.py"  # not imported: it may be missing
        (names,) = re.findall(r"(?m)^__all__ = \[(.*)\]$", path.read_text())
        modules[f"cupy_syncbn.interop.{library}"] = re.findall(r'"(\w+)"', names)
    assert pages == {module: sorted(names) for module, names in modules.items()}


def test_every_page_is_in_the_contents():
    (contents,) = re.findall(r"(?s)```{toctree}\n:maxdepth: 1\n\n(.*?)```", (DOCS / "index.md").read_text())
    pages = {path.stem for path in DOCS.iterdir() if path.suffix in (".md", ".rst")} - {"index"}
    assert sorted(contents.split()) == sorted(pages)


def test_internal_methods_have_no_page():
    left_out = runpy.run_path(str(DOCS / "conf.py"))["INTERNAL"]
    assert left_out == {name.partition(".")[2] for name in INTERNAL}


def figures(page, result):
    """Return the cells of a page's rows by their first one, and the data that the page links to."""
    text = (DOCS / page).read_text()
    (path,) = re.findall(rf"\]\((\.\./benchmarks/results/{result}-[\d-]+\.json)\)", text)
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in re.findall(r"(?m)^\|.*$", text)]
    return {name: cells for name, *cells in rows}, json.loads((DOCS / path).read_text())


def test_figures_of_numerics():
    shown, record = figures("numerics.md", "accuracy")
    rows = {"0": "0", "1e3": "1000", "1e5": "100000", "0, and one outlier of 1e4": "outlier"}
    for row, data in rows.items():
        (errors,) = [each["errors"] for each in record["variance"] if each["data"] == data]
        measured = [errors[name] for name in record["methods"][:5]]
        assert [f"{float(cell):.0e}" for cell in shown[row]] == [f"{error:.0e}" for error in measured]


def test_figures_of_speed():
    shown, record = figures("speed.md", "cpu")
    for row in "float32", "float32, channels-last", "float16", "bfloat16", "float64":
        kind = row.replace(", channels-last", "-nhwc")
        for cell, variant in zip(shown[row], ("plain", "relu", "add+relu"), strict=True):
            assert not cell or cell == f"{record['summary'][f'{kind}, {variant}']['ours/torch']:.2f}"


@pytest.mark.parametrize(("column", "where"), [(0, "cpu"), (1, "emulated-gpu")])
def test_figures_of_memory(column, where):
    shown, record = figures("guide.md", f"memory-{where}")
    in_tensors = {kind: peak / record["tensor_bytes"] for kind, peak in record["peak_bytes"].items()}
    rows = dict(
        zip(in_tensors, [row for row in shown if "normal" not in row and "---" not in row], strict=True)
    )
    for kind, row in rows.items():
        assert shown[row][column] == f"{in_tensors[kind]:.1f}"
    assert in_tensors["in place"] <= 0.6 * in_tensors["fused"]
    if where == "cpu":
        (section,) = re.findall(r"(?ms)^## Accuracy, .*?^## ", (REPOSITORY / "README.md").read_text())
        ratio = in_tensors["in place"] / in_tensors["fused"]
        words = (
            f"need {in_tensors['fused']:.0f} times",
            f"{in_tensors['in place']:.0f} times, {ratio:.2f} of that",
            f"the layer takes {record['time']['float32']:.2f} of the time",
        )
        assert all(each in " ".join(section.split()) for each in words)


def test_figures_of_torch_and_jax():
    shown, record = figures("torch_and_jax.md", "cpu-torch")
    for row, kind in ("float32", "float32"), ("float32, channels-last", "float32-nhwc"):
        measured = [record["summary"][f"{kind}, {variant}"] for variant in ("plain", "relu", "add+relu")]
        assert shown[row] == [f"{means['ours/torch']:.2f}" for means in measured]
    dense = [f"{each['ratio']:.2f}" for each in record["results"] if len(each["shape"]) == 2]
    assert shown["dense layers (8, 64), (64, 128), (256, 1024)"] == [", ".join(dense), "", ""]


@pytest.mark.parametrize("library", ["open-mpi", "mpich"])
def test_figures_of_scaling(library):
    shown, record = figures("scaling.md", f"exchange-{library}")
    names = "ours", "unchecked", "iallreduce", "allreduce", "allgather"
    for channels in 64, 1024, 4096:
        measured = record["measured"]["2"][str(channels)]
        assert shown[f"{channels}, {record['library']}"] == [f"{1e6 * measured[name]:.1f}" for name in names]


def test_figures_of_the_simulation():
    shown, record = figures("scaling.md", "scaling")
    names = "ours", "doubling", "rabenseifner", "two levels", "libnbc", "allgather"
    assert len(record["rows"]) == 30
    for row in record["rows"]:
        times = [row["us"][name] for name in names]
        times += [row["us_with_jitter"][name] for name in ("ours", "rabenseifner")]
        key = f"{row['ranks']:,}, {row['per_node']}, {row['channels']:,}"
        assert shown[key] == [f"{value:,.0f}" for value in times]
    shown, record = figures("scaling.md", "scaling-resnet")
    for step in record["steps"]:
        times = [f"{step['ms'][name]:.1f}" for name in ("ours", "doubling")]
        assert shown[f"{step['ranks']:,}, {step['per_node']}"] == times


@pytest.mark.parametrize("library", ["open-mpi", "mpich"])
def test_figures_of_overlap(library):
    shown, record = figures("scaling.md", f"overlap-{library}")
    assert shown[record["library"]] == [f"{record['ms'][way]:.1f}" for way in ("behind", "started", "tested")]


def test_figures_of_making_groups():
    shown, record = figures("scaling.md", "scaling-groups")
    names = "one group", "split_group", "new_group for each node"
    for made in record["groups"]:
        cells = [
            f"{made['messages']:.0f}",
            f"{made['bytes'] / 1e3:.1f}",
            *(f"{made[name]:.2f}" for name in names),
        ]
        assert shown[f"{made['ranks']:,} ranks, {made['per_node']} a node"] == cells


def test_figures_of_the_readme_are_those_of_the_pages():
    (section,) = re.findall(
        r"(?ms)^## Accuracy, speed, memory$(.*?)^## ", (REPOSITORY / "README.md").read_text()
    )
    pages = {name: (DOCS / f"{name}.md").read_text() for name in ("numerics", "speed", "scaling")}
    for page, cells in ("numerics", ("2e-7", "3e5", "1e-5")), ("speed", ("0.34", "0.73")):
        assert all(cell in section and f"| {cell} |" in pages[page] for cell in cells)
    for figure, cell in ("50 µs", "49.7"), ("24 µs", "24.2"), ("84 µs", "84"):
        assert figure in section
        assert f"| {cell} |" in pages["scaling"]
        assert f"{float(cell):.0f} µs" == figure
