"""The same answers on every mesh: the trained models on 1, 2, 4 and 8 devices, however experts and heads are spread."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe.demo import DEMO_MODELS
from jaxmoe.errors import ConfigError, MeshError
from jaxmoe.models.decoder import Execution
from jaxmoe.moe import routing

SIZES = [each for each in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(each) <= 8]
STRATEGIES = ("auto", "all_to_all", "replicate")
# Every size with every family; axes of experts, strategies and redundant experts in turn, so that each meets many.
LAYOUTS = [
    (
        name,
        *size,
        "dp,ep" if size[0] > 1 and (turn + family) % 2 else "ep",
        STRATEGIES[(turn + family) % 3],
        (turn // 2 + family) % 4 * 3,
    )
    for turn, size in enumerate(SIZES)
    for family, name in enumerate(DEMO_MODELS)
]
PROMPT = list(range(5, 45))
ROUTERS = {"mixtral": "softmax_top_k", "deepseek-v3": "sigmoid_group_top_k", "llama4": "top_k_sigmoid"}


def load(name, dp, ep, tp, axes, **options):
    return jaxmoe.load(f"demo:{name}", f"dp={dp},ep={ep},tp={tp}", expert_axes=axes, **options)


@pytest.fixture(scope="module")
def alone():
    """Logits of the prompt, and what follows it greedily, on one device."""
    models = {name: load(name, 1, 1, 1, "ep") for name in DEMO_MODELS}
    return {name: (model.logits([PROMPT]), model.greedy(PROMPT, 12)) for name, model in models.items()}


@pytest.mark.parametrize(("name", "dp", "ep", "tp", "axes", "strategy", "redundant"), LAYOUTS)
def test_every_mesh_gives_the_same_logits_with_redundant_experts_or_not(
    alone, name, dp, ep, tp, axes, strategy, redundant
):
    execution = Execution(strategy=strategy)
    model = load(name, dp, ep, tp, axes, redundant_experts=redundant, execution=execution)
    logits, expected = model.logits([PROMPT]), alone[name][0]
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


# What is special to each: experts over both axes; more devices than key-value heads, then than heads; a ring of all.
@pytest.mark.parametrize("name", DEMO_MODELS)
@pytest.mark.parametrize(
    ("mesh", "axes", "redundant", "strategy"),
    [((2, 4, 1), "dp,ep", 3, "auto"), ((1, 2, 4), "ep", 0, "all_to_all"), ((1, 1, 8), "ep", 0, "auto"),
     ((1, 8, 1), "ep", 5, "replicate")],
)  # fmt: skip
def test_generation_is_the_same_token_for_token(alone, name, mesh, axes, redundant, strategy):
    execution = Execution(strategy=strategy)
    model = load(name, *mesh, axes, redundant_experts=redundant, execution=execution)
    assert model.greedy(PROMPT, 12) == alone[name][1]


def skew_routing(monkeypatch, name, skew):
    """Makes the model's routers prefer low experts: by Zipf's law, or so that all tokens choose the very same."""
    original = getattr(routing, ROUTERS[name])

    def route(logits, *rest, **named):
        rank = jnp.arange(1.0, logits.shape[-1] + 1)
        if skew == "same experts":
            return original(logits - 20 * rank, *rest, **named)
        # Logits as spread as Gumbel noise: the largest of log-probabilities with it is a draw by them.
        centred = logits - jnp.mean(logits, axis=-1, keepdims=True)
        noise = 1.28 * centred / (jnp.std(logits, axis=-1, keepdims=True) + 1e-6)
        return original(noise - 1.2 * jnp.log(rank), *rest, **named)

    monkeypatch.setattr(f"jaxmoe.models.{name.replace('-', '_')}.{ROUTERS[name]}", route)


# Queues of four rows a round, so that skew makes many rounds.
@pytest.mark.parametrize("skew", ["zipf 1.2", "same experts"])
@pytest.mark.parametrize("name", DEMO_MODELS)
def test_skewed_routing_gives_the_tokens_of_the_dense_oracle_by_every_strategy(alone, monkeypatch, name, skew):
    skew_routing(monkeypatch, name, skew)
    expected = load(name, 1, 1, 1, "ep", execution=Execution(strategy="dense")).greedy(PROMPT, 12)
    assert expected != alone[name][1]
    for mesh, axes, strategy in (((1, 8, 1), "ep", "all_to_all"), ((2, 4, 1), "dp,ep", "replicate")):
        execution = Execution(strategy=strategy, capacity_factor=1e-6)
        assert load(name, *mesh, axes, execution=execution).greedy(PROMPT, 12) == expected


def test_a_model_says_what_a_device_holds_and_what_tp_leaves_whole():
    said = load("mixtral", 1, 2, 4, "ep", redundant_experts=1, kernels="xla").describe()
    layout = "5 of 10 expert slots a device, over ep; tp leaves kv_heads whole"
    assert said.endswith(f"on dp=1,ep=2,tp=4, cpu, xla kernels; {layout}")
    assert load("mixtral", 1, 1, 1, "ep", kernels="xla").describe().endswith("on dp=1,ep=1, cpu, xla kernels")


def test_a_tp_that_divides_nothing_is_told_with_what_would():
    with pytest.raises(MeshError, match=r"tp=7 divides none of heads=4, vocab=4096, .*; use tp in 1, 2, 3, 4"):
        load("mixtral", 1, 1, 7, "ep")


def test_axes_and_strategies_that_do_not_exist_are_told():
    with pytest.raises(MeshError, match="expert axes 'tp' are not supported; use ep or dp,ep"):
        load("mixtral", 1, 1, 1, "tp")
    with pytest.raises(ConfigError, match="dispatch='scatter' is not one of auto, dense, replicate, all_to_all"):
        load("mixtral", 1, 1, 1, "ep", execution=Execution(strategy="scatter"))
    with pytest.raises(ConfigError, match="dispatch='ragged_all_to_all' is not implemented on cpu; use all_to_all"):
        load("mixtral", 1, 1, 1, "ep", execution=Execution(strategy="ragged_all_to_all"))
    with pytest.raises(ConfigError, match="redundant_experts=-1 must not be negative"):
        load("mixtral", 1, 1, 1, "ep", redundant_experts=-1)
