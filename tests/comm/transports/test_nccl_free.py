"""Groups of CuPy arrays that are freed."""

import gc

import pytest

from cupy_syncbn import SyncBatchNorm, new_group


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("transport", ["nccl", "mpi"])
def test_freed_group_of_cupy_arrays(world, nccl, cupy, streams, transport):
    """Sums that are under way end before; afterwards CuPy arrays find no group either."""
    group = new_group(transport=transport, timeout=20)
    for free in group.free, group.free:
        if group._comm:
            total = cupy.ones(3)
            group.allreduce(total)
        free()
        assert float(total[0]) == world.size
        with pytest.raises(RuntimeError, match="group was freed"):
            group.allreduce(cupy.ones(3))
        with pytest.raises(RuntimeError, match="group was freed"):
            SyncBatchNorm(3, device="cuda", process_group=group)(cupy.ones((4, 3), "f4"))
        group.check_errors()
    gc.collect()
    assert float(new_group(transport=transport, timeout=20).allreduce(cupy.ones(3))[0]) == world.size
