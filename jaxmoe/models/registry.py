"""Which module serves which `model_type`."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import CheckpointError
from jaxmoe.models.mixtral import Mixtral

FAMILIES: dict[str, type[Mixtral]] = {"mixtral": Mixtral}


def family_of(hf: Mapping[str, Any]) -> type[Mixtral]:
    """The module of a checkpoint, from its config's `model_type`. Raises CheckpointError naming those known."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type={kind!r} is not one this version serves ({', '.join(FAMILIES)})"
        )
    return FAMILIES[kind]
