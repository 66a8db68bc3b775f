"""Meshes, how arrays lie on them, and what XLA made of it: `collectives(fn, *args)`."""

from jaxmoe.sharding.hlo import Collective, collectives, read_collectives, summarise

__all__ = ["Collective", "collectives", "read_collectives", "summarise"]
