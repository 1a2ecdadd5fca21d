#!/usr/bin/env bash
# The outer loop of Algorithm 1: for t = 0 … T−1 the opponent θ_t answers every prompt, the policy
# is trained against it, and the new model is evaluated. A rerun goes on where the last one stopped.
#
#   bash run_iterations.sh [demo|small|paper] [--run DIR] [any flag of the stages]  (default: paper)
#   NPROC_PER_NODE=2 bash run_iterations.sh demo    2 ranks; by default one per GPU, else one on CPU
#
# Several nodes: start it on each with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set, and --run
# on a shared disk. GENERATE_PYTHON: the Python of stage 1, if vLLM has its own environment.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # it was started by another shell
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# sets python, run, iterations, baseline, flags and did (1: a stage ran), and defines `stage`
source "$here/spin/run/launch.sh" "$@"

# stage RESULT SCRIPT FLAGS…: runs a stage on all ranks, or skips it if its result is there
stage eval.json evaluate.py --theta0
for ((t = 0; t < iterations; t++)); do
  stage "iter$t/generated.jsonl" generate.py --iter "$t"  # y' ~ p_θt
  stage "iter$t/model" train.py --iter "$t"               # θ_{t+1}, Eq. (4.7)
  stage "iter$t/eval.json" evaluate.py --iter "$t"
  if [[ $baseline == 1 ]]; then  # continued SFT on the same batches, for comparison
    stage "sft/iter$t/model" train.py --iter "$t" --objective sft
    stage "sft/iter$t/eval.json" evaluate.py --iter "$t" --objective sft
  fi
done

if [[ $did == 0 ]]; then echo "nothing to do: $run is complete"; fi
if [[ ${NODE_RANK:-0} == 0 ]]; then "$python" -m spin.report "${flags[@]}" --run "$run"; fi
