"""What the tests within other libraries share."""

import pytest


@pytest.fixture
def torch_ranks(world):
    """Start torch.distributed among the ranks, for a test."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from cupy_syncbn.interop.torch import init_process_group

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # ranks that share cores slow each other down with more
    init_process_group()
    yield torch.distributed
    world.comm.barrier()  # a rank that ends takes the connections of the others with it
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)
