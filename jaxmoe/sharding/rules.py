"""From what an axis means to the mesh axes that split it.

Every parameter and cache names its axes by meaning; a Rules says what that comes to for one model on one mesh.
"""

import dataclasses

from jax.sharding import PartitionSpec as P

from jaxmoe.errors import MeshError
from jaxmoe.sharding.mesh import RANKS, MeshSpec

SPLIT_BY_TP = ("heads", "kv_heads", "expert_width", "shared_width", "dense_width", "vocab")


@dataclasses.dataclass(frozen=True)
class Rules:
    """spec: the mesh. split: which of SPLIT_BY_TP its `tp` axis splits; the others are whole on every device."""

    spec: MeshSpec = MeshSpec()  # noqa: RUF009 - frozen
    split: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if unknown := self.split - set(SPLIT_BY_TP):
            raise ValueError(f"{sorted(unknown)} are not among {', '.join(SPLIT_BY_TP)}")

    @classmethod
    def fit(cls, spec: MeshSpec, **sizes: int) -> "Rules":
        """Splits those axes that `tp` divides. Raises MeshError if there is none, with the `tp` that would work."""
        split = frozenset(name for name, size in sizes.items() if spec.tp > 1 and size % spec.tp == 0)
        if spec.tp > 1 and not split:
            works = [tp for tp in range(1, max(sizes.values()) + 1) if any(size % tp == 0 for size in sizes.values())]
            listed = ", ".join(f"{name}={size}" for name, size in sizes.items())
            few = ", ".join(map(str, works[:12])) + (", ..." if len(works) > 12 else "")
            raise MeshError(f"tp={spec.tp} divides none of {listed}; use tp in {few}")
        return cls(spec, split)

    def partition(self, *meaning: str | None) -> P:
        """The PartitionSpec of an array whose axes have these meanings; None is an axis that is never split."""
        return P(*map(self._axes, meaning))

    def parts(self, meaning: str) -> int:
        """How many devices along `tp` share an axis of this meaning."""
        return self.spec.tp if meaning in self.split else 1

    def _axes(self, meaning: str | None) -> str | tuple[str, ...] | None:
        if meaning is None:
            return None
        if meaning == "ranks":
            return RANKS
        if meaning == "slots":
            return self.spec.expert_axes if len(self.spec.expert_axes) > 1 else self.spec.expert_axes[0]
        if meaning not in SPLIT_BY_TP:
            raise KeyError(meaning)
        return "tp" if meaning in self.split else None
