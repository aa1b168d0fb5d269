#!/usr/bin/env bash
# Builds, tests, sanitizes and measures the CUDA kernels on a machine with a GPU, which may be
# offline and just started. Writes logs and JSON into OUT, over those of an earlier run; all other
# files there stay. It takes about eight minutes; each step has a time limit.
#
#   bash benchmarks/gpu_check.sh OUT [WHEELS]
#   bash benchmarks/gpu_check.sh OUT --choices    only times what a card decides (choices.cuh)
#
# It needs python3 with torch, nvcc, a C++ compiler, compute-sanitizer, and the packages cmake, ninja,
# pybind11, scikit-build-core, numpy and pytest. The folder WHEELS may hold wheels of missing packages,
# of pytest-xdist, of transformers (for the step training), and of peers to be measured, liger_kernel
# and trl. The steps kernel_times and choices need nvcc alone.
set -uo pipefail
mkdir -p "$1"
out=$(cd "$1" && pwd)
choices=0 wheels=
case ${2:-} in
  "") ;;
  --choices) choices=1 ;;
  *) wheels=$(cd "$2" && pwd) || exit ;;
esac
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$PWD/build/gpu-site
# What an earlier run has left, so that nothing of it is taken for this one's.
logs=(kernel_times warm_up build memcheck racecheck initcheck synccheck tests parity
  small_calls benchmark fused training choices steps sanitizers)
reports=(gpu-check parity small-calls-cuda gpu-against-copy fused-head-cuda training-step-cuda)
rm -rf "$site"
if [ "$choices" = 0 ]; then
  (cd "$out" && rm -f "${logs[@]/%/.log}" "${reports[@]/%/.json}")
fi
export PYTHONPATH=$site PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/cuda/bin:$site/bin

# step NAME SECONDS COMMAND...: its output goes to NAME.log, its status and time to steps.log.
step() {
  local name=$1 limit=$2 started=$SECONDS status=0
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  printf '%s %s %s\n' "$name" "$status" $((SECONDS - started)) >>"$out/steps.log"
  printf '%-12s status %s after %ss: %s\n' "$name" "$status" $((SECONDS - started)) \
    "$(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c1-120)"
  return "$status"
}

# kernel_times NAME FLAGS...: builds benchmarks/kernel_times.cu as OUT/NAME.
kernel_times() {
  nvcc -O3 -std=c++17 "-arch=${CUDA_ARCH:-native}" -Icsrc "${@:2}" benchmarks/kernel_times.cu \
    -o "$out/$1"
}

own_times() { kernel_times kernel_times && "$out/kernel_times"; }

# One table: a build for each alternative, all built at once, timed one after the other.
time_choices() {
  local alternatives=(
    "as it stands:"
    "forward, 3 blocks:-DTDPO_FORWARD_BLOCKS=3"
    "forward, 4 blocks:-DTDPO_FORWARD_BLOCKS=4"
    "forward through L1:-DTDPO_FORWARD_LOAD=load_through_l1"
    "backward, 2 vectors:-DTDPO_BACKWARD_VECTORS=2"
    "backward, 8 vectors:-DTDPO_BACKWARD_VECTORS=8"
    "one side streamed:-DTDPO_BACKWARD_LOAD_ONE=__ldcs"
    "both sides streamed:-DTDPO_BACKWARD_LOAD_BOTH=__ldcs"
  )
  local number=0 one flags builds=()
  for one in "${alternatives[@]}"; do
    read -ra flags <<<"${one#*:}"
    kernel_times "choice-$number" ${flags[@]+"${flags[@]}"} &
    builds+=($!)
    number=$((number + 1))
  done
  for one in "${builds[@]}"; do wait "$one" || return; done
  number=0
  for one in "${alternatives[@]}"; do
    if [ "$number" = 0 ]; then "$out/choice-0"; else "$out/choice-$number" "${one%%:*}"; fi || return
    number=$((number + 1))
  done
}

# On a machine that has just started the first imports take over a minute.
warm_up() {
  if [ -n "$wheels" ]; then
    "$python" -m pip install --no-index --no-deps --target "$site" "$wheels"/*.whl || return
  fi
  "$python" -c 'import importlib, torch
print(torch.__version__, torch.cuda.get_device_name())
for name in ("triton", "numpy", "pytest", "trl", "liger_kernel"):
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name}: {error}")'
}

# For this card alone: all architectures take two and a half minutes on 16 slow cores.
build() {
  local architecture
  architecture=$("$python" -c 'import torch
print("%d%d-real" % torch.cuda.get_device_capability())') || return
  "$python" -m pip install --no-index --no-deps --no-build-isolation --target "$site" . \
    --config-settings=cmake.define.TDPO_CUDA=ON \
    --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$architecture" || return
  "$python" -c 'import sys, tdpo_ext
cuda = tdpo_ext.backends()["cuda"]
print(cuda)
sys.exit(not cuda["compiled"])'
}

chosen="(two_alignments and 37) or gradient_at_any or (few_rows and 4097)"
chosen+=" or (base_follows and 5000) or (outside_the_vocabulary and 40) or (every_place and 33)"
chosen+=" or one_side_is_shifted or packed_sequences"

# Each tensor is an allocation, so that an access just outside a tensor is outside any.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" "${@:2}" --error-exitcode 9 \
    "$python" -m pytest -m cuda -p no:cacheprovider tests/kernels/test_cuda_kernels.py -k "$chosen"
}

# In eight processes if pytest-xdist is installed.
run_tests() {
  local processes=()
  "$python" -c 'import xdist' 2>/dev/null && processes=(--numprocesses 8 --dist worksteal)
  "$python" -m pytest -m cuda -p no:cacheprovider ${processes[@]+"${processes[@]}"}
}

report() {
  "$python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
rows = [line.split() for line in (out / "steps.log").read_text().splitlines()]
steps = {name: {"status": int(status), "seconds": int(taken)} for name, status, taken in rows}
for name, step in steps.items():
    lines = (out / f"{name}.log").read_text(errors="replace").splitlines() or [""]
    step["last_line"] = lines[-1]
    if step["status"]:
        said = [x for x in lines if x.startswith(("E  ", "FAILED", "ERROR", "MISSED", "CUDA:"))]
        said += [x for x in lines if "error" in x.lower()] + lines[-3:]
        said = list(dict.fromkeys(said))
        step["first_failure"] = said[:3]
        print(f"\n{name} failed (status {step['status']}; 124: out of time)", *said[:3], sep="\n  ")
(out / "gpu-check.json").write_text(json.dumps(steps, indent=1) + "\n")
(out / "steps.log").unlink()
with (out / "sanitizers.log").open("w") as log:
    for name in ("initcheck", "memcheck", "racecheck", "synccheck"):
        if (one := out / f"{name}.log").exists():
            log.write(f"== {name}\n{one.read_text()}")
            one.unlink()
sys.exit(any(step["status"] for step in steps.values()))
PYTHON
}

export -f kernel_times own_times time_choices warm_up build sanitize run_tests
export out python site wheels chosen
: >"$out/steps.log"
if [ "$choices" = 1 ]; then
  step choices 300 bash -c time_choices &&
    "$python" benchmarks/read_kernel_times.py "$out/choices.log" "$out/choices.json"
  cat "$out/choices.log"
  report
  exit
fi
step kernel_times 90 bash -c own_times && cat "$out/kernel_times.log"
step warm_up 150 bash -c warm_up
if step build 200 bash -c build; then
  # initcheck must see all kernels; else it takes memory that torch's kernels wrote for unwritten.
  step memcheck 180 bash -c 'sanitize memcheck --kernel-regex kns=tdpo' &
  step racecheck 180 bash -c 'sanitize racecheck --kernel-regex kns=tdpo' &
  step initcheck 180 bash -c 'sanitize initcheck' &
  step synccheck 180 bash -c 'sanitize synccheck --kernel-regex kns=tdpo' &
  step tests 180 bash -c run_tests
  wait
  step parity 60 "$python" -m tdpo_ext.parity --devices cuda --json "$out/parity.json"
  # One after the other, alone on the machine.
  step small_calls 60 "$python" benchmarks/small_calls.py "$out" --device cuda
  step benchmark 150 "$python" benchmarks/gpu_against_copy.py "$out"
  step fused 100 "$python" benchmarks/fused_head.py "$out" --device cuda --rounds 3
  step training 90 "$python" benchmarks/training_step.py "$out" --device cuda --rounds 5
fi
report
