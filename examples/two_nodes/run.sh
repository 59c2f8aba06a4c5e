#!/bin/sh
# Train on two nodes. Run this on both with the same address, which is that of one of them, and as many RANKS as a node has GPUs:
#
#   node 1$  MEETING=10.0.0.1:29400 TOKEN_FILE=/shared/token RANKS=8 examples/two_nodes/run.sh
#   node 2$  MEETING=10.0.0.1:29400 TOKEN_FILE=/shared/token RANKS=8 examples/two_nodes/run.sh
#
# output_dir must be a folder that both nodes share, and so must that of TOKEN_FILE, which is made if it does not exist; HECATE_TOKEN on both
# nodes takes its place. When a rank or a node fails, all ranks restart from the last checkpoint. With
# NODES=1:2 the job continues with one node if the other fails, and includes that one again when it is back. With fssdp.redundancy=1 behind
# the command it continues without a restart, and without losing a step. Without CONFIG it trains a tiny
# random model, so that NODES=1 RANKS=2 tries the command on one machine.
set -eu
cd "$(dirname "$0")/../.."
: "${MEETING:?HOST:PORT of one of the nodes}"
if [ -z "${CONFIG:-}" ]; then
    [ -d data/examples/two_nodes/model ] || python -m examples.tiny_inputs data/examples/two_nodes --model llama
    [ "${NODES:-2}" != 1 ] || rm -rf runs/examples/two_nodes
fi
[ -z "${TOKEN_FILE:-}" ] || set -- --token-file "$TOKEN_FILE" "$@"
exec hecate launch \
    --nnodes "${NODES:-2}" --nproc-per-node "${RANKS:-8}" --rdzv-endpoint "$MEETING" --max-restarts 3 \
    "${CONFIG:-examples/two_nodes/config.yaml}" save_steps="${SAVE_STEPS:-50}" "$@"
