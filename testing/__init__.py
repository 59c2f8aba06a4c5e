"""Helpers that tests and benchmarks share: ranks in processes, network namespaces, a tiny run, running commands, plan inputs."""
