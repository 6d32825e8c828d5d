"""Experts spread over ranks: meshes, the exchange of tokens, data parallelism, clipping."""

from lina.parallel.clip import clip_grad_norm_
from lina.parallel.ddp import DataParallel, ddp
from lina.parallel.dispatch import Route, collect, dispatch
from lina.parallel.experts import ExpertParameter, expert_parameters
from lina.parallel.mesh import Groups, ep_rank, ep_size, groups, local_count, mesh, shard

__all__ = [
    "DataParallel", "ExpertParameter", "Groups", "Route", "clip_grad_norm_", "collect", "ddp",
    "dispatch", "ep_rank", "ep_size", "expert_parameters", "groups", "local_count", "mesh", "shard",
]
