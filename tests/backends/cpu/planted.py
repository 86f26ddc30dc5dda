"""Runs a test of test_core.py with another core: ``planted.py EXTENSION TEST DTYPE``.

All cases of the test are run that CI runs for the type. If one fails, it is printed, and the status is FOUND.
A process that a signal ends has found something too: the core has touched forbidden memory.
"""

import inspect
import itertools
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location

FOUND = 3
NAME = "cupy_syncbn.backends.cpu._core"


def load(extension):
    """Load a core in place of the package's, which is not imported yet."""
    assert not any(name.startswith("cupy_syncbn") for name in sys.modules)
    spec = spec_from_file_location(NAME, extension, loader=ExtensionFileLoader(NAME, extension))
    core = sys.modules[NAME] = module_from_spec(spec)
    spec.loader.exec_module(core)
    return core


def values_of(mark):
    """Yield the arguments of a `parametrize`, but for those that only `pytest -m long` runs."""
    names, cases = mark.args
    names = [names] if isinstance(names, str) else names
    for case in cases:
        if getattr(case, "marks", ()):
            continue
        is_marked = hasattr(case, "marks")
        values = case.values if is_marked else case if len(names) > 1 else (case,)
        yield dict(zip(names, values, strict=True))


def usual_cases(test, dtype):
    """Yield the arguments of a test's cases of a type."""
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    for parts in itertools.product(*map(values_of, marks)):
        arguments = {name: value for part in parts for name, value in part.items()}
        if arguments.get("dtype", dtype) == dtype:
            yield arguments


def main(extension, name, dtype):
    core = load(extension)
    import test_core

    assert test_core.native.normalize is core.normalize
    test = getattr(test_core, name)
    fixtures = {"use": core.use, "same_level": None}
    fixtures = {each: fixtures[each] for each in fixtures.keys() & inspect.signature(test).parameters}
    cases = list(usual_cases(test, dtype))
    assert cases, f"{name} has no case of {dtype}"
    for arguments in cases:
        try:
            test(**arguments, **fixtures)
        except AssertionError as error:
            print(f"{name} of {arguments}: {error}")
            return FOUND
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
