"""The GPU benchmark without a GPU: its tables, its arithmetic, and all of its flow but the times.

The kernels run in the emulator, graphs run once and take a made-up time, and torch computes on the CPU, where
the kernels of its SyncBatchNorm are stood in for.
"""

import importlib
import json
import os
import signal
import sys
import types

import numpy as np
import pytest

from support.launcher import REPOSITORY, clean_environment, finish

pytestmark = pytest.mark.mpi_skip

FOLDER = REPOSITORY / "scripts" / "benchmarks"
SHAPES = [(3, 6, 5, 7), (9, 16)]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


@pytest.fixture
def small(gpu, monkeypatch):
    """Let the benchmark be over in seconds."""
    for name, value in {
        "QUICK": SHAPES,
        "SWEEP": SHAPES[1:],
        "LARGE": 600,
        "HOST_CALLS": 2,
        "LAUNCHES": 4,
    }.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "PATTERN", 4099)
    for effort in ("FULL", "BRIEF", "MANY"):
        monkeypatch.setattr(gpu, effort, gpu.Effort((2, 2), 0.0))


def fake(gpu, cupy):
    """Return a class of devices that run everything once, in 1 ms by us and 2 ms by torch."""

    class Fake(gpu.Gpu):
        def __init__(self, torch):
            self.cupy, self.torch = cupy, torch
            self.device, self.stream = cupy.cuda.Device(), cupy.cuda.Stream()
            self.l2_bytes = 400

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def facts(self):
            return {"name": "NVIDIA Fake 1", "driver": "1.2", "cuda_runtime": 13000}

        def free_bytes(self):
            return 1 << 30

        def to_torch(self, array):
            host = array.get()
            if host.dtype.name == "bfloat16":
                return self.torch.from_numpy(host.view(np.int16)).view(self.torch.bfloat16)
            return self.torch.from_numpy(host)

        def from_torch(self, tensor):
            tensor = tensor.detach()
            if tensor.dtype == self.torch.bfloat16:
                return cupy.asarray(tensor.view(self.torch.int16).numpy()).view(gpu.data_type("bfloat16"))
            return cupy.asarray(tensor.numpy())

        def read(self, array):
            array.sum()

        def capture(self, work, by_torch):
            kept = work()
            return types.SimpleNamespace(seconds=2e-3 if by_torch else 1e-3, kept=kept)

        def timed(self, work):
            if isinstance(work, types.SimpleNamespace):
                return lambda: (work.seconds,)
            return lambda: (work(), (3e-3,))[1]

    return Fake


# ---- Kernels of torch.nn.SyncBatchNorm, which has none for the CPU; their parameters have torch's names ----
def _sums(tensor):
    return tensor.sum(dim=[0, *range(2, tensor.dim())])


def _channels(values, like):
    return values.float().reshape(1, -1, *[1] * (like.dim() - 2))


def cpu_kernels(torch, calls):
    """Return stand-ins by name, which add their arguments to `calls`."""

    def batch_norm_stats(input, eps):  # noqa: A002
        x, n = input.float(), input.numel() // input.shape[1]
        mean = _sums(x) / n
        return mean, (_sums((x - _channels(mean, x)) ** 2) / n + eps) ** -0.5

    def batch_norm_gather_stats_with_counts(
        input,  # noqa: A002
        mean,
        invstd,
        running_mean,
        running_var,
        momentum,
        eps,
        counts,
    ):
        assert mean.shape == invstd.shape == (1, input.shape[1])
        assert counts.shape == (1,)
        n = float(counts[0])
        running_mean.lerp_(mean[0], momentum)
        running_var.lerp_((invstd[0] ** -2 - eps) * n / (n - 1), momentum)
        return mean[0], invstd[0]

    def batch_norm_elemt(input, weight, bias, mean, invstd, eps):  # noqa: A002
        normalized = (input.float() - _channels(mean, input)) * _channels(invstd, input)
        return (normalized * _channels(weight, input) + _channels(bias, input)).to(input.dtype)

    def batch_norm_backward_reduce(grad_out, input, mean, invstd, weight, input_g, weight_g, bias_g):  # noqa: A002
        assert input_g
        assert weight_g
        assert bias_g
        dy = grad_out.float()
        sum_dy, sum_dy_xmu = _sums(dy), _sums(dy * (input.float() - _channels(mean, input)))
        return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy

    def batch_norm_backward_elemt(grad_out, input, mean, invstd, weight, sum_dy, sum_dy_xmu, count):  # noqa: A002
        assert count.dtype == torch.int32
        n, x = int(count.sum()), input.float() - _channels(mean, input)
        slope = x * _channels(invstd**2 * sum_dy_xmu / n, input)
        dx = grad_out.float() - _channels(sum_dy / n, input) - slope
        return (dx * _channels(invstd * weight, input)).to(input.dtype)

    def recorded(kernel):
        def call(*arguments):
            calls.append((kernel.__name__, arguments))
            return kernel(*arguments)

        return call

    kernels = (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    )
    return {kernel.__name__: recorded(kernel) for kernel in kernels}


@pytest.fixture
def torch(monkeypatch):
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.sync_calls = []
    for name, kernel in cpu_kernels(torch, torch.sync_calls).items():
        monkeypatch.setattr(torch, name, kernel)
    yield torch
    del torch.sync_calls
    torch.set_num_threads(threads)


def rows_of(output, first):
    """Return the tables whose first heading this is."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()]
    return [row for row in rows if row[0] == first]


# ---- Pure functions ----
def test_shapes(gpu):
    assert len(gpu.MAPS) == 2 * 12 + 3
    found = gpu.cases([*gpu.MAPS, gpu.DENSE], gpu.DTYPES)
    assert len(found) == len(set(found)) == 3 * (2 * len(gpu.MAPS) + 1)
    quick = gpu.cases(gpu.QUICK, gpu.DTYPES)
    assert set(found[: len(quick)]) == set(quick)  # first, whatever becomes of the rest
    assert {case.layout for case in found} == {"channels_first", "channels_last", "dense"}
    assert gpu.Case((2, 3, 4, 4), "float16", True).nbytes == 2 * 96


def test_copies_exceed_the_cache_and_fit_into_memory(gpu):
    l2 = 50 << 20
    for case in gpu.cases([*gpu.MAPS, gpu.DENSE], gpu.DTYPES):
        copies = gpu.copies_of(case, l2, 80 << 30)
        assert copies * case.nbytes > 4 * l2
        assert copies == 1 or (copies - 1) * case.nbytes <= 4 * l2
        assert copies * case.nbytes * gpu.COPY_UNITS <= 0.8 * (80 << 30)
    assert gpu.copies_of(gpu.Case((256, 64, 112, 112), "float32", False), l2, 8 << 30) == 0


def test_traffic_of_the_layer(gpu):
    """The floor: 2 reads and 1 write forward, 4 reads and 1 write backward; a residual adds one of each."""
    forward, backward = ("statistics", "normalize"), ("reduce_gradients", "input_gradient")
    for variant, mask in (("plain", 0), ("relu", 0), ("add+relu", 100)):
        residual = 1600 * (mask > 0)
        found = [[gpu.traffic(k, variant, 1600) for k in direction] for direction in (forward, backward)]
        reads, writes = ([sum(column) for column in zip(*kernels, strict=True)] for kernels in found)
        assert reads == [2 * 1600 + residual, 1600 + mask]
        assert writes == [4 * 1600 + mask, 1600 + residual]


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((8, 4, 32, 32), False), ((8, 4, 45, 45), False), ((24, 16, 8, 8), True), ((6144, 8), False)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["plain", "relu", "add+relu"])
def test_traffic_is_what_the_kernels_move(gpu, small, cupy, dtype, variant, shape, channels_last):
    """Twice the batch on a grid of the same size moves as many more bytes, to the byte."""
    import cuda_emulator as emulator

    if not hasattr(cupy.RawModule, "prebuild"):
        pytest.skip("only the emulator counts bytes")

    def moved(times):
        case = gpu.Case((shape[0] * times, *shape[1:]), dtype, channels_last)
        kernels = gpu.Kernels(gpu.Tensors(fake(gpu, cupy)(None), case, 1), variant)
        found, blocks = {}, kernels.normalization[0].passes.launch.blocks
        for name in gpu.kernels_of(variant):
            emulator.stats.reset()
            getattr(kernels, name)(0)
            found[name] = np.array([emulator.stats.read_bytes, emulator.stats.write_bytes])
        return case.nbytes, blocks, found

    # Blocks of a fixed number, each with twice the work.
    constants = {"BLOCKS": 1, "MIN_ITEMS": 1, "MAX_ITEMS": 1 << 20}
    with gpu.launch_constants(constants):
        (nbytes, blocks, once), (_, again, twice) = moved(1), moved(2)
    assert blocks == again
    odd = np.prod(shape[2:]) % 2 == 1
    for name in once:
        more, expected = twice[name] - once[name], np.array(gpu.traffic(name, variant, nbytes))
        # The elements before and behind the vectors have masks of their own.
        if odd and variant == "add+relu":
            assert (more >= expected).all()
            assert (more <= 1.1 * expected).all()
        else:
            assert (more == expected).all(), name


def test_goals(gpu):
    def result(layout, ratio_sync, ratio, share, nbytes=gpu.LARGE):
        ratios = {"torch_sync": {"graph": ratio_sync}, "batch_norm": {"graph": ratio, "eager": 9}}
        kernels = {"statistics": {"share": share}}
        common = {"name": f"4x4 {layout}", "variant": "plain", "nbytes": nbytes, "layout": layout}
        return {**common, "ratios": ratios, "kernels": kernels}

    assert [goal.met for goal in gpu.goals([])] == [None] * 5
    good = [result("channels_first", 2.5, 1.2, 0.95), result("channels_last", 1.4, 1.0, 0.9)]
    assert [goal.met for goal in gpu.goals(good)] == [True] * 5
    small = result("channels_first", 2.5, 1.2, 0.1, nbytes=gpu.LARGE - 1)  # no bandwidth is asked of it
    assert gpu.goals([*good, small])[0].met
    bad = [result("channels_first", 1.9, 0.99, 0.89), result("channels_last", 1.2, 1.0, 0.9)]
    assert [goal.met for goal in gpu.goals(bad)] == [False] * 5
    assert "worst 0.89 (statistics, plain, 4x4 channels_first), 1 of 2 reach it" in gpu.goals(bad)[0].figure


# ---- The whole of it ----
def run_main(gpu, cupy, folder, *arguments, torch=None):
    # The emulator is slow, and the machine may be busy; a later --budget-s among the arguments counts.
    options = ["--output", str(folder), "--budget-s", "3600", *arguments]
    status = gpu.main(options, make_gpu=lambda _: fake(gpu, cupy)(torch))
    paths = list(folder.glob("gpu-nvidia-fake-1*.json"))
    assert len(paths) == 1
    return status, json.loads(paths[0].read_text())


def test_without_torch(gpu, small, fast_cupy, tmp_path, capsys):
    arguments = ("--quick", "--no-torch", "--dtypes", "float32", "float16", "bfloat16")
    status, record = run_main(gpu, fast_cupy, tmp_path, *arguments)
    output = capsys.readouterr().out
    assert status == 0
    assert record["error"] is None
    assert record["not_measured"] == []
    assert record["gpu"]["name"] == "NVIDIA Fake 1"
    assert {"commit", "date", "versions", "command"} <= record.keys()
    assert str(REPOSITORY) not in json.dumps(record)
    assert len(record["results"]) == 3 * 3 * 3  # types, variants, shapes and layouts
    assert rows_of(output, "shape") == [
        row
        for _ in range(3 * 3)
        for row in (
            ["shape", "variant", "MiB", "copy GB/s", "read GB/s", *gpu.KERNELS],
            ["shape", "variant", *gpu.KERNELS],
            [
                "shape",
                "variant",
                "forward",
                "backward",
                "eager",
                *["torch_sync", "eager", "batch_norm", "eager"],
                "by",
            ],
        )
    ]
    for result in record["results"]:
        assert list(result["kernels"]) == gpu.kernels_of(result["variant"])
        launches = 4 // result["copies"] * result["copies"] if result["copies"] <= 4 else result["copies"]
        for kernel, entry in result["kernels"].items():
            assert entry["bytes"] == sum(gpu.traffic(kernel, result["variant"], result["nbytes"]))
            assert entry["us"] == pytest.approx(1e3 / launches, rel=1e-4)
            _, written = gpu.traffic(kernel, result["variant"], result["nbytes"])
            measure = (2 if written else 1) * result["nbytes"]  # a copy, or a reading
            assert entry["share"] == pytest.approx(entry["bytes"] / measure, rel=1e-4)
            assert entry["modelled_us"] is None  # of a device that the model does not know
        assert 0 < result["error"]["ours"] < gpu.TOLERANCE[result["dtype"]]
        assert result["ratios"] == {}
    assert [goal["met"] for goal in record["goals"]] == [True, None, None, None, None]
    assert record["host_us"].keys() == {"ours"}
    picture = list(tmp_path.glob("*.png"))
    assert len(picture) == (importlib.util.find_spec("matplotlib") is not None)


def test_with_torch(gpu, small, fast_cupy, torch, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "import_gpu_torch", lambda: torch)
    arguments = ("--quick", "--dtypes", "float32", "bfloat16")
    status, record = run_main(gpu, fast_cupy, tmp_path, *arguments, torch=torch)
    assert status == 0, record["error"]
    for result in record["results"]:
        rivals = {"batch_norm"} | ({"torch_sync"} if result["variant"] == "plain" else set())
        assert result["ratios"].keys() == rivals
        assert result["error"].keys() == rivals | {"ours"}  # all of them compute the same
        assert result["batch_norm_backend"] in ("Native", "unknown")
        assert result["notes"] == []
        for ratios in result["ratios"].values():
            assert ratios["graph"] == pytest.approx(2)
            assert ratios["eager"] == pytest.approx(1)
    # 2 times torch's SyncBatchNorm kernels is the goal for channels-first data, and 2 is what the times say.
    assert [goal["met"] for goal in record["goals"]][1:] == [True] * 4
    assert record["host_us"].keys() == {"ours", "torch_sync", "batch_norm"}
    assert "torch_sync" in capsys.readouterr().out


def test_rival_that_cannot_be_captured_is_a_note(gpu, small, fast_cupy, torch, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "import_gpu_torch", lambda: torch)
    base = fake(gpu, fast_cupy)

    class Refusing(base):
        def capture(self, work, by_torch):
            if by_torch:
                raise RuntimeError("no graphs today")
            return super().capture(work, by_torch)

    folder = ["--output", str(tmp_path)]
    options = ["--quick", "--dtypes", "float32", *folder]
    assert gpu.main(options, make_gpu=lambda _: Refusing(torch)) == 0
    (path,) = tmp_path.glob("*.json")
    for result in json.loads(path.read_text())["results"]:
        assert all("no graphs today" in note for note in result["notes"])
        assert len(result["notes"]) == 2 * len(result["ratios"])
        assert all("graph" not in ratios and "eager" in ratios for ratios in result["ratios"].values())


def test_wrong_result_stops_it(gpu, small, fast_cupy, tmp_path, capsys, monkeypatch):
    right = gpu.Ours.forward

    def wrong(self, i):
        y = right(self, i)
        if self.tensors.case.dtype == "float16":
            y[0] = y[0] * 1.1
        return y

    monkeypatch.setattr(gpu.Ours, "forward", wrong)
    status, record = run_main(gpu, fast_cupy, tmp_path, "--quick", "--no-torch")
    assert status == 1
    assert "3x6x5x7 float16, plain: " in record["error"]
    assert "is off by" in capsys.readouterr().err
    assert {result["dtype"] for result in record["results"]} == {"float32"}  # what was measured is kept
    assert record["not_measured"][0] == "3x6x5x7 float16"


def test_nan_is_wrong(gpu, small, fast_cupy):
    tensors = gpu.Tensors(fake(gpu, fast_cupy)(None), gpu.Case((2, 3, 4, 4), "float32", False), 1)
    results = gpu.Ours(tensors, "plain").results()
    errors = gpu.check(tensors, "plain", "ours", results)
    assert errors.keys() == {"y", "evaluated", "dx", "dweight", "dbias", "running_mean", "running_var"}
    assert max(errors.values()) < 1e-6
    results["dx"][0, 0, 0, 0] = float("nan")
    with pytest.raises(gpu.WrongResultError, match="dx of ours is off by nan"):
        gpu.check(tensors, "plain", "ours", results)


def test_budget_and_termination(gpu, small, fast_cupy, tmp_path, monkeypatch):
    status, record = run_main(gpu, fast_cupy, tmp_path, "--quick", "--no-torch", "--budget-s", "1e-9")
    assert status == 0
    assert record["results"] == []
    assert len(record["not_measured"]) == 2 * 3
    before = signal.getsignal(signal.SIGTERM)
    real = gpu.measure_layers

    def terminated(tensors, *arguments):
        if tensors.case.channels_last:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(tensors, *arguments)

    monkeypatch.setattr(gpu, "measure_layers", terminated)
    status, record = run_main(gpu, fast_cupy, tmp_path, "--quick", "--no-torch")
    assert status == 1
    assert record["error"] == "TimeoutError: terminated"
    assert {result["layout"] for result in record["results"]} == {"channels_first", "dense"}
    assert signal.getsignal(signal.SIGTERM) is before


def test_launch_constants(gpu, small, fast_cupy, tmp_path):
    before = gpu.launch.ROW_BYTES
    arguments = ("--quick", "--no-torch", "--dtypes", "float32", "--row-bytes", "16", "--blocks", "1")
    status, record = run_main(gpu, fast_cupy, tmp_path, *arguments)
    assert status == 0, record["error"]
    assert record["launch"] == {"BLOCKS": 1, "ROW_BYTES": 16}
    assert before == gpu.launch.ROW_BYTES
    monstrous = gpu.Case((2048, 1024), "float16", False)
    with gpu.launch_constants({"ROW_BYTES": 4096}), pytest.raises(ValueError, match="lower --row-bytes"):
        gpu.launch_of(fake(gpu, fast_cupy)(None), monstrous)


def test_constants_change_launches_that_are_known(gpu, fast_cupy):
    """A sweep would measure the same launch again and again."""
    case = gpu.Case((64, 5, 300), "float32", False)
    kernels = gpu.Kernels(gpu.Tensors(fake(gpu, fast_cupy)(None), case, 1), "plain")
    usual = kernels.normalize(0).passes.launch
    with gpu.launch_constants({"MIN_ITEMS": 1, "MAX_ITEMS": 1}):
        assert kernels.normalize(0).passes.launch.splits > usual.splits
    assert kernels.normalize(0).passes.launch == usual


def test_sweep(gpu, small, fast_cupy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        gpu, "GRID", {"BLOCKS": (1, 2), "MIN_ITEMS": (1, 4), "MAX_ITEMS": (64,), "ROW_BYTES": (16, 64)}
    )
    monkeypatch.setattr(gpu, "SWEEP", [(9, 16, 16, 16), (1024, 16)])
    status, record = run_main(gpu, fast_cupy, tmp_path, "--sweep", "--dtypes", "float32", "--no-torch")
    output = capsys.readouterr().out
    assert status == 0, record["error"]
    assert [case["name"] for case in record["results"]] == [
        "9x16x16x16 float32",
        "1024x16 float32",
        "9x16x16x16 float32 NHWC",
    ]
    for case in record["results"]:
        launches = [json.dumps(row["launch"]) for row in case["launches"]]
        assert len(launches) == len(set(launches)) > 1
        assert sum(row["constants"] for row in case["launches"]) == 8
        assert all(row["us"].keys() == set(gpu.STEP) for row in case["launches"])
        loads = ["8 loads", "8 loads, streaming stores"] if "float16" in case["name"] else []
        assert [row["name"] for row in case["compiled"]] == ["streaming stores", *loads]
        assert all(row["us"].keys() == set(gpu.STEP) for row in case["compiled"])
    assert len(record["ranking"]) == 8
    assert all(entry["ratio"] == pytest.approx(1) for entry in record["ranking"])  # by the made-up times
    assert len(rows_of(output, "constants")) == 1
    assert len(rows_of(output, "case")) == 2


def test_device(gpu, small, fast_cupy, monkeypatch):
    """What the other tests replace; on a machine with a GPU, the thing itself."""
    cuda = fast_cupy.cuda
    if hasattr(fast_cupy.RawModule, "prebuild"):
        import cuda_emulator as emulator

        monkeypatch.setitem(emulator.devices.attributes, "L2CacheSize", 1 << 12)
        monkeypatch.setattr(fast_cupy, "get_default_memory_pool", cuda.MemoryPool, raising=False)
        monkeypatch.setattr(cuda.runtime, "memGetInfo", lambda: (1 << 30, 2 << 30), raising=False)
        properties = {"name": b"NVIDIA Fake 1", "multiProcessorCount": 2, "totalGlobalMem": 2 << 30}
        monkeypatch.setattr(cuda.runtime, "getDeviceProperties", lambda _: properties)
    device = gpu.Gpu(None)
    with device:
        assert cuda.get_current_stream() == device.stream
        kernels = gpu.Kernels(gpu.Tensors(device, gpu.Case((4, 6, 5, 7), "float32", True), 2), "add+relu")
        for name, written in (("normalize", kernels.y), ("input_gradient", kernels.dx)):
            expected = [array.copy() for array in written]
            graph, launches = kernels.graph(name)
            assert launches == 4
            for array in written:
                array[...] = 0
            (seconds,) = device.timed(graph)()
            assert 0 < seconds < 1
            for array, values in zip(written, expected, strict=True):
                assert abs(array - values).max() == 0
        assert device.free_bytes() >= 1 << 28
    assert cuda.get_current_stream() != device.stream
    facts = device.facts()
    assert facts["name"].startswith("NVIDIA")
    assert json.dumps(facts)


# ---- The rivals ----
def test_sync_kernels_are_called_as_torch_calls_them(gpu, small, fast_cupy, torch, monkeypatch):
    """The same kernels with the same arguments as torch's own autograd function, with one rank."""
    functions = importlib.import_module("torch.nn.modules._functions")
    tensors = gpu.Tensors(fake(gpu, fast_cupy)(torch), gpu.Case((3, 6, 5, 7), "float32", False), 1)
    ours = gpu.TorchSync(tensors, "plain")
    y, ours.saved = ours.forward(0), []
    calls, kept = list(torch.sync_calls), [torch.zeros(6), torch.ones(6)]
    torch.sync_calls.clear()
    ours.prepare()
    torch.sync_calls.clear()
    dx, dweight, dbias = ours.backward(0)
    calls += torch.sync_calls
    torch.sync_calls.clear()

    class Context:
        needs_input_grad = (True,) * 9

        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

    group = types.SimpleNamespace(_get_backend_name=lambda: "gloo")
    gather = lambda outputs, mine, *_, **__: outputs[0].copy_(mine)  # noqa: E731
    monkeypatch.setattr(functions.dist, "all_gather", gather, raising=False)
    monkeypatch.setattr(functions.dist, "all_reduce", lambda *_, **__: None, raising=False)
    reduce_op = types.SimpleNamespace(SUM=None)
    monkeypatch.setattr(functions.dist, "ReduceOp", reduce_op, raising=False)
    context = Context()
    forward, backward = functions.SyncBatchNorm.forward, functions.SyncBatchNorm.backward
    its_y = forward(context, ours.x[0], ours.weight, ours.bias, *kept, gpu.EPS, gpu.MOMENTUM, group, 1)
    its_dx, its_dweight, its_dbias, *_ = backward(context, ours.dy[0])

    assert [name for name, _ in calls] == [name for name, _ in torch.sync_calls]
    for (name, arguments), (_, its) in zip(calls, torch.sync_calls, strict=True):
        assert len(arguments) == len(its)
        for one, other in zip(arguments, its, strict=True):
            if torch.is_tensor(one):
                assert (one.shape, one.dtype) == (other.shape, other.dtype), name
                if "gather" not in name:  # that one updates the running statistics, among its arguments
                    assert torch.equal(one, other), name
            else:
                assert one == other, name
    for one, other in ((y, its_y), (dx, its_dx), (dweight, its_dweight), (dbias, its_dbias)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["batch_norm_stats", "batch_norm_elemt", "batch_norm_backward_elemt"])
def test_stand_ins_take_the_arguments_of_torch(torch, name):
    schema = str(getattr(torch.ops.aten, name).default._schema)
    kernel = cpu_kernels(torch, [])[name].__closure__
    (function,) = [cell.cell_contents for cell in kernel if callable(cell.cell_contents)]
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    parameters = [part.split()[-1] for part in schema[schema.index("(") + 1 : schema.index(")")].split(", ")]
    assert list(arguments) == parameters


# ---- Without a GPU ----
@pytest.mark.parametrize("missing", ["CuPy", "GPU"])
def test_says_what_is_missing(tmp_path, missing):
    """With a CuPy that finds no driver, or none."""
    if missing == "GPU":
        (tmp_path / "cupy.py").write_text(
            "import types\n"
            "class CUDARuntimeError(RuntimeError): pass\n"
            "def getDeviceCount(): raise CUDARuntimeError('cudaErrorNoDevice: no CUDA-capable device')\n"
            "names = {'getDeviceCount': getDeviceCount, 'CUDARuntimeError': CUDARuntimeError}\n"
            "cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(**names))\n"
        )
    else:
        (tmp_path / "cupy.py").write_text("raise ModuleNotFoundError('No module named cupy', name='cupy')\n")
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    command = [sys.executable, str(FOLDER / "gpu.py"), "--no-torch", "--output", str(tmp_path)]
    finished = finish(command, 120, env=clean_environment(PYTHONPATH=path))
    assert finished.returncode == 2
    assert "this benchmark needs a GPU: " in finished.stderr
    wanted = "CuPy is not installed" if missing == "CuPy" else "no CUDA-capable device"
    assert wanted in finished.stderr
    assert not list(tmp_path.glob("*.json"))
