"""Ranks, and the group of a model that some of them train."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

subgroup: Any = None


def is_enabled() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size(group: Any = None) -> int:
    return dist.get_world_size(group) if is_enabled() else 1


def get_rank(group: Any = None) -> int:
    return dist.get_rank(group) if is_enabled() else 0


def get_process_subgroup() -> Any:
    return subgroup


def get_subgroup_size() -> int:
    return get_world_size(subgroup)
