"""What a run would cost, without running it: the simulator at the command line, and dry runs of configurations. No torch."""
