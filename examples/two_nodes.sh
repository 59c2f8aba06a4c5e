#!/bin/sh
# Train on two nodes with 8 GPUs each. Run this on both nodes with the same address, which is that of one of them.
#
#   node 1$  MEETING=10.0.0.1:29400 examples/two_nodes.sh
#   node 2$  MEETING=10.0.0.1:29400 examples/two_nodes.sh
#
# output_dir must be a folder that both nodes share. When a rank or a node fails, all ranks restart from the last checkpoint. With
# NODES=1:2 the job continues with one node if the other fails, and includes that one again when it is back.
set -eu
: "${MEETING:?HOST:PORT of one of the nodes}"
exec hecate launch \
    --nnodes "${NODES:-2}" --nproc-per-node "${RANKS:-8}" --rdzv-endpoint "$MEETING" --max-restarts 3 \
    "${CONFIG:-configs/finetune.yaml}" save_steps="${SAVE_STEPS:-50}" "$@"
