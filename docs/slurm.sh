#!/bin/bash
# The paper's run on two nodes under Slurm: change what differs on your cluster, then `sbatch
# docs/slurm.sh` in the repository's folder. Not run under a real Slurm (docs/memory-and-speed.md).
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#SBATCH --time=24:00:00 --requeue --open-mode=append --signal=B:TERM@600
export NNODES=$SLURM_JOB_NUM_NODES MASTER_PORT=29500
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export pid_file=/tmp/spin.$SLURM_JOB_ID  # on each node
# ten minutes before the end Slurm tells this shell, which tells each node's run_iterations.sh
trap 'srun --overlap bash -c "kill -TERM \$(cat $pid_file)"' TERM
srun bash -c 'echo $$ > $pid_file; export NODE_RANK=$SLURM_NODEID
  exec bash run_iterations.sh paper --run /shared/runs/paper --replicas 2' &
nodes=$!
wait $nodes || wait $nodes  # the first ends with the signal, the second with the stages
code=$?
[[ $code == 143 ]] && scontrol requeue "$SLURM_JOB_ID"  # stopped, not finished: start again
exit $code
