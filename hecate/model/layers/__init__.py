"""What stands in a base model's layers beside experts: attention, norms, LoRA, activation checkpointing."""
