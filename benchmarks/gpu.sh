#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that a machine with an NVIDIA GPU is wanted for: builds the package, runs the tests of the ops on the device,
# compute-sanitizer on some of them, and the benchmarks beside torch.
#
#     benchmarks/gpu.sh [--out FOLDER] [--limit SECONDS] [STEP...]
#
#   build     the package into build/gpu-site, and what ptxas says of the kernels
#   test      tests/ops on the device, and the engine's answers there beside the CPU's
#   portable  the same for rows of logits, with kernels for sm_80 alone: the paths that Hopper doesn't take
#   sanitize  memcheck, racecheck, synccheck and initcheck on small cases
#   bench     every op beside torch, then the engine on random weights of 0.5 and 8 billion parameters
#   all       build, test, bench, portable, sanitize; also where none is named
#
# --limit is for all steps together: what no time is left for is skipped. FOLDER (default: $OUT, else build/gpu) gets
# summary.txt, build.log (with what ptxas says), test.log, sanitize.log and bench.log as they are written, ops.json and
# engine-SHAPE.json. Wants Python (PYTHON, else python3) with torch for CUDA, numpy, pytest, hypothesis, pip,
# scikit-build-core, pybind11, cmake and ninja, the CUDA toolkit and a C++ compiler; says what of that is missing,
# leaves out what needs it, takes nothing from a package index. A step that fails doesn't keep the next from running;
# the exit status is that of the worst.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${OUT:-$root/build/gpu}
limit=86400
steps=()
refuse() {
  echo "gpu.sh: $1; see benchmarks/gpu.sh --help" >&2
  exit 2
}
while [[ $# -gt 0 ]]; do
  case $1 in
    --out) folder=${2:-} && [[ -n $folder ]] || refuse "--out wants a folder"; shift 2 ;;
    --limit) limit=${2:-} && [[ $limit =~ ^[1-9][0-9]*$ ]] || refuse "--limit wants seconds"; shift 2 ;;
    -h | --help) sed -n '3,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    build | test | portable | sanitize | bench) steps+=("$1"); shift ;;
    all) steps+=(build test bench portable sanitize); shift ;;
    *) refuse "unknown step or option '$1'" ;;
  esac
done
[[ ${#steps[@]} -gt 0 ]] || steps=(build test bench portable sanitize)

mkdir -p "$folder" || exit 1
folder=$(cd "$folder" && pwd)
cd "$root" || exit 1
[[ -d /usr/local/cuda/bin ]] && PATH=$PATH:/usr/local/cuda/bin
python=${PYTHON:-python3}
site=$root/build/gpu-site portable_site=$root/build/gpu-portable-site
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
worst=0
: > "$folder/summary.txt"

note() { echo "$*" | tee -a "$folder/summary.txt"; }
ended() { # STATUS NAME SECONDS
  local how="status $1"
  [[ $1 -eq 0 ]] && how=ok
  [[ $1 -eq 124 || $1 -eq 137 ]] && how="out of time"
  note "$2: $how, $3 s"
  [[ $1 -gt $worst ]] && worst=$1
  return 0
}
left() { echo $((limit - SECONDS - 5)); }

# run LOG NAME MOST COMMAND...: a command with its log, for at most MOST seconds. At their end it is interrupted, so
# that pytest and the benchmarks still say what they have.
run() {
  local log=$folder/$1.log name=$2 most=$3 begin=$SECONDS status=0
  shift 3
  [[ $(left) -lt $most ]] && most=$(left)
  if [[ $most -lt 10 ]]; then
    ended 124 "$name (skipped)" 0
    return 1
  fi
  echo "== $name, up to $most s: $*" | tee -a "$log"
  echo "$name: begun" >> "$folder/summary.txt"
  timeout --signal=INT --kill-after=15 "$most" "$@" >> "$log" 2>&1 || status=$?
  tail -n 4 "$log"
  ended "$status" "$name" $((SECONDS - begin))
  return "$status"
}

# --- What is here, and what isn't
{
  echo "commit $(git describe --always --dirty 2> /dev/null || echo unknown), $(date -u +%FT%TZ), $(nproc) cores"
  if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit \
      --format=csv,noheader 2>&1
  else
    echo "no nvidia-smi"
  fi
  nvcc --version 2> /dev/null | tail -n 2 | head -n 1
  "$python" -c 'import sys; print("python", sys.version.split()[0])' 2>&1
} | tee -a "$folder/summary.txt"
missing=" "
lacks() { # NAME NEEDED-BY
  missing+="$1 "
  note "missing: $1, needed by $2"
}
for tool in nvcc g++ cmake ninja; do command -v $tool > /dev/null || lacks $tool "build, portable"; done
command -v compute-sanitizer > /dev/null || lacks compute-sanitizer sanitize
has_module() { "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)' "$1" 2> /dev/null; }
for module in pip scikit_build_core pybind11; do has_module $module || lacks $module "build, portable"; done
has_module numpy || lacks numpy "every step"
for module in gguf tokenizers; do has_module $module || lacks $module "the engine's tests"; done
for module in pytest hypothesis; do has_module $module || lacks $module "test, portable, sanitize"; done
if ! has_module torch; then
  lacks torch "test, portable, sanitize, bench"
elif ! said=$("$python" -c 'import torch; torch.zeros(1, device="cuda"); print(torch.__version__)' 2>&1); then
  lacks device "test, portable, sanitize, bench (torch: ${said##*$'\n'})"
else
  note "torch $said"
fi
can() { # STEP THING...: whether all things are here
  local name=$1 thing
  shift
  for thing in "$@"; do
    [[ $missing == *" $thing "* ]] || continue
    ended 3 "$name (left out: $thing is missing)" 0
    return 1
  done
}
has_package() { # STEP FOLDER: whether the package was built there
  [[ -n $(compgen -G "$2/fullbeam/_core*.so") ]] && return
  ended 3 "$1 (left out: no package in ${2#"$root"/}; run the step build)" 0
  return 1
}
can_build() { can "$1" nvcc g++ cmake ninja pip scikit_build_core pybind11 numpy; }
can_test() { can "$1" torch device numpy pytest hypothesis; }

install() { # NAME SITE BUILD-FOLDER [CMAKE-ARGUMENTS]
  rm -rf "$2"
  run build "$1" 400 env FULLBEAM_CUDA=ON CMAKE_ARGS="${4:-}" CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" \
    "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$2" -C build-dir="$3" .
}
pytest_in() { # LOG NAME MOST SITE ARGUMENTS...
  local log=$1 name=$2 most=$3 site=$4
  shift 4
  run "$log" "$name" "$most" env PYTHONPATH="$site" "$python" -m pytest --backend cuda -p no:cacheprovider -W default \
    --tb=short "$@"
}

step_build() {
  can_build build || return
  install build "$site" build/gpu-tree || return
  "$python" -m benchmarks.kernels >> "$folder/build.log" 2>&1
  (cd / && PYTHONPATH=$site "$python" -c \
    'from fullbeam import _core; print(_core.build_info(), _core.num_cuda_devices(), "device(s)")') 2>&1 |
    tail -n 1 | tee -a "$folder/summary.txt"
}
step_test() {
  can_test test && has_package test "$site" || return
  pytest_in test test 240 "$site" -v --durations=10 tests/ops
  can "engine tests" gguf tokenizers || return
  pytest_in test "engine tests" 120 "$site" -v tests/models/test_cuda.py
}
step_portable() {
  can_build portable && can_test portable || return
  install "portable build" "$portable_site" build/gpu-portable-tree -DCMAKE_CUDA_ARCHITECTURES=80 || return
  pytest_in test "portable tests" 120 "$portable_site" -v tests/ops/test_sample.py tests/ops/test_logprobs.py \
    tests/ops/test_beam_step.py
}
# One allocation per array, so that an access past its end is seen; our kernels alone, where this version can choose.
step_sanitize() {
  can sanitize compute-sanitizer && can_test sanitize && has_package sanitize "$site" || return
  local tool filter=()
  compute-sanitizer --kernel-regex kns=fullbeam true > /dev/null 2>&1 && filter=(--kernel-regex kns=fullbeam)
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck synccheck initcheck; do
    run sanitize "$tool" 150 env PYTHONPATH="$site" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "${filter[@]}" "$python" -m pytest --backend cuda -p no:cacheprovider -W default --tb=short -v --sample 60 \
      tests/ops
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}
step_bench() {
  can bench torch device numpy pytest && has_package bench "$site" || return
  run bench bench 300 env PYTHONPATH="$site" "$python" -m benchmarks ops --device cuda --out "$folder/ops.json"
  local shape
  for shape in 0.5b 8b; do
    run bench "engine $shape" 150 env PYTHONPATH="$site" "$python" -m benchmarks engine --device cuda --shape "$shape" \
      --rows 1,8,64,256 --json "$folder/engine-$shape.json"
  done
}

for step in "${steps[@]}"; do "step_$step"; done
echo "== $folder/summary.txt"
cat "$folder/summary.txt"
exit "$worst"
