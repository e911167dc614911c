#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command, under ten minutes, without a network:
#
#     bench/gpu_check.sh [FOLDER]      results in FOLDER (default gpu-check): report.json, and a log of each step
#
# Builds the core for the GPU at hand only, with this machine's Python and torch; runs the tests marked gpu, the
# compute-sanitizer on small shapes, and the benchmark; prints one table. The working tree is copied, not changed.
#
# Needed: nvcc, a C++17 compiler, and a python3 (or PYTHON=...) with a CUDA build of torch, numpy and pytest. The build
# also wants cmake >= 3.24, from the system or from PyPI, and pybind11 >= 2.13 from PyPI (third_party/pybind11.cmake asks
# `python -m pybind11`). What the machine lacks can be brought along as wheels; where there is a network:
#     pip download --no-deps -d wheels "cmake>=3.24" ninja "pybind11>=2.13" pytest pluggy iniconfig pygments \
#         vector-quantize-pytorch einx torch-einops-utils einops frozendict
# and on the GPU machine: WHEELS=wheels bench/gpu_check.sh. They are installed beside the results, not into its Python.
# A peer of the benchmark that is not there is a row less, and so is a sanitizer that is not there or not allowed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

if ! capability=$("$python" -c '
import torch
assert torch.cuda.is_available()
print("%d%d" % torch.cuda.get_device_capability())' 2> /dev/null); then
    echo "gpu_check: no CUDA device is here, or $python has no torch that can use it; nothing was checked" >&2
    exit 1
fi
out=${1:-gpu-check}
mkdir -p "$out"
out=$(cd "$out" && pwd)
rows=$out/rows.tsv
: > "$rows"

row() { printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >> "$rows"; }  # step, outcome, seconds, note

# Seconds a step may take: what it asks for, as long as all steps together stay below ten minutes.
budget=580
allowed() { local left=$((budget - SECONDS)); echo $(($1 < left ? $1 : left > 1 ? left : 1)); }

# step NAME SECONDS COMMAND...: runs it under a time limit, its output in NAME.log, and notes the outcome.
step() {
    local name=$1 limit start=$SECONDS outcome=ok
    limit=$(allowed "$2")
    shift 2
    echo "== $name (at most $limit s)"
    timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
    local code=$?
    if [ $code = 124 ] || [ $code = 137 ]; then outcome="timed out"; elif [ $code != 0 ]; then outcome=failed; fi
    row "$name" "$outcome" $((SECONDS - start)) "$(tail -n 1 "$out/$name.log" | tr '\t' ' ' | cut -c 1-100)"
    [ "$outcome" = ok ]
}

build() {
    local architecture=$capability-real
    [ "$capability" = 90 ] && architecture=90a-real  # wgmma
    cmake -S "$out/tree" -B "$out/build" -DMEDITOK_CUDA=ON "-DMEDITOK_CUDA_ARCHITECTURES=$architecture" \
        "-DPython_EXECUTABLE=$(command -v "$python")" && cmake --build "$out/build" -j 8 &&
        cp "$out"/build/_core*.so "$out/tree/meditok/"
}

# sanitize TOOL: an outcome of its own, because a machine may refuse the tool without anything being wrong.
sanitize() {
    local name=sanitizer-$1 start=$SECONDS limit outcome note code
    if ! command -v compute-sanitizer > /dev/null; then
        row "$name" absent 0 "compute-sanitizer is not installed"
        return
    fi
    limit=$(allowed 60)
    echo "== $name (at most $limit s)"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "$limit" compute-sanitizer --tool "$1" --print-limit 20 \
        "$python" bench/gpu_small.py > "$out/$name.log" 2>&1
    code=$?
    note=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/$name.log" | tail -n 1 | tr -d '=')
    if [ $code = 124 ] || [ $code = 137 ]; then
        outcome="timed out"
    elif [ -z "$note" ]; then
        outcome=refused note=$(tail -n 1 "$out/$name.log" | tr '\t' ' ' | cut -c 1-100)
    elif [[ $note == *"SUMMARY: 0 "* ]] && grep -q '^every op ran$' "$out/$name.log"; then
        outcome=ok
    else
        outcome=failed  # the tool found something, or the program under it broke
    fi
    row "$name" "$outcome" $((SECONDS - start)) "$note"
}

mkdir -p "$out/tree"
(cd "$root" && cp -r CMakeLists.txt pyproject.toml README.md LICENSE csrc third_party meditok tests bench "$out/tree/")
rm -f "$out"/tree/meditok/_core*.so
commit=$(git -C "$root" rev-parse HEAD 2> /dev/null || echo unknown)
if [ -n "${WHEELS:-}" ]; then
    step wheels 60 "$python" -m pip install -q --no-index --no-deps --find-links "$WHEELS" --target "$out/wheels" \
        $(basename -a "$WHEELS"/*.whl | sed 's/-.*//' | sort -u)
    export PATH=$out/wheels/bin:$PATH
fi
export PYTHONPATH=$out/tree:$out/wheels
cd "$out/tree" || exit 1
export -f build
export out capability python

# The shortest and most telling first: what comes last is cut off where time runs out.
if step build 200 bash -c build; then
    step tests 120 "$python" -m pytest -q -rs -m gpu tests/ops tests/models/test_graphs.py tests/test_native.py
    for tool in memcheck racecheck initcheck; do sanitize $tool; done
    step bench 120 "$python" bench/bench_vq.py --device cuda --only ops,assign,worst,entropy,training,large \
        --json "$out/bench.json"
    step attention 60 "$python" bench/bench_attention.py --device cuda --only main,sizes,half --json "$out/attention.json"
    step growth 40 "$python" bench/bench_vq.py --device cuda --only growth --rounds 7 --json "$out/growth.json"
    step model 120 "$python" bench/bench_model.py --device cuda --model tiny vitamin-large --batch 16 --no-compiled \
        --calls tokenize detokenize --json "$out/model.json"
fi
commit=$commit "$python" bench/gpu_report.py "$out"
