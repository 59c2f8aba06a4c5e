#!/bin/sh
# Fine-tunes SmolLM2-135M on two tasks with MixLoRA experts, asks it a sum, and writes a page about the run. Needs `make install-quickstart` and .venv/bin in PATH.
set -eu
cd "$(dirname "$0")/../.."
hecate make-tasks data/examples/mixlora_quickstart --tasks chain_sum,letter_counting --train-size 400 --eval-size 20
rm -rf runs/examples/mixlora_quickstart
hecate train examples/mixlora_quickstart/config.yaml "$@"
hecate generate runs/examples/mixlora_quickstart "4 + 3 =" --system sum
hecate report runs/examples/mixlora_quickstart
