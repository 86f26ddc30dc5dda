"""Which transport a group chooses: asked for, by the environment, by itself."""

import pytest

import cupy_syncbn
from cupy_syncbn import MPIProcessGroup, new_group
from cupy_syncbn.comm import transports
from support import nccl_stand_in
from support.transports import TRANSPORTS, share_gpus


def transport_of(group, cupy):
    """Return the kind of transport that a group has chosen, after a sum by it."""
    buffer = cupy.ones(3)
    group.allreduce(buffer)
    assert buffer.tolist() == [group.size] * 3
    return type(group._transport)


@pytest.mark.parametrize("asked", ["argument", "variable", "default"])
def test_auto_is_nccl_where_each_rank_has_a_gpu(world, cupy, nccl, monkeypatch, asked):
    monkeypatch.delenv("CUPY_SYNCBN_TRANSPORT", raising=False)
    if asked == "variable":
        monkeypatch.setenv("CUPY_SYNCBN_TRANSPORT", "auto")
    group = new_group(transport="auto" if asked == "argument" else None)
    assert transport_of(group, cupy) is transports.NCCL


def test_auto_is_nccl_where_each_rank_sees_only_its_own_gpu(world, emulator, cupy, nccl, monkeypatch):
    """All are on device 0, of their own."""
    emulator.devices.count = 1
    assert cupy_syncbn.bind_device() == 0
    monkeypatch.setattr(cupy.cuda.runtime, "deviceGetPCIBusId", lambda device: f"0000:{world.rank:02X}:00.0")
    assert transport_of(new_group(transport="auto"), cupy) is transports.NCCL


@pytest.mark.parametrize("kind", ["auto", *TRANSPORTS], ids=str.upper)
def test_a_choice_takes_eight_bytes_from_each_rank(world, cupy, nccl, monkeypatch, kind):
    """Not the objects of all ranks, which would be 16 MiB on each of 16,384."""
    monkeypatch.delattr(MPIProcessGroup, "gather_objects")
    assert cupy_syncbn.bind_device() >= 0
    transport_of(new_group(transport=kind), cupy)


@pytest.mark.mpi(min_size=2)
def test_auto_is_mpi_where_ranks_share_a_gpu(world, cupy, nccl, monkeypatch):
    share_gpus(world, monkeypatch, cupy)
    nccl_stand_in.made.clear()
    assert transport_of(new_group(transport="auto"), cupy) is transports.HostStaged
    assert nccl_stand_in.made == []


def test_auto_is_mpi_where_a_rank_has_no_nccl(world, cupy, nccl, monkeypatch):
    nccl_stand_in.install(monkeypatch, cupy, available=world.rank != world.size - 1)
    assert transport_of(new_group(transport="auto"), cupy) is transports.HostStaged


@pytest.mark.parametrize("kind", TRANSPORTS, ids=str.upper)
def test_transport_by_the_environment(world, cupy, nccl, monkeypatch, kind):
    monkeypatch.setenv("CUPY_SYNCBN_TRANSPORT", kind)
    found = transport_of(new_group(), cupy)
    assert found.name == kind
    assert found is not transport_of(new_group(transport="mpi" if kind == "nccl" else "nccl"), cupy)


def test_unknown_transport(monkeypatch):
    with pytest.raises(ValueError, match=r"'auto', 'mpi', 'cuda-aware-mpi', 'nccl'.*got 'pigeon'"):
        new_group(transport="pigeon")
    monkeypatch.setenv("CUPY_SYNCBN_TRANSPORT", "gloo")
    with pytest.raises(ValueError, match="got 'gloo'"):
        new_group()
