#!/usr/bin/env bash
# A search on Slurm, on one node or several. cluster/README.md has the steps.
#   sbatch cluster/slurm.sh search_spaces/mistral-7b.yaml /shared/mistral-7b                  # one node
#   sbatch --nodes=4 cluster/slurm.sh search_spaces/mistral-7b.yaml /shared/mistral-7b        # four
# The environment that has effir-ray is active when this is submitted, and lies, as the search space and the output
# folder do, on a file system that all nodes see. After a time limit, a failure or a preemption the same line goes on.
#SBATCH --job-name=effir-ray
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

space=${1:?"usage: sbatch cluster/slurm.sh SPACE.yaml OUT"}
out=${2:?"usage: sbatch cluster/slurm.sh SPACE.yaml OUT"}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# Who reaches Ray's ports without a token could run code as you. This one lives as long as the job.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

# Nodes start minutes apart when their images or environments are cold; Ray's own limit is 30 seconds.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=900
# /tmp/ray may belong to somebody else.
export RAY_TMPDIR="${TMPDIR:-/tmp}/ray-$SLURM_JOB_ID"

# Only the head runs the command; it then stops Ray on all nodes. Slurm would kill the other nodes' tasks at the first
# failure anyway, which is what is wanted: --resume goes on.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 \
  ray symmetric-run --address "${nodes[0]}:6379" --min-nodes "$SLURM_JOB_NUM_NODES" --disable-usage-stats -- \
  effir-ray search "$space" --out "$out" --address auto --resume

# `ray symmetric-run` ends with 0 even where Ray did not start: without rows this fails, and the job with it.
effir-ray pareto "$out"
