"""Training data: JSONL files to encoded samples, their mixture, packed sequences and batches."""
