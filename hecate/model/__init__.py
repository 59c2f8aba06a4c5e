"""The base model: loading it, finding its gated FFNs by structure, and putting experts and adapters in."""
