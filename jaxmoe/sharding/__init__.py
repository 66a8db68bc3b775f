"""Where arrays lie on which devices, and what XLA makes of it."""

from jaxmoe.sharding.compiled import Collective, collectives, read_collectives, summarise

__all__ = ["Collective", "collectives", "read_collectives", "summarise"]
