"""The setting of torch's GPU allocator with which ranks run, unless the user has chosen one."""

from __future__ import annotations

from collections.abc import Mapping

_NAME, _OLD_NAME = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
"""The two variables that torch reads for its allocator; the second is the name before torch 2.9, which still works."""


def gpu_allocator_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to an environment, so that a process with it runs with expandable segments; none if the user has set any.

    Replicas, and rows of tokens, have other sizes in every step. In segments of fixed sizes they leave gaps that no later tensor fits;
    expandable segments are unmapped page by page and mapped elsewhere. torch reads the variables before its first GPU tensor, so they
    may be set after it was imported. A process without a GPU ignores them.
    """
    return {} if _NAME in environment or _OLD_NAME in environment else {_NAME: "expandable_segments:True"}
