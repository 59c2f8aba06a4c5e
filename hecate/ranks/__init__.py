"""This process among the ranks of the job: its numbers, its device, its process groups."""
