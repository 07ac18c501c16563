#!/usr/bin/env bash
# A sweep in one Slurm job: sbatch pipelines/cluster/slurm.sh SWEEP.yaml FOLDER
# The folder must be on a file system shared by all nodes. Submitting the same command again
# resumes the sweep.
#SBATCH --job-name=nipq-search
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
# Running trials save their state two minutes before the time limit, and before a preemption if Slurm
# is configured to send the signal (PreemptParameters=send_user_signal).
#SBATCH --signal=B:TERM@120
set -euo pipefail

sweep=${1:?the sweep file}
out=${2:?the folder of the sweep}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# Loading packages from a shared disk may exceed Ray's default timeout for nodes.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
if [ ! -f "$HOME/.ray/auth_token" ]; then
  ray get-auth-token --generate > /dev/null
fi

# Runs on every node; the first node starts the sweep once all nodes have joined.
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  ray symmetric-run --address "${nodes[0]}:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
  nipq-search run "$sweep" --out "$out" --address auto &
running=$!
trap 'nipq-search stop "$out" || true' TERM
# `wait` returns on the signal; wait again while the sweep saves its state.
code=0
wait "$running" || code=$?
if kill -0 "$running" 2> /dev/null; then
  code=0
  wait "$running" || code=$?
fi
exit "$code"
