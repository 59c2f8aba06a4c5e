"""Which ranks are in the job: lost and joining ranks, second copies of experts, experts that move to other owners."""
