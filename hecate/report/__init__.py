"""What a run tells people while it trains: progress, metrics.jsonl, summaries, pictures."""
