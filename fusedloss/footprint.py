"""Deprecated: the module is fusedloss.tools.footprint."""

from .tools.footprint import Footprint as Footprint
from .tools.footprint import footprint as footprint
