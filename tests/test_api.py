"""The public names: each is documented in full, used in a test, and its examples run as they are written."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import cupy_syncbn

pytestmark = pytest.mark.serial

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(cupy_syncbn.__path__, "cupy_syncbn.")
    if module.name.rpartition(".")[2] not in ("__main__", "cupy_backend")  # which runs, which needs CuPy
]

# numpydoc's rules that are not the house's: a summary that starts on the second line and ends in a full stop,
# types that tell more than a name, an extended summary, sections See Also and Examples everywhere.
FORM = {
    "GL01",
    "GL02",
    "GL03",
    "SS05",
    "SS06",
    "ES01",
    "SA01",
    "EX01",
    "RT02",
    "RT03",
    "PR06",
    "PR08",
    "PR09",
}

# What raises no error of its own, and must not say that it did.
NO_ERRORS = {
    "Gradients",
    "Module",
    "Parameter",
    "ProcessGroup",
    "Sequential",
    "SingleProcessGroup",
    "default_group",
    *(f"Module.{name}" for name in ("buffers", "eval", "named_buffers", "named_modules", "named_parameters")),
    *(f"Module.{name}" for name in ("parameters", "register_buffer", "state_dict", "train", "zero_grad")),
    "Parameter.accumulate",
    "ProcessGroup.has_same_ranks",
}


def public_objects():
    """Yield (name, object) of the public names, and of the methods that their classes define first."""
    for name in cupy_syncbn.__all__:
        value = getattr(cupy_syncbn, name)
        yield name, value
        for member, found in vars(value).items() if inspect.isclass(value) else ():
            overrides = any(hasattr(base, member) for base in value.__mro__[1:])
            if not member.startswith("_") and callable(getattr(found, "__func__", found)) and not overrides:
                yield f"{name}.{member}", getattr(value, member)


PUBLIC = dict(public_objects())


def sections_of(value):
    return set(re.findall(r"^(\w[\w ]*)\n-{3,}$", inspect.getdoc(value) or "", re.MULTILINE))


def takes_arguments(value):
    return bool(set(inspect.signature(value).parameters) - {"self", "cls"})


def returns_something(value):
    return not inspect.isclass(value) and inspect.signature(value).return_annotation not in (None, "None")


@pytest.mark.parametrize("name", PUBLIC)
def test_sections(name):
    value = PUBLIC[name]
    sections = sections_of(value)
    if inspect.isclass(value) and issubclass(value, Exception):
        assert value.__doc__
        return
    assert "Parameters" in sections or not takes_arguments(value)
    assert sections & {"Returns", "Yields"} or not returns_something(value)
    assert ("Raises" in sections) != (name in NO_ERRORS)


@pytest.mark.parametrize("name", PUBLIC)
def test_form(name):
    validate = pytest.importorskip("numpydoc.validate", reason="numpydoc is not installed")
    report = validate.validate(f"cupy_syncbn.{name}")
    assert [f"{code}: {text}" for code, text in report["errors"] if code not in FORM] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module):
    assert doctest.testmod(module).failed == 0


def test_every_name_is_used():
    """In a test, or in an example that runs."""
    examples = [
        example.source
        for module in MODULES
        for test in doctest.DocTestFinder().find(module)
        for example in test.examples
    ]
    tests = [path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    words = set(re.findall(r"\w+", " ".join(examples + tests)))
    assert set(cupy_syncbn.__all__) <= words
    assert len(examples) > 20
