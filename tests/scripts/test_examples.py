"""scripts/examples, each run as its user would."""

import importlib.util
import os
import re
import sys

import numpy as np
import pytest
from mpi4py import MPI

from cupy_syncbn import SingleProcessGroup
from support.launcher import OVERSUBSCRIBE, REPOSITORY, clean_environment, find_launcher, run, vendor_of

pytestmark = [pytest.mark.launch, pytest.mark.mpi_skip]

DEADLINE = 60
DIRECTORY = REPOSITORY / "scripts" / "examples"
NEEDS = {"torch_ddp": "torch", "jax_jit": "jax"}
SHORT = {"domain_decomposition": ["--seeds", "1"]}
EXAMPLES = sorted(path.stem for path in DIRECTORY.glob("*.py"))

# Runs an example without what it is about: each rank keeps its own statistics.
SABOTAGE = """
import runpy, sys
from cupy_syncbn.comm.call import Collective
whole = Collective.sum

def within_rank(self, vector, **options):
    return 0 if self.call.direction in ("forward", "backward") else whole(self, vector, **options)

Collective.sum = within_rank
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_example(name, ranks, *arguments, program=(), deadline=DEADLINE):
    """Run an example, on ranks of its own unless that is 0; return its exit status and output."""
    library = NEEDS.get(name)
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"{name}.py needs {library}, which is not installed")
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    variables = clean_environment(
        PYTHONPATH=path, PYTHONWARNINGS="error", OMP_NUM_THREADS="1", CUPY_SYNCBN_TIMEOUT="30"
    )
    if os.geteuid() == 0:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [sys.executable, *program, str(DIRECTORY / f"{name}.py"), *arguments]
    if ranks:
        options = OVERSUBSCRIBE.get(vendor_of(sys.executable), [])
        command[1:1] = ["-m", "mpi4py"]
        command[:0] = [find_launcher(sys.executable), *options, "-n", str(ranks)]
    return run(command, variables, deadline)


def numbers(pattern, output):
    """Return the numbers in the groups of a pattern, which occurs once."""
    (found,) = re.findall(pattern, output)
    return [float(number) for number in ([found] if isinstance(found, str) else found)]


def check_training_loop(output):
    first, last = numbers(r"loss (\S+) at first, (\S+) at last", output)
    assert 1 < first < 2  # guessing among three classes costs log(3), and more when sure of it
    assert last < 0.5
    assert numbers(r"within (\S+) of one process's", output)[0] <= 1e-9


def check_convert_model(output):
    assert "4 of 4 layers converted, parameters kept: True" in output
    assert max(numbers(r"y (\S+), dx (\S+), tolerance", output)) <= 1e-5


def check_node_groups(output, groups=1):
    found, distance = numbers(r"in (\d+) group\(s\), (\S+) from one group of all", output)
    assert found == groups
    assert distance > 0.1 if groups > 1 else distance < 1e-5
    assert numbers(r"y (\S+), tolerance", output)[0] <= 1e-5
    assert max(numbers(r"weight.grad (\S+), bias.grad (\S+), tolerance", output)) <= 1e-4


def check_mixed_precision(output):
    parts = dict(re.findall(r"(?m)(?:^|\s)(float16|bfloat16), (\d rank[\s\S]+?not scaled: \S+)", output))
    assert parts.keys() == {"float16", "bfloat16"}
    for dtype, text in parts.items():
        mean, naive = numbers(r"mean (\S+), by a \w+ sum (\S+)", text)
        assert 299 < mean < 310
        assert naive == float("inf") if dtype == "float16" else naive < 30
        assert max(numbers(r"mean within (\S+), variance within (\S+),", text)) <= 1e-6
        scaled, scale, plain = numbers(r"gradient within (\S+), .* by (\S+); not scaled: (\S+)", text)
        assert scaled <= 1e-2
        # In float16, what is not scaled is lost, and the first scale, 2**48, is too large.
        assert (plain > 0.1, scale < 2.0**47) == (dtype == "float16",) * 2


def check_deviations(output, names, tolerance=1e-5):
    found = dict(re.findall(r"  (\S+): (\S+)", output))
    assert list(found) == names
    assert max(map(float, found.values())) <= tolerance


def check_torch_ddp(output):
    parameters = ["0.weight", "1.weight", "1.bias", "3.weight", "3.bias"]
    state = [*parameters[:3], "1.running_mean", "1.running_var", "1.num_batches_tracked", *parameters[3:]]
    names = ["dx", *(f"{name}.grad" for name in parameters), *state]
    parts = re.split(r"(?m)^(sum|mean), .*$", output)
    assert parts[1::2] == ["mean", "sum"]
    for part in parts[2::2]:
        check_deviations(part, names)


def check_siamese(output):
    parameters = ["0.weight", "1.weight", "1.bias", "2.weight", "3.weight", "3.bias", "4.weight"]
    check_deviations(output, [*(f"module.{name}" for name in parameters), "loss"])


def check_jax_jit(output):
    check_deviations(output, ["y", "dx", "dweight", "dbias", "running_mean", "running_var"])


def check_masked_batch(output):
    (counts,) = re.findall(r"with \[(.*)\] valid positions", output)
    counts = [int(count) for count in counts.split(", ")]
    assert len(set(counts)) == len(counts)
    assert (0 in counts) == (len(counts) > 2)
    check_deviations(output, ["y", "dx", "dweight", "dbias", "running_mean", "running_var"], 1e-12)


WAYS = ["local BatchNorm", "SyncBatchNorm", "one process"]


def check_domain_decomposition(output, seeds=1):
    ranks = int(*numbers(r"(\d+) rank\(s\)", output))
    rows = re.findall(rf"(?m)^({'|'.join(WAYS)}) +(\S+) +(\S+)% +(\S+)$", output)
    assert [name for name, *_ in rows] == WAYS * seeds
    for seed in range(seeds):
        _, errors, differences = zip(
            *(map(float, row[1:]) for row in rows[3 * seed : 3 * seed + 3]), strict=True
        )
        assert 0 < errors[2] < 30  # without a prediction it is 100
        assert errors[1] == errors[2]
        assert errors[0] == errors[2] if ranks == 1 else errors[0] >= 2 * errors[2]
        assert differences[1] <= 1e-10
        assert differences[0] <= 1e-10 if ranks == 1 else differences[0] > 0.1
    assert output.rstrip().endswith(": yes")


def test_a_training_loop_goes_on_from_its_checkpoint(tmp_path):
    """On another number of ranks, with the same losses; what it had not saved is done again."""
    file = str(tmp_path / "state.npz")
    status, output = run_example("training_loop", 2, "--steps", "120", "--checkpoint", file)
    assert status == 0, output
    assert "goes on" not in output
    status, output = run_example("training_loop", 3, "--checkpoint", file)
    assert status == 0, output
    assert "goes on from step 100 of 200" in output
    check_training_loop(output)


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.long) for ranks in (1, 4))])
def test_domain_decomposition(ranks):
    status, output = run_example("domain_decomposition", ranks, deadline=200)
    assert status == 0, output
    check_domain_decomposition(output, seeds=3)


def test_domain_decomposition_on_a_gpu(fast_cupy):
    """The GPU's numbers are the CPU's: on the emulator where there is no GPU."""
    specification = importlib.util.spec_from_file_location("example", DIRECTORY / "domain_decomposition.py")
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    samples, ways = example.draw_samples(0, 3), []
    for xp in (np, fast_cupy):
        slab = example.Slab(MPI.COMM_SELF, xp)
        network = example.make_network(slab, 0)
        ways.append(example.Way("", network, slab, SingleProcessGroup()))
        ways[-1].train(samples)
        ways[-1].validate(samples)
    assert isinstance(ways[1].parameters[0].data, fast_cupy.ndarray)
    ways[1].network.to("cpu")
    assert example.largest_difference(ways[1], ways[0]) <= 1e-10
    np.testing.assert_allclose(ways[1].error, ways[0].error, rtol=1e-10)


def test_more_ranks_than_planes_is_an_error():
    status, output = run_example("domain_decomposition", 25)
    assert status != 0
    assert "24 planes cannot be split over 25 ranks" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("ranks", [0, 3])
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, ranks):
    status, output = run_example(name, ranks, *SHORT.get(name, []))
    assert status == 0, output
    assert f"{ranks or 1} rank(s)" in output
    globals()[f"check_{name}"](output)  # each example has its check


@pytest.mark.parametrize(("size", "groups"), [(1, 4), (3, 2)])
def test_node_groups(size, groups):
    status, output = run_example("node_groups", 4, "--ranks-per-group", str(size))
    assert status == 0, output
    check_node_groups(output, groups)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_notices_local_statistics(tmp_path, name):
    """The negative control: without the exchange, each example says how far off it is, and fails."""
    program = tmp_path / "sabotaged.py"
    program.write_text(SABOTAGE)
    status, output = run_example(name, 2, *SHORT.get(name, []), program=[str(program)])
    assert status == 1, output
    assert "2 rank(s)" in output
    assert "Traceback" not in output
    with pytest.raises(AssertionError):
        globals()[f"check_{name}"](output)


# A batch so large that JAX copies it in a thread, and one core, for which it has one thread.
ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
with open(sys.argv[1]) as file:
    source = file.read()
larger = source.replace("3, 4, 5, 5", "32, 4, 96, 96")
assert larger != source
exec(compile(larger, sys.argv[1], "exec"))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to a core here")
def test_jax_callback_on_one_core_does_not_wait_for_itself(tmp_path):
    program = tmp_path / "one_core.py"
    program.write_text(ONE_CORE)
    status, output = run_example("jax_jit", 0, program=[str(program)])
    assert status is not None, "it did not end"
    check_jax_jit(output)
