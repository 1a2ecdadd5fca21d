# Sourced by run_iterations.sh: reads its flags, finds the GPUs, and defines the function `stage`.
python=${PYTHON:-python}
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
recipe=paper
if [[ $# -gt 0 && $1 != -* ]]; then recipe=$1; shift; fi
flags=(--recipe "$recipe" "$@")  # never empty: bash 3.2 calls an empty array unbound
for flag in "$@"; do
  case $flag in
  -h|--help) exec "$python" "$here/generate.py" "${flags[@]}" ;;
  # refuse the flags that the loop itself sets
  --recipe*|--objective*|--iter|--iter=*|--pairs*|--theta0)
    echo "error: $flag is not for run_iterations.sh: name the recipe first (demo, small, paper)," \
      "or call the stages yourself" >&2; exit 2 ;;
  esac
done

smi() { nvidia-smi "$@" 2>/dev/null || true; }
gpus=$(smi -L | grep -c '^GPU' || true)
memory=$(smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1 | tr -dc 0-9)  # MiB
if [[ $gpus -gt 0 && -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"; gpus=${#visible[@]}
fi
nodes=${NNODES:-1}
total=$((gpus * nodes * ${memory:-102400} / 954))  # GB (954 MiB each); if unknown, assume enough
needed=$((88 + 6 * gpus * nodes))  # GB: weights, gradients, moments of a 7B model; 6 more per GPU
if [[ $recipe == paper && $total -lt $needed && ($gpus == 0 || "$*" != *--lora-rank*) ]]; then
  echo "error: the paper recipe needs 88 GB on GPUs plus 6 on each (found $total on" \
    "$((gpus * nodes)) GPUs), or one GPU with adapters (docs/lora.md);" \
    "'bash run_iterations.sh demo' runs on any laptop" >&2
  exit 2
fi
plan=$(PYTHONIOENCODING=utf-8 "$python" -m spin.checks "${flags[@]}") || exit $?
# each: GPUs of one rank of generate.py
IFS=$'\t' read -r run iterations baseline each <<<"$plan"

ranks=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))} launch=()
samplers=$((ranks / ${each:-1} + (ranks < ${each:-1})))  # generate.py's ranks, at least one
if [[ $gpus -gt 0 || $ranks -gt 1 || $nodes -gt 1 ]]; then
  where=(--standalone)
  if [[ $nodes -gt 1 ]]; then where=(--nnodes "$nodes" --node_rank "${NODE_RANK:?}" \
    --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}"); fi
  launch=(-m torch.distributed.run "${where[@]}" --nproc_per_node)
elif [[ $recipe == demo ]]; then  # one thread: the same bytes on any number of cores, no slower
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

did=0 child=
# Runs a stage unless its result is there. If a kill has left the stage's temporary folder, the
# stage runs again, whatever is there.
stage() {
  local result=$1 script=$2 temporary=generated.part by=$python number=$ranks; shift 2
  [[ $script == train.py ]] && temporary=checkpoint
  if [[ $script == generate.py ]]; then by=${GENERATE_PYTHON:-$by} number=$samplers; fi
  # finished: the result is there, and no temporary folder beside it
  [[ -e $run/$result && ! -e $run/${result%/*}/$temporary ]] && return
  did=1; set -m  # own process group: a signal to ours reaches the stage once, through leave()
  # -- : torchrun would take our --run for its own --run-path
  "$by" ${launch[@]+"${launch[@]}" "$number" --} "$here/$script" "${flags[@]}" --run "$run" "$@" &
  child=$!
  set +m; wait "$child"
}
# else a signal would end bash and not the stage: pass it on, and the stage may save a checkpoint
leave() { trap '' INT TERM HUP; kill -TERM $child 2>/dev/null && wait "$child" || true; exit 143; }
trap leave INT TERM HUP
