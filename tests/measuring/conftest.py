import pytest

from jaxmoe.api import load
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine

# Without overlap, what a step launches runs within it, and can be counted.
LIMITS = EngineConfig(max_batch=2, max_context=64, max_prefill_tokens=16, warm_up=False, overlap=False)


@pytest.fixture(scope="session")
def model():
    return load()


@pytest.fixture(scope="session")
def engine(model):
    """Compiles what it needs; idle before and after each test."""
    return Engine(model, LIMITS)
