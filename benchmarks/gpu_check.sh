#!/usr/bin/env bash
# Builds, tests, sanitizes and measures the CUDA kernels on a machine with a GPU, which may be
# offline. Writes logs and JSON into OUT, and takes 9 minutes at most.
#
#   bash benchmarks/gpu_check.sh OUT [WHEELS]
#
# There must be python3 with torch, nvcc, a C++ compiler, compute-sanitizer, and cmake, ninja,
# pybind11, scikit-build-core, numpy and pytest; what is missing of the packages may lie in the
# folder WHEELS, and so may liger_kernel and trl, peers to be measured.
set -uo pipefail
mkdir -p "$1"
out=$(cd "$1" && pwd)
wheels=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$PWD/build/gpu-site
rm -rf "$site" "$out"/*.log "$out"/*.json
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

build() {
  if [ -n "$wheels" ]; then
    "$python" -m pip install --no-index --no-deps --target "$site" "$wheels"/*.whl || return
  fi
  "$python" -m pip install --no-index --no-deps --no-build-isolation --target "$site" . \
    --config-settings=cmake.define.TDPO_CUDA=ON || return
  "$python" -c 'import sys, tdpo_ext
cuda = tdpo_ext.backends()["cuda"]
print(cuda)
sys.exit(not cuda["compiled"])'
}

chosen="(two_alignments and 37) or gradient_at_any or (few_rows and 4097)"
chosen+=" or (base_follows and 5000) or (outside_the_vocabulary and 40) or (every_place and 33)"

# Every tensor an allocation of its own, so that what lies just outside it is nobody's.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" "${@:2}" --error-exitcode 9 \
    "$python" -m pytest -m cuda -p no:cacheprovider tests/test_cuda_kernels.py -k "$chosen"
}

report() {
  "$python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
rows = [line.split() for line in (out / "steps.log").read_text().splitlines()]
steps = {name: {"status": int(status), "seconds": int(taken)} for name, status, taken in rows}
for name, step in steps.items():
    step["last_line"] = ((out / f"{name}.log").read_text().splitlines() or [""])[-1]
(out / "gpu-check.json").write_text(json.dumps(steps, indent=1) + "\n")
(out / "steps.log").unlink()
with (out / "sanitizers.log").open("w") as log:
    for one in sorted(out.glob("*check.log")):
        log.write(f"== {one.stem}\n{one.read_text()}")
        one.unlink()
sys.exit(any(step["status"] for step in steps.values()))
PYTHON
}

export -f build sanitize
export python site wheels chosen
: >"$out/steps.log"
if step build 90 bash -c build; then
  # initcheck must see all kernels, or it takes what torch's have written for unwritten.
  step memcheck 180 bash -c 'sanitize memcheck --kernel-regex kns=tdpo' &
  step racecheck 180 bash -c 'sanitize racecheck --kernel-regex kns=tdpo' &
  step initcheck 180 bash -c 'sanitize initcheck' &
  step synccheck 180 bash -c 'sanitize synccheck --kernel-regex kns=tdpo' &
  step tests 180 "$python" -m pytest -m cuda -p no:cacheprovider
  wait
  # One after the other, alone on the machine.
  step benchmark 150 "$python" benchmarks/gpu_against_copy.py "$out"
  step fused 100 "$python" benchmarks/fused_head.py "$out" --device cuda --rounds 3
fi
report
