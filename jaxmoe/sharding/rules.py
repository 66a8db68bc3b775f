"""One table from what an axis means to the mesh axis that splits it.

Every parameter and cache names its axes by meaning.
"""

from jax.sharding import PartitionSpec as P

from jaxmoe.errors import MeshError
from jaxmoe.sharding.mesh import RANKS, MeshSpec

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    "ranks": RANKS,
    "slots": "ep",
    "heads": "tp",
    "kv_heads": "tp",
    "expert_width": "tp",
    "dense_width": "tp",
    "vocab": "tp",
}


def partition(*meaning: str | None) -> P:
    """The PartitionSpec of an array whose axes have these meanings; None is an axis that is never split."""
    return P(*(RULES[name] for name in meaning))


def check_divisible(spec: MeshSpec, **sizes: int) -> None:
    """Raises MeshError naming every axis that `tp` splits and does not divide, with the `tp` values that would work."""
    wrong = {name: size for name, size in sizes.items() if size % spec.tp}
    if wrong:
        works = [tp for tp in range(1, min(sizes.values()) + 1) if all(size % tp == 0 for size in sizes.values())]
        listed = ", ".join(f"{name}={size}" for name, size in wrong.items())
        raise MeshError(f"tp={spec.tp} does not divide {listed}; use tp in {works}")
