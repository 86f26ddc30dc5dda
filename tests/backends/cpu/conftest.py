"""What computes on a CPU: each implementation is to pass the tests that take `operations`."""

import pytest

from cupy_syncbn.backends.cpu import loading, specification

IMPLEMENTATIONS = {"specification": specification}
if loading.choice().core is not None:
    from cupy_syncbn.backends.cpu import native

    IMPLEMENTATIONS["core"] = native

# Arrays of the accumulator's type that a pass may take, beside its results and masks.
WORKSPACE = {"specification": 2, "core": 0}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


@pytest.fixture
def operations(implementation):
    """Return each implementation in turn."""
    return IMPLEMENTATIONS[implementation]


@pytest.fixture
def workspace(implementation):
    return WORKSPACE[implementation]
