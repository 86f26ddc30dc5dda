"""Imports point one way, and cost nothing before they are needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, clean_environment

import cupy_syncbn

pytestmark = pytest.mark.serial

PACKAGE = Path(cupy_syncbn.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# What each part may import of the package; `errors` anyone may.
ALLOWED = {
    "arrays": set(),
    "backends": {"backends", "arrays"},
    "comm": {"comm", "arrays"},
    "functional": {"comm", "backends", "arrays"},
}


def imports(path, *, at_start):
    """Yield the modules that a file imports: when it is imported itself, or ever."""
    pending = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its direction"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_start and isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        elif at_start and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def parts_imported(path, at_start=False):
    """Return the parts of the package that a file imports."""
    known = {name.split(".")[0] for name in MODULES} - {"__init__"}
    names = [name.split(".") for name in imports(path, at_start=at_start)]
    return {parts[1] for parts in names if parts[0] == "cupy_syncbn" and len(parts) > 1 and parts[1] in known}


@pytest.mark.parametrize("part", ALLOWED)
def test_direction(part):
    files = [path for name, path in MODULES.items() if name.split(".")[0] == part]
    assert files
    for path in files:
        assert parts_imported(path) <= ALLOWED[part], path


def test_no_cycle():
    """No module imports, at its start, one that imports it."""
    graph = {}
    for name, path in MODULES.items():
        part = name.split(".")[0]
        if part != "__init__":
            graph.setdefault(part, set()).update(parts_imported(path, at_start=True) - {part})
    while graph:
        leaves = [part for part, targets in graph.items() if not targets & graph.keys()]
        assert leaves, f"a cycle among {sorted(graph)}"
        for leaf in leaves:
            del graph[leaf]


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_late(module):
    late = {"mpi4py", "torch", "ml_dtypes", "cupy", "cupyx", "cupy_backends", "nccl"}
    if module == "backends.cuda.operations":
        late -= {"cupy", "cupyx", "cupy_backends"}
    at_start = {name.split(".")[0] for name in imports(MODULES[module], at_start=True)}
    assert not at_start & late


@pytest.mark.parametrize(
    "use",
    [
        "",
        "bn = cupy_syncbn.SyncBatchNorm(3, device='cpu'); bn.backward(bn(numpy.ones((4, 3), 'f4')))",
    ],
)
def test_neither_cupy_nor_mpi_is_imported(use):
    code = f"""
import sys, numpy, cupy_syncbn
{use}
loaded = {{"cupy", "mpi4py", "torch", "ml_dtypes"}} & set(sys.modules)
assert not loaded, loaded
"""
    environment = clean_environment(PYTHONPATH=str(PACKAGE.parent))
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60, env=environment)


def test_public_names():
    for name in cupy_syncbn.__all__:
        assert getattr(cupy_syncbn, name) is not None
    expected = """SyncBatchNorm BatchNorm1d BatchNorm2d BatchNorm3d Parameter Module Sequential
        convert_sync_batchnorm sync_batch_norm sync_batch_norm_backward ProcessGroup SingleProcessGroup
        MPIProcessGroup new_group split_group default_group DistributedDataParallel RemoteRankError
        RankMismatchError show_config"""
    assert set(expected.split()) <= set(cupy_syncbn.__all__)
    assert issubclass(cupy_syncbn.RankMismatchError, RuntimeError)
    assert issubclass(cupy_syncbn.RemoteRankError, RuntimeError)


def test_package_under_test_is_this_one():
    assert PACKAGE == REPOSITORY / "cupy_syncbn"
