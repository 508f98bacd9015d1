#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that a machine with an NVIDIA GPU is wanted for, in one go: builds the wheel, runs the tests of the ops on the
# device, compute-sanitizer on small cases, and the benchmarks beside torch.
#
#     benchmarks/gpu.sh [FOLDER] [STEP...]      steps: build test sanitize bench; all of them unless named
#
# Results go to FOLDER (default: $OUT, else build/gpu): device.txt, STEP.log, ptxas.txt, ops.json, summary.txt. Needs
# Python with torch for CUDA, numpy, pytest, scikit-build-core, pybind11, cmake and ninja, and nvcc; takes nothing
# from a package index. A step that fails doesn't keep the next from running; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-${OUT:-build/gpu}}
[[ $# -gt 0 ]] && shift
steps=${*:-build test sanitize bench}
python=${PYTHON:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
site=$PWD/build/gpu-site
worst=0
: > "$folder/summary.txt"

step() { # NAME COMMAND...: runs it with its log, and notes how it ended
  local name=$1 begin=$SECONDS status=0
  shift
  echo "== $name: $*"
  PYTHONUNBUFFERED=1 "$@" > "$folder/$name.log" 2>&1 || status=$?
  tail -n 3 "$folder/$name.log"
  echo "$name: status $status, $((SECONDS - begin)) s" | tee -a "$folder/summary.txt"
  [[ $status -gt $worst ]] && worst=$status
  return 0
}
wants() { [[ " $steps " == *" $1 "* ]]; }
with_site() { PYTHONPATH=$site "$@"; }

{
  git describe --always --dirty 2> /dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv
  nvcc --version | tail -n 2
  "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
} 2>&1 | tee "$folder/device.txt"

if wants build; then
  build() {
    rm -rf "$site"
    FULLBEAM_CUDA=ON CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) "$python" -m pip install --no-build-isolation --no-deps \
      --no-index --target "$site" .
  }
  step build build
  "$python" -m benchmarks.kernels > "$folder/ptxas.txt" 2>&1
  (cd / && with_site "$python" -c 'from fullbeam import _core; print(_core.build_info(), _core.num_cuda_devices())') \
    | tee -a "$folder/summary.txt"
fi

# The tests whose backend is the device; the same ones run in emulation elsewhere.
if wants test; then
  step test with_site timeout 240 "$python" -m pytest -q tests/ops --backend cuda -p no:cacheprovider -W default
fi

# One allocation per array, so that an access past its end is seen; kernels of ours only.
if wants sanitize; then
  small="--backend cuda -p no:cacheprovider -W default -x"
  for tool in memcheck racecheck initcheck; do
    step "$tool" with_site env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 180 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 --kernel-regex kns=fullbeam "$python" -m pytest -q $small \
      tests/ops/test_rms_norm.py tests/ops/test_rope.py tests/ops/test_dequantise.py tests/ops/test_kv_write.py \
      tests/ops/test_attention_decode.py tests/ops/test_sample.py tests/ops/test_beam_step.py \
      --sample 60
  done
fi

if wants bench; then
  step bench with_site timeout 300 "$python" -m benchmarks ops --device cuda --out "$folder/ops.json"
fi

cat "$folder/summary.txt"
exit "$worst"
