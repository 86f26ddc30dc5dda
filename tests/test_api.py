"""The public names: each is documented in full, used in a test, and its examples run as they are written."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import cupy_syncbn
from cupy_syncbn.backends.cpu import loading

pytestmark = pytest.mark.mpi_skip

# What runs, what needs CuPy, what is C++, and what needs that.
LEFT_OUT = ("__main__", "cuda.operations", "cpu._core") + ("cpu.native",) * (loading.choice().core is None)
LEFT_OUT += tuple(f"interop.{name}" for name in ("torch", "jax") if importlib.util.find_spec(name) is None)
MODULES = [cupy_syncbn] + [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(cupy_syncbn.__path__, "cupy_syncbn.")
    if not module.name.endswith(LEFT_OUT)
]

# numpydoc's rules that are not the house's: a summary that starts on the second line and ends in a full stop,
# types that tell more than a name, an extended summary, sections See Also and Examples everywhere. And those
# on sections, about which test_sections knows more.
FORM = {
    "RT01",
    "YD01",
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
    "Record",
    "SingleProcessGroup",
    *(f"Module.{name}" for name in ("buffers", "eval", "named_buffers", "named_modules", "named_parameters")),
    *(f"Module.{name}" for name in ("parameters", "state_dict", "zero_grad")),
    *(f"Module.{name}" for name in ("modules", "children", "named_children", "apply", "extra_repr")),
    *(f"Module.{name}" for name in ("float", "double", "half", "bfloat16")),
    "Module.forget",
    "Module.requires_grad_",
    "Parameter.accumulate",
    "Parameter.requires_grad_",
    "ProcessGroup.has_same_ranks",
    "BatchNormBase.reset_running_stats",
}
NO_ERRORS_WITHIN_OTHERS = {"interop.jax.BatchNormState", "interop.jax.init_state"}


_INTERNAL_TO_GROUPS = (
    "abandon", "allreduce_checked", "allreduce_owned", "broadcast_owned", "defer", "is_given_up",
    "mailbox", "next_model", "tell_fault",
)  # fmt: skip
_INTERNAL_TO_MPI = (
    "allreduce_into", "broadcast_into", "gather_numbers", "gather_objects", "broadcast_object", "messages",
)  # fmt: skip
# Methods of public classes that only the package itself calls: a sentence is enough.
INTERNAL = {
    *(f"ProcessGroup.{name}" for name in _INTERNAL_TO_GROUPS),
    *(f"MPIProcessGroup.{name}" for name in _INTERNAL_TO_MPI),
}


def public_methods(value):
    """Yield (method, whether it overrides another of the package) of a class, private bases' methods too."""
    for member in dir(value):
        found = getattr(value, member)
        own = getattr(found, "__module__", None) or ""  # not what tuples and exceptions bring
        if member.startswith("_") or not callable(found) or not own.startswith("cupy_syncbn"):
            continue
        _, *bases = [base for base in value.__mro__ if member in vars(base)]
        yield found, any(base.__module__.startswith("cupy_syncbn") for base in bases)


def public_objects():
    """Yield (name, object) of the public names, and of their methods, each by the class that defines it.

    Overrides are left out: the method that they override is documented, and help() shows it.
    """
    for name in cupy_syncbn.__all__:
        value = getattr(cupy_syncbn, name)
        yield name, value
        for found, overrides in public_methods(value) if inspect.isclass(value) else ():
            if not overrides and found.__qualname__ not in INTERNAL:
                yield found.__qualname__, found
    for module in MODULES:
        if module.__name__ in ("cupy_syncbn.interop.torch", "cupy_syncbn.interop.jax"):
            for name in module.__all__:
                yield f"{module.__name__.removeprefix('cupy_syncbn.')}.{name}", getattr(module, name)


PUBLIC = dict(public_objects())


def sections_of(value):
    """Return the names of the sections of a docstring that say something."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}$", inspect.getdoc(value) or "", flags=re.MULTILINE)
    return {name for name, text in zip(parts[1::2], parts[2::2], strict=True) if text.strip()}


def takes_arguments(value):
    """Tell whether there are parameters to document: not those that pass on to a subclass or a module."""
    parameters = inspect.signature(value).parameters.values()
    named = {each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    return bool(named - {"self", "cls"})


def returns_something(value):
    """Tell whether there is a result to document: where there are no parameters, the summary says it."""
    annotation = None if inspect.isclass(value) else inspect.signature(value).return_annotation
    return annotation not in (None, "None", "Self") and takes_arguments(value)


def refers_to_another(value):
    """Tell whether the summary says where parameters and errors are documented."""
    target = re.search(r"see `(\w+)`\.?$", inspect.getdoc(value).split("\n")[0])
    return target is not None and sections_of(PUBLIC[target[1]]) >= {"Parameters", "Raises"}


@pytest.mark.parametrize("name", PUBLIC)
def test_sections(name):
    value = PUBLIC[name]
    sections = sections_of(value)
    if inspect.isclass(value) and issubclass(value, Exception):
        assert value.__doc__
        return
    if refers_to_another(value):
        return
    assert "Parameters" in sections or not takes_arguments(value)
    assert sections & {"Returns", "Yields"} or not returns_something(value)
    assert ("Raises" in sections) != (name in NO_ERRORS | NO_ERRORS_WITHIN_OTHERS)


@pytest.mark.parametrize("name", PUBLIC)
def test_form(name):
    validate = pytest.importorskip("numpydoc.validate", reason="numpydoc is not installed")
    report = validate.validate(f"{PUBLIC[name].__module__}.{PUBLIC[name].__qualname__}")
    needs_parameters = "Parameters" in sections_of(PUBLIC[name])  # as test_sections has it
    allowed = FORM | (set() if needs_parameters else {"PR01"})
    assert [f"{code}: {text}" for code, text in report["errors"] if code not in allowed] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module):
    assert doctest.testmod(module).failed == 0


def test_methods_of_layers_are_listed():
    assert set(PUBLIC) >= NO_ERRORS
    assert {"BatchNormBase.reset_running_stats", "Module.forward", "Module.backward"} <= set(PUBLIC)
    assert "BatchNormBase.forward" not in PUBLIC  # an override


def test_every_method_has_a_docstring():
    """Of its own, or of the method that it overrides."""
    classes = [value for name in cupy_syncbn.__all__ if inspect.isclass(value := getattr(cupy_syncbn, name))]
    methods = [method for value in classes for method, _ in public_methods(value)]
    assert [method.__qualname__ for method in methods if not inspect.getdoc(method)] == []


def test_every_name_is_used():
    """In a test, or in an example that runs."""
    examples = [
        example.source
        for module in MODULES
        for test in doctest.DocTestFinder().find(module)
        for example in test.examples
    ]
    tests = [path.read_text() for path in Path(__file__).parent.rglob("test_*.py") if path != Path(__file__)]
    words = set(re.findall(r"\w+", " ".join(examples + tests)))
    assert {name.rpartition(".")[2] for name in PUBLIC} <= words
    assert len(examples) > 20


def test_completion_shows_public_names():
    shown = {name for name in dir(cupy_syncbn) if not name.startswith("__")}
    assert shown == set(cupy_syncbn.__all__)
    assert {"__version__", "__doc__", "__all__"} <= set(dir(cupy_syncbn))
