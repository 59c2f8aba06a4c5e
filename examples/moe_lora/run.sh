#!/bin/sh
# Trains LoRA on the experts of a tiny random Qwen3-MoE, and writes the adapter with one pair for each expert, as servers read it.
set -eu
cd "$(dirname "$0")/../.."
python -m examples.tiny_inputs data/examples/moe_lora --model qwen3_moe
rm -rf runs/examples/moe_lora runs/examples/moe_lora-per-expert
hecate train examples/moe_lora/config.yaml "$@"
hecate export runs/examples/moe_lora --to per-expert -o runs/examples/moe_lora-per-expert
