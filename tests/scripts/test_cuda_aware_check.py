"""scripts/cuda_aware_check.py finds an MPI that takes addresses on the GPU, and checks it."""

import re
import sys

import numpy as np
import pytest

from cupy_syncbn.comm import transports
from support.launcher import REPOSITORY


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import cuda_aware_check

    monkeypatch.setattr(cuda_aware_check, "SHAPE", (4, 6, 5))
    monkeypatch.setattr(cuda_aware_check, "EXCHANGES", 3)
    return cuda_aware_check


def test_check_of_cuda_aware_mpi(world, cupy, streams, check, capsys):
    status = check.main()
    said = capsys.readouterr().out
    if world.size == 1:
        assert (status, said) == (2, "cuda-aware-mpi: not checked: start at least two ranks\n")
    else:
        assert status == 0
        assert ("equal to host-staged" in said) == (world.rank == 0)


@pytest.mark.mpi(min_size=2)
def test_check_finds_a_wrong_sum(world, cupy, streams, check, capsys, monkeypatch):
    add_up = transports.CUDAAware._add_up

    def wrong(self, buffer, **arguments):
        result = add_up(self, buffer, **arguments)
        if buffer.size > 1000 and self._group.rank == 1:
            buffer[5] = np.nan
        return result

    monkeypatch.setattr(transports.CUDAAware, "_add_up", wrong)
    assert check.main() == 1
    assert ("differ from host-staged" in capsys.readouterr().out) == (world.rank == 0)


def test_check_without_a_gpu(world, emulator, check, capsys):
    from cupy_syncbn import arrays

    emulator.devices.count = 0
    arrays.why_no_gpu.cache_clear()
    assert check.main() == 2
    assert "sees no GPU" in capsys.readouterr().out
    emulator.devices.count = world.size


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("codes", "status", "told"),
    [
        (["echo 'cuda-aware-mpi: equal'", "kill -SEGV $$"], 0, ["MPI 0: .*equal", "MPI 1: crashes"]),
        (["echo 'cuda-aware-mpi: equal'", "echo 'cuda-aware-mpi: differ'; exit 1"], 1, ["MPI 1: .*differ"]),
        (["echo why; exit 9"], 3, ["MPI 0: crashes, exit status 9\n    why", "no MPI library here takes"]),
        (["sleep 60"], 3, ["MPI 0: did not end within 1 s"]),
        ([], 2, ["no mpirun"]),
    ],
)  # fmt: skip
def test_search_for_a_cuda_aware_mpi(cupy, check, capfd, monkeypatch, codes, status, told):
    libraries = [check.Candidate(f"MPI {i}", ["sh", "-c", code], {}) for i, code in enumerate(codes)]
    monkeypatch.setattr(check, "candidates", lambda: libraries)
    monkeypatch.setattr(check, "DEADLINE", 1)
    assert check.search() == status
    output = capfd.readouterr().out
    for pattern in told:
        assert re.search(pattern, output), output


@pytest.mark.mpi_skip
def test_libraries_that_are_searched(check, tmp_path, monkeypatch):
    for path in "bin/mpirun", "bin/mpiexec.hydra", "lib/libmpi.so.12", "site/libucx/lib/libucp.so":
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text("#!/bin/sh\necho 'mpirun (Open MPI) 5'\n")
        (tmp_path / path).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setenv("IMPI_ROOT", str(tmp_path))
    own, with_ucx, intel = check.candidates()
    assert own.launcher == with_ucx.launcher == [str(tmp_path / "bin" / "mpirun"), "--oversubscribe"]
    assert with_ucx.environment["LD_LIBRARY_PATH"].startswith(str(tmp_path / "site" / "libucx" / "lib"))
    assert intel.launcher == [str(tmp_path / "bin" / "mpiexec.hydra")]
    assert intel.environment["MPI4PY_LIBMPI"] == str(tmp_path / "lib" / "libmpi.so.12")
