"""The house: imports point one way, private names stay private, lists are short, nothing is loaded early."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cupy_syncbn
from support.launcher import REPOSITORY, clean_environment

pytestmark = pytest.mark.mpi_skip

PACKAGE = Path(cupy_syncbn.__file__).parent

# What each room may import, beside itself. The rooms stand in the order of the design.
ALLOWED = {
    "_version": set(),
    "arrays": set(),
    "backends": {"arrays", "_version"},
    "comm": {"arrays"},
    "checks": {"backends", "arrays"},
    "plan": {"checks", "backends", "arrays"},
    "functional": {"plan", "checks", "comm", "backends", "arrays"},
    "graphs": {"backends", "arrays"},
    "nn": {"functional", "plan", "checks", "comm", "backends", "arrays"},
    "interop": {"nn", "functional", "plan", "checks", "comm", "backends", "arrays"},
    "diagnosis": {"nn", "comm", "backends", "arrays", "_version"},
    "__main__": {"diagnosis"},
}

# Underscores that Python or NumPy put there.
NAMED_TUPLE = {"_replace", "_make", "_asdict", "_fields"}


def modules_in(package):
    """Return the files of a package by their dotted names, the package itself being ""."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        names[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return names


MODULES = modules_in(PACKAGE)


def imports(path, *, at_start):
    """Yield the modules that a file imports: when it is imported itself, or ever, for types too."""
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


def graph_of(package):
    """Return, for each module of a package, the modules of the package that it imports anywhere."""
    modules, graph = modules_in(package), {}
    for name, path in modules.items():
        found = {each.removeprefix("cupy_syncbn").removeprefix(".") for each in imports(path, at_start=False)
                 if each.split(".")[0] == "cupy_syncbn"}  # fmt: skip
        graph[name] = {each for each in found & modules.keys() if each and each != name}
    return graph


def room(module):
    return module.split(".")[0]


def wrong_directions(package):
    """Return what a room imports of one that it must not know."""
    return {
        (module, target)
        for module, targets in graph_of(package).items()
        for target in targets
        if module and room(target) != room(module) and room(target) not in ALLOWED[room(module)]
    }


def circle(package):
    """Return the modules that import each other in a circle, or nothing."""
    graph = {module: set(targets) for module, targets in graph_of(package).items()}
    while graph:
        leaves = [module for module, targets in graph.items() if not targets & graph.keys()]
        if not leaves:
            return sorted(graph)
        for leaf in leaves:
            del graph[leaf]
    return []


def borrowed_names(package):
    """Return the names with an underscore that a module takes from another: imported, or as attributes."""
    borrowed = set()
    for module, path in modules_in(package).items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        defined, used = set(), set()
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute):
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if is_own and isinstance(node.ctx, ast.Store):
                    defined.add(node.attr)
                elif not is_own:
                    used.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "cupy_syncbn":
                used |= {alias.name for alias in node.names}
        private = {name for name in used - defined if name.startswith("_") and not name.endswith("__")}
        borrowed |= {(module, name) for name in private - NAMED_TUPLE - MODULES.keys()}
    return borrowed


def functions_in(package):
    """Yield (module, name, node) of all functions, the name with that of the class."""
    for module, path in modules_in(package).items():
        for node in ast.walk(ast.parse(path.read_text())):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.FunctionDef):
                    owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                    yield module, owner + child.name, child


# Public signatures: torch's, and those that grew from it.
MANY_PARAMETERS = {"sync_batch_norm", "BatchNormBase.__init__", "SyncBatchNorm.__init__"}


def long_parameter_lists(package):
    """Return the functions with more than eight parameters beside self."""
    found = set()
    for module, name, node in functions_in(package):
        every = [each.arg for each in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
        if len(set(every) - {"self", "cls"}) > 8 and name not in MANY_PARAMETERS:
            found.add((module, name))
    return found


def long_steps(package):
    """Return the directions of the algorithm that are longer than a screen of 40 lines."""
    return {
        name
        for module, name, node in functions_in(package)
        if module == "functional"
        and name in ("forward", "backward")
        and node.end_lineno - node.body[0].end_lineno > 40
    }


def test_every_room_is_in_the_table():
    assert {room(module) for module in MODULES if module} == set(ALLOWED)


RULES = [wrong_directions, circle, borrowed_names, long_parameter_lists, long_steps]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps(rule):
    assert not rule(PACKAGE)


@pytest.mark.parametrize(
    ("rule", "file", "line"),
    [
        (wrong_directions, "comm/call.py", "from cupy_syncbn.backends import backend_of"),
        (wrong_directions, "backends/layout.py", "    def f(): import cupy_syncbn.comm.errors"),
        (wrong_directions, "functional.py", "if TYPE_CHECKING: from cupy_syncbn.nn.module import Module"),
        (circle, "comm/errors.py", "def f(): from cupy_syncbn.comm import groups"),
        (circle, "comm/transports/base.py", "if TYPE_CHECKING: from cupy_syncbn.comm import groups"),
        (borrowed_names, "nn/module.py", "from cupy_syncbn.arrays import _is_torch"),
        (borrowed_names, "nn/data_parallel.py", "def f(group): return group._transport"),
        (long_parameter_lists, "nn/tree.py", "class C:\n    def f(self, a, b, c, d, e, f, g, *, h, i): ..."),
        (long_steps, "functional.py", "def forward():\n    'x'\n" + 41 * "    f()\n"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(tmp_path, rule, file, line):
    copy = shutil.copytree(PACKAGE, tmp_path / "cupy_syncbn", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / file).write_text((copy / file).read_text() + "\n" + line.strip() + "\n")
    assert rule(copy)


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_late(module):
    late = {"mpi4py", "torch", "jax", "ml_dtypes", "cupy", "cupyx", "cupy_backends", "nccl"}
    if module == "backends.cuda.operations":
        late -= {"cupy", "cupyx", "cupy_backends"}
    late -= {module.removeprefix("interop.")}  # which nobody imports without the library
    at_start = {name.split(".")[0] for name in imports(MODULES[module], at_start=True)}
    assert not at_start & late


@pytest.mark.parametrize(
    "use", ["", "bn = cupy_syncbn.SyncBatchNorm(3, device='cpu'); bn.backward(bn(numpy.ones((4, 3), 'f4')))"]
)
def test_neither_cupy_nor_mpi_is_imported(use):
    code = f"""
import sys, numpy, cupy_syncbn
{use}
loaded = {{"cupy", "mpi4py", "torch", "jax", "ml_dtypes"}} & set(sys.modules)
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
