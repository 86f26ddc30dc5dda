"""Which core is taken, by what it says of itself and by the environment; what is told if there is none."""

import logging
import sys
import types

import numpy as np
import pytest

import cupy_syncbn
from cupy_syncbn import plan
from cupy_syncbn.backends import backend_of
from cupy_syncbn.backends.cpu import loading, sources
from support.launcher import launch

pytestmark = pytest.mark.mpi_skip

NAME = "cupy_syncbn.backends.cpu._core"


class Core(types.ModuleType):
    """Stands for a core on a processor without AVX-512."""

    def __init__(self, **attributes):
        super().__init__(NAME)
        self.VERSION, self.SOURCES = cupy_syncbn.__version__, sources.sources_hash()
        self.used = []
        self.__dict__.update(attributes)

    def levels(self):
        return {"v4": False, "baseline": True, "v3": True}

    def use(self, level):
        self.used.append(level)


@pytest.fixture
def choose(monkeypatch):
    """Return a function that lets the package choose anew, with this core and these variables."""
    for name in "CUPY_SYNCBN_ISA", "CUPY_SYNCBN_REQUIRE_CORE":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(plan, "_plans", {})  # a known kind of input is not looked at again

    def again(core, **variables):
        monkeypatch.setitem(sys.modules, NAME, core)
        for name, value in variables.items():
            monkeypatch.setenv(f"CUPY_SYNCBN_{name}", value)
        monkeypatch.setattr(loading, "_choice", loading._choose())
        loading.check.cache_clear()
        return loading.choice()

    yield again
    monkeypatch.undo()
    loading.check.cache_clear()


@pytest.mark.parametrize(
    ("asked", "isa", "status"),
    [
        ("", "v3", "compiled core, x86-64-v3"),
        ("baseline", "baseline", "compiled core, baseline"),
        ("v3", "v3", "compiled core, x86-64-v3"),
        ("numpy", "numpy", "NumPy, as CUPY_SYNCBN_ISA says"),
    ],
)
@pytest.mark.parametrize("required", ["0", "1"])
def test_choice(choose, asked, isa, status, required):
    core = Core()
    assert choose(core, ISA=asked, REQUIRE_CORE=required).isa == isa
    assert core.used == [isa] * (isa != "numpy")
    assert loading.core() is (None if isa == "numpy" else core)
    assert loading.status() == status
    loading.check()


def test_largest_level_is_not_taken_unasked(choose):
    core = Core(levels=lambda: {"baseline": True, "v3": True, "v4": True})
    assert choose(core).isa == "v3"
    assert choose(core, ISA="v4").isa == "v4"
    assert loading.facts()["runnable"] == ["baseline", "v3", "v4"]


def test_machine_with_one_level(choose):
    assert choose(Core(levels=lambda: {"baseline": True})).isa == "baseline"
    assert (loading.facts()["compiled"], loading.facts()["runnable"]) == (["baseline"], ["baseline"])
    assert loading.status() == "compiled core, baseline"


@pytest.mark.parametrize(
    ("core", "asked", "words"),
    [
        (Core(), "avx2", "expected CUPY_SYNCBN_ISA to be baseline, v3, v4 or numpy (got 'avx2')"),
        (None, "avx2", "expected CUPY_SYNCBN_ISA to be baseline, v3, v4 or numpy (got 'avx2')"),
        (Core(), "v4", "of the compiled core, this processor can run baseline, v3"),
        (None, "v3", "CUPY_SYNCBN_ISA=v3 cannot be: the compiled core was not built with this installation"),
    ],
)
def test_wrong_variable_is_an_error_of_each_call(choose, core, asked, words):
    """Not of the import: the call tells the other ranks."""
    choose(core, ISA=asked)
    assert words in loading.status()
    layer = cupy_syncbn.BatchNorm1d(3)
    for _ in range(2):
        with pytest.raises(ValueError, match="CUPY_SYNCBN_ISA") as caught:
            layer(np.ones((4, 3, 7), "f4"))
        assert words in str(caught.value)


LACKS = {
    "absent": (None, "was not built with this installation"),
    "of another version": (Core(VERSION="0.0.9"), "is of version 0.0.9, and the package of"),
    "of other sources": (Core(SOURCES="0" * 64), "was built from other sources than those in"),
    "of another make": (types.ModuleType(NAME), "cannot be loaded: module"),
}


@pytest.mark.parametrize("lack", LACKS)
def test_core_that_cannot_be_taken(choose, monkeypatch, lack, caplog):
    monkeypatch.setattr(
        loading, "sources", lambda: [sources.CORE / "kernels.cpp"]
    )  # whether or not it is there
    core, words = LACKS[lack]
    assert choose(core).isa == "numpy"
    assert f"NumPy, since the compiled core {words}" in loading.status()
    assert "pip install" in loading.status()
    with caplog.at_level(logging.WARNING, "cupy_syncbn"):
        for _ in range(2):
            backend_of(np.ones(3))
    (record,) = caplog.records
    assert words in record.getMessage()
    assert "pip install" in record.getMessage()
    with pytest.raises(
        ImportError, match=f"CUPY_SYNCBN_REQUIRE_CORE is set, and the compiled core {words}.*pip"
    ):
        choose(core, REQUIRE_CORE="1")
    assert choose(core, ISA="numpy").isa == "numpy"  # is asked for, and allowed


def test_library_that_does_not_load(choose, monkeypatch):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == NAME:
                raise ImportError("_core.abi3.so: undefined\nsymbol")

    choose(None)
    monkeypatch.delitem(sys.modules, NAME)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert loading._find() == (None, "cannot be loaded: _core.abi3.so: undefined symbol")


def test_sources_that_were_removed_prove_nothing(choose, monkeypatch):
    monkeypatch.setattr(loading, "sources", list)
    assert choose(Core(SOURCES="0" * 64)).isa == "v3"


def test_hash_of_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "BACKENDS", tmp_path)
    monkeypatch.setattr(sources, "CORE", tmp_path / "cpu" / "core")
    assert sources.sources() == []
    (tmp_path / "cpu" / "core").mkdir(parents=True)
    files = [tmp_path / "formulas.h", *(tmp_path / "cpu" / "core" / name for name in ("a.hpp", "b.cpp"))]
    for path in files:
        path.write_text("int x;")
    assert sources.sources() == sorted(files)
    seen = {sources.sources_hash()}
    for path in files:
        path.write_text("int y;")
        seen.add(sources.sources_hash())
    files[1].rename(files[1].with_name("c.hpp"))
    seen.add(sources.sources_hash())
    assert len(seen) == 5
    for name in "b.cpp~", ".#b.cpp", "README.md":
        (tmp_path / "cpu" / "core" / name).write_text("no source")
    assert sources.sources_hash() in seen


WITHOUT_CORE = f"""
import sys
sys.modules[{NAME!r}] = None
import numpy, cupy_syncbn
layer = cupy_syncbn.SyncBatchNorm(3)
for _ in range(2):
    layer(numpy.ones((4, 3), "f4"))
    layer.forget()
"""


@pytest.mark.launch
def test_one_rank_says_once_that_there_is_no_core():
    variables = {"CUPY_SYNCBN_ISA": "", "CUPY_SYNCBN_REQUIRE_CORE": ""}
    _, status, output = launch(sys.executable, 3, ["-m", "mpi4py", "-c", WITHOUT_CORE], 60, **variables)
    assert status == 0, output
    assert output.count("NumPy computes on CPUs, which is slow") == 1


@pytest.mark.launch
def test_wrong_variable_of_one_rank_is_told_to_the_others():
    # Ranks end in peace: a launcher that ends all when one fails may cut short what the others say.
    code = f"""
import os
rank = os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
os.environ["CUPY_SYNCBN_ISA"] = "avx" if rank == "1" else "numpy"
try:
    exec({WITHOUT_CORE!r})
except Exception as error:
    os.write(1, f"{{type(error).__name__}}: {{error}}\\n".encode())
"""
    _, status, output = launch(sys.executable, 2, ["-c", code], 60)
    assert status == 0, output
    assert "ValueError: expected CUPY_SYNCBN_ISA to be" in output
    assert "RemoteRankError: rank 1 failed" in output
