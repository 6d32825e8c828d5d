"""Experts spread over ranks: meshes, the exchange of tokens, data parallelism, clipping."""

from lina.parallel.amp import GradScaler
from lina.parallel.clip import clip_grad_norm_
from lina.parallel.ddp import DataParallel, ddp
from lina.parallel.experts import ExpertParameter, expert_parameters
from lina.parallel.fsdp import fsdp
from lina.parallel.gradients.hook import HookState, allreduce_hook
from lina.parallel.gradients.reduce import release
from lina.parallel.gradients.reduce_scatter import ReduceScatter
from lina.parallel.mesh import Groups, ep_rank, ep_size, groups, local_count, mesh, shard
from lina.parallel.plan.cost import CostModel
from lina.parallel.plan.decide import Plan, Trial
from lina.parallel.plan.lines import DTYPES, ExpertPass, ExpertShape, LayerLine, Line, Point
from lina.parallel.plan.machine import default_path, machine_facts
from lina.parallel.plan.predict import LayerLoad, Workload, predict
from lina.parallel.plan.whole import LayerTimes, layer_lines, point_of
from lina.parallel.regroup import regroup
from lina.parallel.settings import TRANSPORTS, Settings, settings
from lina.parallel.slots import Layer
from lina.parallel.state import (
    Part,
    check_stamp,
    gather,
    gathered_state_dict,
    gathering,
    stamp_or_gather,
    take_part,
)
from lina.parallel.tokens.dispatch import Route, collect, dispatch
from lina.parallel.tokens.round import round_trip
from lina.parallel.tokens.spread import moe
from lina.parallel.transport.carriers import makers
from lina.parallel.transport.nccl import Reducer

__all__ = [
    "DTYPES", "TRANSPORTS", "CostModel", "DataParallel", "ExpertParameter", "ExpertPass", "ExpertShape",
    "GradScaler", "Groups", "HookState", "Layer", "LayerLine", "LayerLoad", "LayerTimes", "Line", "Part",
    "Plan", "Point", "ReduceScatter", "Reducer", "Route", "Settings", "Trial", "Workload", "allreduce_hook",
    "check_stamp", "clip_grad_norm_", "collect", "ddp", "default_path", "dispatch", "ep_rank", "ep_size",
    "expert_parameters", "fsdp", "gather", "gathered_state_dict", "gathering", "groups", "layer_lines",
    "local_count", "machine_facts", "makers", "mesh", "moe", "point_of", "predict", "regroup", "release",
    "round_trip", "settings", "shard", "stamp_or_gather", "take_part",
]
