#!/bin/sh
# Train on two nodes with 8 GPUs each. Run this on both, with the same address: one of the nodes'.
#
#   node 1$  MEETING=10.0.0.1:29400 examples/two_nodes.sh
#   node 2$  MEETING=10.0.0.1:29400 examples/two_nodes.sh
#
# output_dir must be a folder that both see. When a rank or a node dies, all start again from the last checkpoint by themselves; with
# NODES=1:2 the job goes on with the one node that is left, and takes the other in when it is back.
set -eu
: "${MEETING:?HOST:PORT of one of the nodes}"
exec hecate launch \
    --nnodes "${NODES:-2}" --nproc-per-node "${RANKS:-8}" --rdzv-endpoint "$MEETING" --max-restarts 3 \
    "${CONFIG:-configs/finetune.yaml}" save_steps="${SAVE_STEPS:-50}" "$@"
