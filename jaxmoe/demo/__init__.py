"""The embedded demo models, and how they were made."""

from pathlib import Path

from jaxmoe.errors import CheckpointError

_HERE = Path(__file__).parent
DEMO_MODELS = {name: _HERE / name for name in ("mixtral", "deepseek-v3", "llama4")}
DEMO_MODEL = DEMO_MODELS["mixtral"]


def find_model(model: str | Path | None) -> Path:
    """The folder of `demo:NAME` or of a path; None is the first demo model. Raises CheckpointError on another name."""
    if model is None:
        return DEMO_MODEL
    if not str(model).startswith("demo:"):
        return Path(model)
    name = str(model).removeprefix("demo:")
    if name not in DEMO_MODELS:
        raise CheckpointError(f"demo:{name} is not a demo model; use {' or '.join(f'demo:{n}' for n in DEMO_MODELS)}")
    return DEMO_MODELS[name]
