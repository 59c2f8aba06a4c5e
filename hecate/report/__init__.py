"""What a run prints and records while it trains: progress, metrics.jsonl, summaries, pictures."""
