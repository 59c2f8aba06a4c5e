"""Training data: JSONL files to encoded samples, their mixture, packed rows and batches."""
