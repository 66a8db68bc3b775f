"""dispatch -> experts -> combine: how tokens reach the devices that hold their experts, and come back.

One contract, `mixture(x, slots, weights, experts, layer, strategy)`, and these strategies, all equal:

* "dense": every expert computes every token. The oracle; gathers all weights.
* "all_to_all": tokens travel. Rows wait in one queue per destination device; a buffer of `capacity` rows a destination
  is exchanged by resharding it from the token layout to the expert layout, which XLA compiles to one all-to-all, and
  back by another; rounds go on until the longest queue on any device is empty. Nothing is ever dropped and no shape
  depends on the routing: `capacity` tunes speed only. With one device along `ep` there is nothing to exchange.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmoe.axes import Hidden, Layer
from jaxmoe.moe.experts import Experts, apply_experts
from jaxmoe.ops.grouped_matmul import swiglu
from jaxmoe.sharding.mesh import AXES, RANKS
from jaxmoe.sharding.rules import partition

Strategy = Literal["dense", "all_to_all"]

TOKENS = P(RANKS, None, None)
AT_SOURCE = P("dp", "ep", None, None, None)
AT_EXPERTS = P("dp", None, "ep", None, None)
WEIGHTS = (partition(*Experts.GATE_UP), partition(*Experts.DOWN))


def mixture(
    x: Hidden,
    slots: Int[Array, "R N K"],
    weights: Float[Array, "R N K"],
    experts: Experts,
    layer: Layer,
    strategy: Strategy = "all_to_all",
    capacity_factor: float = 2.0,
    weigh_input: bool = False,
) -> Hidden:
    """sum_k weights[k] * expert[slots[k]](x), summed in order of k in float32 and cast to x's dtype.

    Slot -1 adds nothing. weigh_input: the weight is on the expert's input instead, expert[slots[k]](weights[k] * x).
    """
    mesh = jax.sharding.get_abstract_mesh()
    with jax.named_scope("moe"):
        if strategy == "dense":
            return _dense(x, slots, weights, experts, layer, weigh_input)
        if strategy != "all_to_all":
            raise ValueError(f"strategy={strategy!r} is not 'dense' or 'all_to_all'")
        if mesh.shape["ep"] == 1:
            return _local(x, slots, weights, experts, layer, weigh_input)
        return _all_to_all(x, slots, weights, experts, layer, mesh.shape["ep"], capacity_factor, weigh_input)


def _rows(x: Float[Array, "N D"], weights: Float[Array, "N K"], weigh_input: bool) -> Float[Array, "M D"]:
    """What goes into the experts: a row for each token and choice, M = N * K."""
    rows = jnp.repeat(x, weights.shape[-1], axis=0)
    return rows * weights.reshape(-1, 1).astype(x.dtype) if weigh_input else rows


def _combine(per_choice: Float[Array, "N K D"], weights: Float[Array, "N K"], weigh_input: bool) -> Float[Array, "N D"]:
    """What comes out of the experts; that of slot -1 is zero."""
    if weigh_input:
        weights = jnp.ones_like(weights)
    return jnp.einsum("nkd,nk->nd", per_choice, weights.astype(jnp.float32)).astype(per_choice.dtype)


def _sum_over_tp(partial: Array) -> Array:
    return jax.lax.psum(partial, "tp") if jax.sharding.get_abstract_mesh().shape["tp"] > 1 else partial


def _dense(x: Array, slots: Array, weights: Array, experts: Experts, layer: Layer, weigh_input: bool) -> Array:
    def local(x: Array, slots: Array, weights: Array, gate_up: Array, down: Array, layer: Array) -> Array:
        act = functools.partial(jnp.einsum, preferred_element_type=x.dtype)
        rows = _rows(x[0], weights[0], weigh_input)
        hidden = act("md,sdtf->mstf", rows, gate_up[layer])
        from_slots = act("msf,sfd->msd", swiglu(hidden, experts.activation), down[layer])
        chosen = jax.nn.one_hot(slots[0].reshape(-1), gate_up.shape[1], dtype=x.dtype)
        per_choice = jnp.einsum("ms,msd->md", chosen, from_slots).reshape(*slots.shape[1:], -1)
        return _combine(per_choice, weights[0], weigh_input)[None]

    whole = (P(None), P(None))
    gathered = (jax.sharding.reshard(experts.gate_up[...], P()), jax.sharding.reshard(experts.down[...], P()))
    run = jax.shard_map(local, in_specs=(TOKENS, TOKENS, TOKENS, *whole, P()), out_specs=TOKENS, check_vma=False)
    return run(x, slots, weights, *gathered, jnp.asarray(layer))


def _local(x: Array, slots: Array, weights: Array, experts: Experts, layer: Layer, weigh_input: bool) -> Array:
    def local(x: Array, slots: Array, weights: Array, gate_up: Array, down: Array, layer: Array) -> Array:
        rows = _rows(x[0], weights[0], weigh_input)
        out = apply_experts(rows, slots.reshape(-1), gate_up, down, layer, experts.activation)
        out = _sum_over_tp(out).reshape(*slots.shape[1:], x.shape[-1])
        return _combine(out, weights[0], weigh_input)[None]

    run = jax.shard_map(local, in_specs=(TOKENS, TOKENS, TOKENS, *WEIGHTS, P()), out_specs=TOKENS, check_vma=False)
    return run(x, slots, weights, experts.gate_up[...], experts.down[...], jnp.asarray(layer))


def capacity_for(num_assignments: int, num_devices: int, factor: float) -> int:
    """Rows that one exchange carries from a device to each other one: `factor` times the mean queue, at least 4."""
    return min(num_assignments, max(4, math.ceil(num_assignments / num_devices * factor)))


def _all_to_all(
    x: Array,
    slots: Array,
    weights: Array,
    experts: Experts,
    layer: Layer,
    ep: int,
    factor: float,
    weigh_input: bool,
) -> Array:
    ranks, tokens, width = x.shape
    choices = slots.shape[-1]
    slots_per_device = experts.gate_up.shape[1] // ep
    capacity = capacity_for(tokens * choices, ep, factor)
    # A row carries its slot as one more element, so that rows and slots travel in one exchange.
    if slots_per_device >= 2 ** (jnp.finfo(x.dtype).nmant + 1):
        raise ValueError(f"{slots_per_device} slots a device cannot be counted exactly in {x.dtype}")

    def queue(slots: Array) -> tuple[Array, Array, Array]:
        """Where each (token, choice) waits: destination device and place in that queue; padded rows wait nowhere."""
        flat = slots.reshape(-1)
        destination = jnp.where(flat < 0, ep, flat // slots_per_device)
        waiting = jnp.cumsum(destination[:, None] == jnp.arange(ep), axis=0, dtype=jnp.int32)
        place = jnp.take_along_axis(waiting, jnp.minimum(destination, ep - 1)[:, None], axis=1)[:, 0] - 1
        rounds = jax.lax.pmax(-(-jnp.max(waiting[-1]) // capacity), AXES)
        return jnp.where(destination < ep, destination * capacity, -1), place, rounds

    def in_buffer(start: Array, place: Array, turn: Array) -> Array:
        """Buffer row of each (token, choice) in round `turn`; one past the end if it waits or went before."""
        return jnp.where((start >= 0) & (place // capacity == turn), start + place % capacity, ep * capacity)

    def pack(x: Array, slots: Array, weights: Array, start: Array, place: Array, turn: Array) -> Array:
        local_slot = (slots.reshape(-1) % slots_per_device + 1).astype(x.dtype)
        rows = jnp.concatenate([_rows(x[0], weights[0], weigh_input), local_slot[:, None]], axis=1)
        buffer = jnp.zeros((ep * capacity, width + 1), x.dtype)
        buffer = buffer.at[in_buffer(start[0], place[0], turn)].set(rows, mode="drop")
        return buffer.reshape(1, 1, ep, capacity, width + 1)

    def compute(rows: Array, gate_up: Array, down: Array, layer: Array) -> Array:
        flat = rows.reshape(-1, width + 1)
        local_slot = flat[:, width].astype(jnp.int32) - 1
        out = apply_experts(flat[:, :width], local_slot, gate_up, down, layer, experts.activation)
        return _sum_over_tp(out).reshape(*rows.shape[:-1], width)

    def unpack(out: Array, buffer: Array, start: Array, place: Array, turn: Array) -> Array:
        index = in_buffer(start[0], place[0], turn)
        arrived = buffer.reshape(-1, width).at[index].get(mode="fill", fill_value=0)
        return out + arrived[None]

    rank_rows = P(RANKS, None)
    queue_all = jax.shard_map(
        lambda s: (lambda q: (q[0][None], q[1][None], q[2]))(queue(s)),
        in_specs=TOKENS,
        out_specs=(rank_rows, rank_rows, P()),
        check_vma=False,
    )
    start, place, rounds = queue_all(slots)
    specs = (rank_rows, rank_rows, P())
    pack_all = jax.shard_map(pack, in_specs=(TOKENS, TOKENS, TOKENS, *specs), out_specs=AT_SOURCE, check_vma=False)
    compute_all = jax.shard_map(compute, in_specs=(AT_EXPERTS, *WEIGHTS, P()), out_specs=AT_EXPERTS, check_vma=False)
    unpack_all = jax.shard_map(unpack, in_specs=(TOKENS, AT_SOURCE, *specs), out_specs=TOKENS, check_vma=False)
    combine_all = jax.shard_map(
        lambda out, weights: _combine(out.reshape(-1, choices, width), weights[0], weigh_input)[None],
        in_specs=(TOKENS, TOKENS),
        out_specs=TOKENS,
        check_vma=False,
    )
    layer = jnp.asarray(layer)

    def one_round(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        turn, out = carry
        to_experts = jax.sharding.reshard(pack_all(x, slots, weights, start, place, turn), AT_EXPERTS)
        computed = compute_all(to_experts, experts.gate_up[...], experts.down[...], layer)
        back = jax.sharding.reshard(computed, AT_SOURCE)
        return turn + 1, unpack_all(out, back, start, place, turn)

    out = jnp.zeros((ranks, tokens * choices, width), x.dtype, out_sharding=TOKENS)
    _, out = jax.lax.while_loop(lambda carry: carry[0] < rounds, one_round, (jnp.int32(0), out))
    return combine_all(out, weights)
