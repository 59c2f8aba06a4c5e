#!/bin/sh
# Trains two LoRA adapters at once over one tiny random Llama, and asks one of them.
set -eu
cd "$(dirname "$0")/../.."
python -m examples.tiny_inputs data/examples/many_adapters --model llama
rm -rf runs/examples/many_adapters
hecate train examples/many_adapters/config.yaml "$@"
ls runs/examples/many_adapters/adapters
