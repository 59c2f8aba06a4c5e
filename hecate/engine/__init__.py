"""The FSSDP engine: plans every MoE layer, gathers its experts, dispatches tokens, computes, and reduces gradients."""
