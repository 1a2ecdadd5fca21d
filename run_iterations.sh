#!/usr/bin/env bash
# The outer loop of Algorithm 1: for t = 0 .. T-1 the opponent θ_t answers, the policy is trained against it, and
# what comes of it is evaluated. Picks up where it stopped.
#
#   bash run_iterations.sh [demo|small|paper] [--run DIR] [any flag of the stages]     (bare: paper)
#
# Several nodes: start it on each with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set, and --run on a shared disk.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=paper
if [[ $# -gt 0 && $1 != -* ]]; then recipe=$1; shift; fi
python=${PYTHON:-python}
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
for flag in "$@"; do  # what this script decides itself
  case $flag in --recipe*|--objective*|--iter|--iter=*|--pairs*|--theta0)
    echo "error: $flag is not for run_iterations.sh: name the recipe first (demo, small, paper), or call the stages yourself" >&2
    exit 2 ;;
  esac
done

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
if [[ $gpus -gt 0 && -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"; gpus=${#visible[@]}
fi
nodes=${NNODES:-1}
if [[ $recipe == paper && $((gpus * nodes)) -lt 8 ]]; then
  echo "error: the paper recipe needs 8 GPUs of 80 GB (found $((gpus * nodes))); 'bash run_iterations.sh demo' runs on any laptop" >&2
  exit 2
fi

plan=$("$python" -m spin.recipe --recipe "$recipe" "$@") || exit $?
IFS=$'\t' read -r run iterations baseline <<<"$plan"

launch=("$python")
if [[ $gpus -gt 0 ]]; then
  where=(--standalone)
  if [[ $nodes -gt 1 ]]; then
    where=(--nnodes "$nodes" --node_rank "${NODE_RANK:?}" --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}")
  fi
  # -- : torchrun would take our --run for its own --run-path
  launch=("$python" -m torch.distributed.run --nproc_per_node "$gpus" "${where[@]}" --)
elif [[ $recipe == demo ]]; then  # one thread: the same bytes on any number of cores, and a tiny model is no slower
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

did=0
stage() {  # stage RESULT SCRIPT FLAGS…: skipped where its result is there, and nothing that a kill kept it from clearing away
  local result=$1 script=$2 rest=generated.part; shift 2
  [[ $script == train.py ]] && rest=checkpoint
  [[ -e $run/$result && ! -e $run/${result%/*}/$rest ]] && return
  did=1
  "${launch[@]}" "$here/$script" --recipe "$recipe" --run "$run" "$@" & child=$!
  wait "$child"
}
# bash would die alone: the stage is told, and may checkpoint before it leaves
child=
trap '[[ -z $child ]] || { kill -TERM "$child" 2>/dev/null || true; wait "$child" || true; }; exit 143' INT TERM

stage eval.json evaluate.py --theta0 "$@"
for ((t = 0; t < iterations; t++)); do
  stage "iter$t/generated.jsonl" generate.py --iter "$t" "$@"   # y' ~ p_θt
  stage "iter$t/model" train.py --iter "$t" "$@"                # θ_{t+1}, Eq. (4.7)
  stage "iter$t/eval.json" evaluate.py --iter "$t" "$@"
  if [[ $baseline == 1 ]]; then  # continued SFT on the same batches, for comparison
    stage "sft/iter$t/model" train.py --iter "$t" "$@" --objective sft
    stage "sft/iter$t/eval.json" evaluate.py --iter "$t" "$@" --objective sft
  fi
done

newer=$(find "$run" \( -name eval.json -o -name benchmarks.json \) -newer "$run/report.html" 2>/dev/null || echo all)
if [[ $did == 0 && -z $newer ]]; then
  echo "nothing to do: $run is complete, see $run/report.html"
elif [[ ${NODE_RANK:-0} == 0 ]]; then
  "$python" -m spin.report --recipe "$recipe" --run "$run" "$@"
fi
