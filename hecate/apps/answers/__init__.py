"""Use what a run has trained: generate answers, chat, evaluate and compare, export and merge."""
