"""What this process is among the ranks of its job: its rank, its device and its process groups."""
