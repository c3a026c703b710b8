#!/usr/bin/env bash
# What a machine can measure in one command of under 9 minutes (benchmarks/README.md says what and beside whom). Each part
# has its own time limit and writes its own JSON; what fails is said, and the rest goes on.
#
#   make bench                                      in .venv
#   PYTHON=python3 bash benchmarks/gpu.sh           with another Python, e.g. the one of a container image
#
# OUT      folder of the results (bench-results)
# WHEELS   folder of wheels that are installed, offline, without dependencies and for this run only, where one of them is
#          missing: deepspeed, pydantic and ruamel.yaml with what they need; for "peers" also accelerate (with psutil) and
#          liger_kernel, beside a transformers that is installed (.whl)
# PARTS    what to run. On a GPU "tests attention norms step", and only when named: "launches", the tests that start runs
#          of their own and compare memory and time with the planner's, with nothing beside them, at most 300 s;
#          "operators", of 60 s (the loss, RoPE, activations); "tune", of 180 s, which writes the tile shapes that are
#          quickest there to OUT/tiles.json, a table for kernels/tiles/; training reads it from there; and "peers", the
#          steps of "step" beside transformers' Trainer, without and with Liger, too. PARTS=peers alone leaves them all
#          of the time, 170 s a config.
#          Without a GPU "cpu loop": "cpu" is attention, operators, generation and conversion as they run there, "loop"
#          is what training costs beside its model: the loop itself beside bare torch's, plain PyTorch's and
#          transformers' Trainer's, the start, reading rows. "attention norms operators step" only show there, at tiny
#          sizes, that what a GPU will run does run.
# CONFIGS  whose steps ("gpt2-124m llama-350m llama-1.3b"); on a GPU in rows of 2048 tokens
# VARIANTS  of a step, most important first; the time left for a config is shared out (by PARTS, "step": ours-deepspeed,
#          baseline-compiled,ours-compiled,ours-torch; "peers": ours-deepspeed,baseline-compiled,transformers,
#          transformers-liger; both: all of these; baseline-eager only when named)
# SECONDS_IN_ALL   time limit (525); the steps get what the other parts leave
#
# Exit status 1: a part failed or ran out of time; the others' results are there all the same.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-bench-results}
wheels=${WHEELS:-.whl}
limit=${SECONDS_IN_ALL:-525}
parts=" ${PARTS:-tests attention norms step} "
loop_seconds=0 # that the steps leave for what comes after them
read -ra configs <<<"${CONFIGS:-gpt2-124m llama-350m llama-1.3b}"
notes=()
failed=0
site=
mkdir -p "$out"
trap '[ -z "$site" ] || rm -rf "$site"' EXIT

left() { echo $((limit - SECONDS)); }

part() { # NAME SECONDS COMMAND...: output to the log, status noted; never longer than what is left
  local name=$1 seconds=$2 status=0 begin=$SECONDS
  shift 2
  [ "$seconds" -le "$(left)" ] || seconds=$(left)
  if [ "$seconds" -lt 5 ]; then
    notes+=("$name: left out: no time left")
    failed=1
    return 1
  fi
  echo "== $name (at most $seconds s)"
  echo "== $name: $*" >>"$out/log.txt"
  { timeout --kill-after=5 "$seconds" "$@"; } >>"$out/log.txt" 2>&1 || status=$? # with bash's word on what was killed
  case $status in
    0) notes+=("$name: done in $((SECONDS - begin)) s") ;;
    124 | 137) notes+=("$name: stopped after $seconds s") ;;
    *) notes+=("$name: FAILED with status $status after $((SECONDS - begin)) s; see $out/log.txt") ;;
  esac
  [ "$status" -eq 0 ] || failed=1
  return "$status"
}

installed() { "$python" -c 'import sys; from importlib.util import find_spec
sys.exit(any(not find_spec(name) for name in sys.argv[1:]))' "$@" 2>>"$out/log.txt"; }

test_gpu() { # NAME SECONDS ARGUMENTS...: pytest-benchmark, where installed, warns beside xdist, and warnings are errors
  local name=$1 seconds=$2 summary
  shift 2
  part "$name" "$seconds" "$python" -m pytest tests/gpu -q -p no:cacheprovider -p no:benchmark --durations 5 \
    --continue-on-collection-errors "$@" # a file whose imports are not installed must not stop the others
  local status=$?
  summary=$(grep -aE '^(=+ )?[0-9]+ (passed|failed|error|skipped)' "$out/log.txt" | tail -n 1)
  notes+=("$name: ${summary:-no summary}")
  return "$status"
}

: >"$out/log.txt"
rm -f "$out"/{attention,norms,operators,tiles,attention-cpu,operators-cpu,generation,convert,data,overhead,startup}.json \
  "$out"/step-*.json
needed=(deepspeed pydantic ruamel ruamel.yaml)
for name in accelerate liger_kernel; do # of the peers: only where they are provided
  ! compgen -G "$wheels/$name-*.whl" >/dev/null || needed+=("$name")
done
if ! installed "${needed[@]}"; then
  if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    part "install of $wheels" 60 "$python" -m pip install -q --no-index --find-links "$wheels" --no-deps --no-compile \
      --no-cache-dir --upgrade --target "$site" "$wheels"/*.whl && export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  fi
  for name in deepspeed pydantic ruamel.yaml; do
    installed "${name%%.*}" || notes+=("$name is not installed, nor in $wheels: what needs it has no number")
  done
fi

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>>"$out/log.txt"; then
  shrink=()
  steps=(--seq-len 2048)
  # several processes, because compiling several hundred small kernels is what takes the time
  parallel=()
  ! installed xdist || parallel=(-n 8)
  if [[ $parts == *" tests "* ]]; then
    test_gpu tests/gpu 150 -m "not launches" ${parallel[@]+"${parallel[@]}"}
    case $? in 3 | 4) test_gpu tests/gpu 150 -m "not launches" ;; esac # pytest itself failed: once more, in one process
  fi
  if [[ $parts == *" launches "* ]]; then test_gpu "tests/gpu that launch" 300 -m launches; fi
  if [[ $parts == *" tune "* ]]; then
    part tune 180 "$python" benchmarks/tune.py --seconds 160 --out "$out/tiles.json"
    tuned=$(grep -aE '^([0-9]+ entries are|nothing was)' "$out/log.txt" | tail -n 1)
    notes+=("tune: ${tuned:-no summary}")
  fi
  attention_seconds=110
  norm_seconds=60
else
  shrink=(--shrink)
  steps=(--shrink --steps 3)
  attention_seconds=60
  norm_seconds=60
  [ -n "${PARTS:-}" ] || parts=" cpu loop "
  for name in tune tests launches; do
    [[ $parts != *" $name "* ]] || notes+=("$name: left out: needs a GPU")
  done
  notes+=("no GPU: what is measured there, and Liger, are left out")
  cores=$(getconf _NPROCESSORS_ONLN) # nproc would say what OMP_NUM_THREADS is
  if [ -r /proc/loadavg ] && awk -v cores="$cores" '{ exit !($1 > cores) }' /proc/loadavg; then
    load=$(cut -d ' ' -f 1 /proc/loadavg)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads that wait for each other on busy cores take many times as long
    notes+=("the load average was $load on $cores cores: threads: $OMP_NUM_THREADS; seconds say little, ratios more")
  fi
fi

if [[ $parts == *" attention "* ]]; then
  part attention "$attention_seconds" "$python" benchmarks/attention.py --out "$out/attention.json" \
    --seconds $((attention_seconds - 20)) ${shrink[@]+"${shrink[@]}"}
fi

if [[ $parts == *" norms "* ]]; then
  part norms "$norm_seconds" "$python" benchmarks/norms.py --out "$out/norms.json" --seconds $((norm_seconds - 15)) \
    ${shrink[@]+"${shrink[@]}"}
fi

if [[ $parts == *" operators "* ]]; then
  part operators 60 "$python" benchmarks/operators.py --out "$out/operators.json" --seconds 45 \
    ${shrink[@]+"${shrink[@]}"}
fi

results=("$out/attention.json" "$out/norms.json" "$out/operators.json")
if [[ $parts == *" loop "* ]]; then loop_seconds=230; fi
also='' beside=''
[[ $parts != *" step "* ]] || also=,ours-compiled,ours-torch
[[ $parts != *" peers "* ]] || beside=,transformers,transformers-liger
[ -n "$also$beside" ] || configs=()
variants=${VARIANTS:-ours-deepspeed,baseline-compiled$beside$also}
num_left=${#configs[@]}
for name in ${configs[@]+"${configs[@]}"}; do
  seconds=$((($(left) - loop_seconds) / num_left))
  num_left=$((num_left - 1))
  part "step $name" "$seconds" "$python" benchmarks/step.py "configs/$name.yaml" \
    --out "$out/step-$name.json" --variants "$variants" --seconds $((seconds - 5)) ${steps[@]+"${steps[@]}"}
  results+=("$out/step-$name.json")
done

if [[ $parts == *" loop "* ]]; then
  if part "prepare of the quickstart" 150 "$python" launch/prepare.py configs/quickstart.yaml; then
    part overhead 200 "$python" benchmarks/overhead.py configs/quickstart.yaml --out "$out/overhead.json" --steps 20 \
      --warmup 2 --stages 1 --seconds 60
    part startup 90 "$python" benchmarks/startup.py configs/quickstart.yaml --out "$out/startup.json" --runs 3
  fi
  results+=("$out/overhead.json" "$out/startup.json")
fi

if [[ $parts == *" cpu "* ]]; then
  part "attention on a CPU" 90 "$python" benchmarks/attention_cpu.py --out "$out/attention-cpu.json" \
    --seq-lens 2048 512 128 --dtypes float32 --seconds 1
  part "operators on a CPU" 60 "$python" benchmarks/operators_cpu.py --out "$out/operators-cpu.json" --seconds 1.5
  part generation 90 "$python" benchmarks/generation.py --out "$out/generation.json" --models 6.5m --repeats 2
  part convert 120 "$python" benchmarks/convert.py configs/quickstart.yaml --ranks 2 --out "$out/convert.json" \
    --only "load,hf,gguf bf16,torch"
  results+=("$out/attention-cpu.json" "$out/operators-cpu.json" "$out/generation.json" "$out/convert.json")
fi

if [[ $parts == *" loop "* ]]; then
  part data 100 "$python" benchmarks/data.py --tokens 10000000 --seconds 1 --out "$out/data.json"
  results+=("$out/data.json")
fi

echo
printf '%s\n' "${notes[@]}"
echo
existing=()
for file in "${results[@]}"; do [ ! -e "$file" ] || existing+=("$file"); done
if [ "${#existing[@]}" -gt 0 ]; then
  "$python" benchmarks/table.py "${existing[@]}" | tee "$out/table.txt"
else
  echo "no results; the last lines of $out/log.txt:"
  tail -n 20 "$out/log.txt"
fi
echo "benchmarks: $SECONDS s; results in $out"
exit "$failed"
