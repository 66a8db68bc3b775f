"""dispatch -> experts -> combine: how tokens meet experts that lie on other devices.

One contract, `mixture(x, slots, weights, experts, layer, strategy)`, and these strategies, all equal:

* "dense": every expert computes every token. The oracle; gathers all weights.
* "replicate": every device gets all tokens of the devices it shares the experts with, runs its own experts on those
  that chose them, and the partial sums are reduced back (all-gather, reduce-scatter). No queue: wins for few tokens.
* "all_to_all": tokens travel to the devices of their experts and back, in buffers of a fixed capacity and as many
  rounds as it takes (`moe/exchange.py`).
* "ragged_all_to_all": the same, but only rows that are there travel. GPUs and TPUs; not implemented on a CPU.
* "auto": the cheapest of them by `moe/strategy.py`, from the shapes of the program and the device's links.

With one device for the experts there is nothing to exchange and all but "dense" are one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmoe.axes import Hidden, Layer
from jaxmoe.moe.exchange import LocalExperts, exchange
from jaxmoe.moe.experts import Experts
from jaxmoe.moe.strategy import Mixture, choose
from jaxmoe.ops.gating import swiglu
from jaxmoe.ops.grouped_mlp import grouped_mlp, implementation_for
from jaxmoe.ops.linear import Kernels
from jaxmoe.ops.quantised import Stack, dequantise
from jaxmoe.sharding.mesh import RANKS
from jaxmoe.sharding.words import from_words, to_words

TOKENS = P(RANKS, None, None)


def mixture(
    x: Hidden,
    slots: Int[Array, "R N K"],
    weights: Float[Array, "R N K"],
    experts: Experts,
    layer: Layer,
    strategy: str = "auto",
    capacity_factor: float = 2.0,
    weigh_input: bool = False,
    platform: str = "cpu",
    kernels: Kernels = "xla",
) -> Hidden:
    """sum_k weights[k] * expert[slots[k]](x), summed in float32 and cast to x's dtype.

    Slot -1 adds nothing. weigh_input: the weight is on the expert's input instead, expert[slots[k]](weights[k] * x).
    platform: what the program is compiled for, by JAX's name: "cpu", "gpu" or "tpu". kernels: "native" runs local
    experts by `ops/native.py`, "xla" by what suits the platform.
    """
    rules = experts.rules
    _, tokens, width = x.shape
    shape = Mixture(tokens, width, slots.shape[-1], rules.spec.expert_devices, x.dtype.itemsize, capacity_factor)
    chosen = choose(strategy, shape, platform)
    layer = jnp.asarray(layer)
    run = functools.partial(
        grouped_mlp,
        activation=experts.activation,
        weigh_input=weigh_input,
        implementation="native" if kernels == "native" else implementation_for(platform),
        expected=shape.tokens * shape.choices,
    )
    with jax.named_scope("moe"):
        if chosen == "dense":
            return _dense(x, slots, weights, experts, layer, weigh_input)
        if chosen in ("all_to_all", "ragged_all_to_all") and shape.devices > 1:
            out = exchange(x, slots, weights, experts, layer, shape, run, chosen == "ragged_all_to_all")
        else:
            out = _replicate(x, slots, weights, experts, layer, shape, run)
        return _sum_over_tp(out, experts)


def _sum_over_tp(partial: Hidden, experts: Experts) -> Hidden:
    if "expert_width" not in experts.rules.split:
        return partial
    return jax.shard_map(lambda x: jax.lax.psum(x, "tp"), in_specs=TOKENS, out_specs=TOKENS, check_vma=False)(partial)


def _dense(x: Array, slots: Array, weights: Array, experts: Experts, layer: Array, weigh_input: bool) -> Array:
    def local(x: Array, slots: Array, weights: Array, gate_up: Stack, down: Stack, layer: Array) -> Array:
        of_layer, down_of_layer = (dequantise(stack, x.dtype)[layer] for stack in (gate_up, down))
        act = functools.partial(jnp.einsum, preferred_element_type=x.dtype)
        rows = jnp.repeat(x[0], weights.shape[-1], axis=0)
        of_rows = weights[0].reshape(-1, 1)
        if weigh_input:
            rows, of_rows = rows * of_rows.astype(x.dtype), jnp.ones_like(of_rows)
        hidden = act("md,sdtf->mstf", rows, of_layer)
        from_slots = act("msf,sfd->msd", swiglu(hidden, experts.activation), down_of_layer)
        chosen = jax.nn.one_hot(slots[0].reshape(-1), gate_up.shape[1], dtype=jnp.float32) * of_rows
        per_choice = jnp.einsum("ms,msd->md", chosen, from_slots.astype(jnp.float32))
        return jnp.sum(per_choice.reshape(*slots.shape[1:], -1), axis=1).astype(x.dtype)[None]

    gate_up, down = jax.tree.map(lambda array: jax.sharding.reshard(array, P()), experts.stacks)
    run = jax.shard_map(local, in_specs=(TOKENS, TOKENS, TOKENS, P(), P(), P()), out_specs=TOKENS, check_vma=False)
    return run(x, slots, weights, gate_up, down, layer)


def _replicate(
    x: Array,
    slots: Array,
    weights: Array,
    experts: Experts,
    layer: Array,
    shape: Mixture,
    run: LocalExperts,
) -> Array:
    axes, dtype = experts.rules.spec.expert_axes, x.dtype

    def local(x: Array, slots: Array, weights: Array, gate_up: Stack, down: Stack, layer: Array) -> Array:
        of_rank = (x[0], slots[0], weights[0])
        if shape.devices == 1:
            return run(*of_rank, gate_up, down, layer)[None]
        # One gather: slots and weights travel as further words of their row.
        sent = jnp.concatenate([to_words(array, dtype) for array in of_rank], axis=1)
        rows = jax.lax.all_gather(sent, axes, tiled=True)
        every_x, slots, weights = from_words(
            rows, [(shape.width, dtype), (shape.choices, jnp.int32), (shape.choices, jnp.float32)]
        )
        mine = slots // gate_up.shape[1] == jax.lax.axis_index(axes)
        local_slots = jnp.where((slots >= 0) & mine, slots % gate_up.shape[1], -1)
        out = run(every_x, local_slots, weights, gate_up, down, layer)
        return jax.lax.psum_scatter(out, axes, tiled=True)[None]

    in_specs = (TOKENS, TOKENS, TOKENS, *experts.partitions, P())
    on_devices = jax.shard_map(local, in_specs=in_specs, out_specs=TOKENS, check_vma=False)
    return on_devices(x, slots, weights, *experts.stacks, layer)
