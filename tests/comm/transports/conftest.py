"""A group by each transport."""

import pytest

from cupy_syncbn import (
    new_group,
)
from support.transports import TRANSPORTS


@pytest.fixture(params=TRANSPORTS, ids=str.upper)
def group(request, world, streams):
    """Return the world by one of the transports."""
    if request.param == "nccl":
        request.getfixturevalue("nccl")
    return new_group(transport=request.param, timeout=30)
