#!/bin/sh
# Trains a tiny random Llama with two learning rates and two seeds, and compares the runs (docs/use/sweeps.md).
set -eu
cd "$(dirname "$0")/../.."
python -m examples.tiny_inputs data/examples/sweep --model llama
rm -rf runs/examples/sweep
hecate sweep examples/sweep/sweep.yaml --json data/examples/sweep/table.json "$@"
