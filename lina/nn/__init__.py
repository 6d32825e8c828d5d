"""nn.Modules over lina.ops: router, experts, shared expert and the whole layer."""

from lina.nn.experts import Experts
from lina.nn.moe import MoE
from lina.nn.router import Router, aux_loss, update_bias
from lina.nn.shared import SharedExpert

__all__ = ["Experts", "MoE", "Router", "SharedExpert", "aux_loss", "update_bias"]
