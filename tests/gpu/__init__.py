"""What the first person with a card runs: `make gpu-check`, see docs/use/gpu.md."""
