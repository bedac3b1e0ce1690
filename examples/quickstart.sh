#!/usr/bin/env bash
# Sets everything up and trains a tiny Wan on examples/data: bash examples/quickstart.sh [flags of train.py]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_venv.sh"

CHECKPOINT=examples/quickstart_work/Wan2.1-T2V-tiny
if [[ ! -e $CHECKPOINT/tiny_wan.json ]]; then
    echo "Writing a tiny Wan2.1 checkpoint: the real architecture and file layout, random weights"
    python examples/tiny_wan.py "$CHECKPOINT"
fi

gpus=0
if command -v nvidia-smi >/dev/null; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
# Two pipeline stages, each on a GPU or a process on the CPU. One GPU alone takes both.
ranks=2 stages=()
[[ $gpus -eq 1 ]] && ranks=1 stages=(--set pipeline_stages=1)
[[ $gpus -eq 0 ]] && export DS_ACCELERATOR=cpu

command=(deepspeed --num_gpus=$ranks train.py --deepspeed --config examples/quickstart.toml "${stages[@]}" "$@")
echo "+ ${command[*]}"
"${command[@]}"
echo "To run commands by hand, first:  cd $PWD && source .venv/bin/activate"
