#!/bin/bash
# A run on Slurm under a time limit: it ends itself with a checkpoint and is queued again, until it has come to its end.
#
#   sbatch examples/slurm.sh my_run.toml
#
# Change the numbers to what your cluster has. ntasks-per-node x nodes is the number of ranks, one a GPU.
#SBATCH --job-name=reelpipe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=reelpipe_%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# So many seconds before the end every rank gets SIGUSR1. A step and a checkpoint must fit in; evaluations and saves that
# fall due just then are left to the next start.
#SBATCH --signal=USR1@300

config=${1:?name a run TOML}
requeue=85  # any status from 64 to 113: it means "not done, queue me again"
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
source .venv/bin/activate

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# Queued again, it goes on with its run; if it had only got as far as encoding, it starts, and finds that in the cache.
# Give each job an output_dir of its own: the newest run in it is taken.
resume=()
output=$(python -c 'import os, sys, toml; print(os.path.expanduser(toml.load(sys.argv[1])["output_dir"]))' "$config") ||
    exit 1
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && compgen -G "$output/*/latest" > /dev/null; then
    resume=(--resume_from_checkpoint)
fi

# srun is the launcher: the ranks are its tasks, get its signals, and their status is its own (torchrun makes it 1).
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python train.py --deepspeed --config "$@"
' _ "$config" --set requeue_exit_code=$requeue "${resume[@]}"
status=$?

if [ $status -eq $requeue ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
