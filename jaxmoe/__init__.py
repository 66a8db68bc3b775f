"""jaxmoe: an inference runtime for sparse mixture-of-experts language models on JAX.

    model = jaxmoe.load(mesh="dp=2,ep=4")      # the embedded demo model; or a folder from Hugging Face
    model.generate("In the beginning")         # text
    model.logits(token_ids)                    # float32 [B, T, V]
    engine = jaxmoe.Engine(model)              # continuous batching, what the server runs

Names are imported when first used, so that a process which needs no JAX does not start it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmoe.api import LoadedModel, load
    from jaxmoe.engine.config import EngineConfig
    from jaxmoe.engine.engine import Engine
    from jaxmoe.engine.request import Constraint, Output, Request, SamplingParams
    from jaxmoe.errors import JaxmoeError
    from jaxmoe.sharding.devices import virtual_devices
    from jaxmoe.sharding.mesh import MeshSpec

_HOME = {
    "Constraint": "jaxmoe.engine.request",
    "Engine": "jaxmoe.engine.engine",
    "EngineConfig": "jaxmoe.engine.config",
    "JaxmoeError": "jaxmoe.errors",
    "LoadedModel": "jaxmoe.api",
    "MeshSpec": "jaxmoe.sharding.mesh",
    "Output": "jaxmoe.engine.request",
    "Request": "jaxmoe.engine.request",
    "SamplingParams": "jaxmoe.engine.request",
    "load": "jaxmoe.api",
    "virtual_devices": "jaxmoe.sharding.devices",
}

__all__ = [
    "Constraint",
    "Engine",
    "EngineConfig",
    "JaxmoeError",
    "LoadedModel",
    "MeshSpec",
    "Output",
    "Request",
    "SamplingParams",
    "load",
    "virtual_devices",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxmoe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
