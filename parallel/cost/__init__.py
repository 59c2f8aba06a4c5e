"""The cost model: the seconds and bytes of one MoE layer under a plan."""
