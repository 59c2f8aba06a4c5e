"""The linear-programming bound: seconds of an MoE layer that no plan can beat. Benchmarks and tests compare planners with it."""
