"""Experts and routers: what an MoE layer computes, and how its tokens choose."""
