"""Experts spread over ranks: meshes, the exchange of tokens, data parallelism, clipping."""

from lina.parallel.amp import GradScaler
from lina.parallel.clip import clip_grad_norm_
from lina.parallel.ddp import DataParallel, ddp
from lina.parallel.dispatch import Route, collect, dispatch
from lina.parallel.experts import ExpertParameter, expert_parameters
from lina.parallel.mesh import Groups, ep_rank, ep_size, groups, local_count, mesh, shard
from lina.parallel.reduce import release
from lina.parallel.state import (
    Part,
    check_stamp,
    gather,
    gathered_state_dict,
    gathering,
    stamp_or_gather,
    take_part,
)

__all__ = [
    "DataParallel", "ExpertParameter", "GradScaler", "Groups", "Part", "Route", "check_stamp",
    "clip_grad_norm_", "collect", "ddp", "dispatch", "ep_rank", "ep_size", "expert_parameters", "gather",
    "gathered_state_dict", "gathering", "groups", "local_count", "mesh", "release", "shard",
    "stamp_or_gather", "take_part",
]
