#!/usr/bin/env bash
# One prepared run on one GPU (an H100: nine minutes at most), in stages ordered by worth. Each has its own time and leaves
# its rows and log although another fails or the run is cut off.
#
#   OUT=results bash benchmarks/gpu/run.sh                  # every stage
#   OUT=results bash benchmarks/gpu/run.sh kernels memory   # some
#   OUT=/tmp/out bash benchmarks/gpu/run.sh --rehearse      # small sizes, without a GPU
#   OUT=/tmp/out DRY=1 bash benchmarks/gpu/run.sh           # only say what would be run
#
# Needs a Python (PYTHON, else python3) that has vLLM, transformers and, for kernels and exactness, pytest. With NEXT_SITE,
# a folder that holds a newer vLLM, the smoke test runs once more on that. In $OUT: log.txt, stages.csv (seconds and exit
# code of each stage), kernels.csv, generate.csv, step.csv, memory.csv and profile.txt.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?a folder for the results}" "${PYTHON:=python3}" "${DRY:=}" "${REHEARSE:=}"
mkdir -p "$OUT"
export OUT PYTHON DRY REHEARSE PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}" VLLM_NO_USAGE_STATS=1
STAGES=(kernels bench_kernels exactness generate memory)
GRAPHS='{"enforce_eager": false, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]}}'
EAGER='{"enforce_eager": true}'

# call COMMAND...: run it, or say it; a failure is noted and the stage goes on.
call() {
    printf '$'; printf ' %q' "$@"; echo
    [ -n "$DRY" ] && return 0
    "$@"
    local code=$?
    [ $code = 0 ] || { echo "-- failed with $code"; FAILED=$code; }
    return $code
}

# pytest, which says what failed when it is interrupted; what a shell runs in the background starts with that ignored.
PYTEST='import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(pytest.main(sys.argv[1:]))'

# tests NAME ENVIRONMENT... -- ARGUMENTS...: pytest in the background, its output to a file that `gather` prints.
tests() {
    local name=$1; shift
    local environment=()
    while [ "$1" != -- ]; do environment+=("$1"); shift; done
    shift
    [ -n "$REHEARSE" ] && set -- "$@" --collect-only
    call timeout -s INT -k 8 "$((LIMIT_S - 15))" env "${environment[@]}" "$PYTHON" -c "$PYTEST" -q --tb=short -rfEs --durations=3 \
        -p no:cacheprovider -o filterwarnings=default "$@" > "$SCRATCH/$name" 2>&1 &
    RUNNING+=("$name:$!")
}

gather() {
    local one
    for one in "${RUNNING[@]}"; do
        wait "${one#*:}" || FAILED=$?
        echo "-- ${one%%:*}"; tail -n "${1:-60}" "$SCRATCH/${one%%:*}"
    done
    RUNNING=()
}

has_pytest() {
    [ -n "$DRY" ] || "$PYTHON" -c "import pytest" || { echo "pytest is missing: its wheel, pluggy's, iniconfig's and pygments'"; FAILED=1; return 1; }
}

# 1. Every kernel against its PyTorch twin on the device. They compile on the CPU, so in several processes.
stage_kernels() {
    has_pytest || return
    local parts=(softmax_vocabularies softmax_rows draw_vocabularies "draw_rows or draws_follow" low_rank "resample or advance") rest="" part
    for part in "${parts[@]}"; do
        tests "${part// /-}" TWIST_TEST_RUNNER=v1 -- tests/test_kernels.py -k "$part"
        rest="$rest${rest:+ or }$part"
    done
    tests others TWIST_TEST_RUNNER=v1 -- tests/test_kernels.py -k "not ($rest)"
    gather
}

# 2. Kernels against the device's copy bandwidth; then other tiles; then torch.compile of the twins.
stage_bench_kernels() {
    local bench=("$PYTHON" -m benchmarks.bench_kernels --csv "$OUT/kernels.csv")
    if [ -n "$REHEARSE" ]; then
        call "${bench[@]}" --repeats 3 --parts softmax sweep --rows 2 --vocabularies 100 --no-compile
        call "${bench[@]}" --repeats 3 --parts groups --no-compile
        return
    fi
    call "${bench[@]}" --repeats 5 --parts softmax groups --no-compile
    call "${bench[@]}" --repeats 5 --parts heads --no-compile
    call "${bench[@]}" --repeats 5 --parts sweep --no-compile
    call "${bench[@]}" --repeats 5 --parts softmax --rows 64 --vocabularies 128256
    call "${bench[@]}" --repeats 5 --parts softmax heads --rows 256 --vocabularies 128256
}

# 3. vLLM against transformers, then the engine's own tests, eager and in CUDA graphs, with both schedulers.
stage_exactness() {
    call "$PYTHON" -m benchmarks.gpu.smoke --engine-args "$EAGER"
    [ -n "$REHEARSE" ] || call "$PYTHON" -m benchmarks.gpu.smoke --engine-args "$GRAPHS"
    has_pytest || return
    local graphs runner
    for graphs in 0 1; do
        for runner in v2-async v2; do
            local environment=(TWIST_TEST_RUNNER=$runner TWIST_TEST_GRAPHS=$graphs VLLM_USE_V2_MODEL_RUNNER=1)
            [ -n "$REHEARSE" ] && environment+=(TRITON_INTERPRET=1)
            tests "$runner-graphs-$graphs" "${environment[@]}" -- tests/test_engine.py tests/test_engine_exact.py -m v2
        done
    done
    gather 80
}

# 4. Twisted against plain decoding, the host's time, and a profile.
stage_generate() {
    if [ -n "$REHEARSE" ]; then
        local small=(--shape rehearsal --particles 4 --max-tokens 8 --engine-args '{"max_model_len": 256}')
        call "$PYTHON" -m benchmarks.bench_generate "${small[@]}" --heads low_rank tied --repeats 3 --eager --csv "$OUT/generate.csv"
        call "$PYTHON" -m benchmarks.bench_step "${small[@]}" --groups 2 --most 8 --repeats 1 --csv "$OUT/step.csv" --profile "$OUT/profile.txt"
        return
    fi
    local generate=("$PYTHON" -m benchmarks.bench_generate --max-tokens 256 --repeats 3 --csv "$OUT/generate.csv")
    call "${generate[@]}" --shape llama-3.2-1b --heads low_rank tied --particles 16 64 256 --engine-args "$(with_cache "$GRAPHS" 8)" \
        || call "${generate[@]}" --shape llama-3.2-1b --heads low_rank tied --particles 16 64 256 --engine-args "$(with_cache "$EAGER" 8)"
    call "$PYTHON" -m benchmarks.bench_step --shape llama-3.2-1b --particles 16 64 --groups 1 4 --max-tokens 32 --repeats 1 \
        --engine-args "$(with_cache "$GRAPHS" 8)" --csv "$OUT/step.csv" --profile "$OUT/profile.txt"
    call "${generate[@]}" --shape llama-3.1-8b --heads low_rank tied --particles 16 64 256 --engine-args "$(with_cache "$GRAPHS" 16)"
    call "${generate[@]}" --shape llama-3.2-1b --heads low_rank --particles 64 --ess-threshold 1 --engine-args "$(with_cache "$GRAPHS" 8)"
}

# with_cache JSON GIB: the same arguments with a KV cache of that size.
with_cache() {
    echo "${1%\}}, \"kv_cache_memory_bytes\": $(($2 * 2 ** 30))}"
}

# 5. KV blocks of one group, a group that is preempted, and a newer vLLM.
stage_memory() {
    local sizes=(--particles 64 --max-tokens 512) arguments=$GRAPHS
    [ -n "$REHEARSE" ] && sizes=(--shape rehearsal --particles 4 --max-tokens 70 --thresholds 0 1) arguments=$EAGER
    call "$PYTHON" -m benchmarks.bench_memory "${sizes[@]}" --engine-args "$arguments" --csv "$OUT/memory.csv"
    [ -z "${NEXT_SITE:-}" ] || call env PYTHONPATH="$PWD:$NEXT_SITE:$PYTHONPATH" "$PYTHON" -m benchmarks.gpu.smoke --engine-args "$EAGER"
}

declare -A LIMIT=([kernels]=80 [bench_kernels]=75 [exactness]=120 [generate]=180 [memory]=75)

if [ "${1:-}" = --stage ]; then  # in the process that `timeout` watches
    FAILED=0 RUNNING=() SCRATCH=$(mktemp -d)
    trap 'gather; rm -rf "$SCRATCH"' EXIT
    trap 'exit 124' TERM
    "stage_$2"
    exit "$FAILED"
fi

if [ "${1:-}" = --rehearse ]; then REHEARSE=1; shift; fi
export REHEARSE
[ $# -gt 0 ] && STAGES=("$@")
for stage in "${STAGES[@]}"; do
    [ -n "${LIMIT[$stage]:-}" ] || { echo "unknown stage $stage: one of ${!LIMIT[*]}"; exit 2; }
done
[ -s "$OUT/stages.csv" ] || echo "date,stage,seconds,limit_s,exit_code" > "$OUT/stages.csv"
{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null || echo "no GPU"
    [ -n "$DRY" ] || "$PYTHON" -c "
import importlib.metadata as m, sys, torch
print('Python', sys.version.split()[0], *(f'{n} {m.version(n)}' for n in ('vllm', 'torch', 'triton', 'transformers')), 'CUDA', torch.version.cuda)"
} 2>&1 | tee -a "$OUT/log.txt"
for stage in "${STAGES[@]}"; do
    limit=${LIMIT[$stage]} begin=$SECONDS
    [ -n "$REHEARSE" ] && limit=$((20 * limit))
    echo "==== $stage, at most $limit s" | tee -a "$OUT/log.txt"
    LIMIT_S=$limit timeout -k 5 "$limit" bash "$0" --stage "$stage" 2>&1 | tee -a "$OUT/log.txt"
    code=${PIPESTATUS[0]}
    echo "$(date +%F),$stage,$((SECONDS - begin)),$limit,$code" >> "$OUT/stages.csv"
    echo "==== $stage: exit code $code after $((SECONDS - begin)) s" | tee -a "$OUT/log.txt"
done
