"""Measuring a machine: what exchanges, reductions and products cost, as lines over sizes.

``lina.profile`` is the function :func:`profile`; ``from lina.profile import register`` lets it measure
another transport.
"""

from lina.parallel import CostModel, ExpertShape
from lina.profile.links import exchange, exchanges, register, registered, unregister
from lina.profile.run import profile

__all__ = ["CostModel", "ExpertShape", "exchange", "exchanges", "profile", "register", "registered",
           "unregister"]
