"""Which module serves which `model_type`."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import CheckpointError
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.deepseek_v3 import DeepseekV3
from jaxmoe.models.llama4 import Llama4
from jaxmoe.models.mixtral import Mixtral

FAMILIES: dict[str, type[Decoder]] = {
    "mixtral": Mixtral,
    "deepseek_v3": DeepseekV3,
    "kimi_k2": DeepseekV3,
    "llama4": Llama4,
    "llama4_text": Llama4,
}
# Close relatives that compute something else.
REFUSED = {
    "deepseek_v32": "its sparse attention with an indexer is not supported",
    "deepseek_v2": "its routing by softmax is not supported",
}


def family_of(hf: Mapping[str, Any]) -> type[Decoder]:
    """The module of a checkpoint, from its config's `model_type`. Raises CheckpointError naming those known."""
    kind = hf.get("model_type")
    if kind in REFUSED:
        raise CheckpointError(f"config.json: model_type={kind!r}: {REFUSED[kind]}; served are {', '.join(FAMILIES)}")
    if kind not in FAMILIES:
        remote = f"; auto_map={hf['auto_map']!r} names code of its own, which is never run" if "auto_map" in hf else ""
        raise CheckpointError(
            f"config.json: model_type={kind!r} is not one this version serves ({', '.join(FAMILIES)}){remote}"
        )
    return FAMILIES[kind]
