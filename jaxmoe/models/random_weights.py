"""Parameters drawn at random: the same model on every mesh, made on the devices that hold them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from jaxmoe.models.decoder import Decoder
from jaxmoe.moe.experts import Experts


def random_params(
    abstract: Decoder, slot_expert: Int[np.ndarray, "L S"], mesh: jax.sharding.Mesh, dtype: jnp.dtype, seed: int = 0
) -> dict[str, Any]:
    """Parameters of `abstract` as a nested dict, from `seed` and nothing else.

    An expert's weights depend on its number and layer, not on the slots that hold it, so that replicas are equal and a
    model is the same whatever the mesh.
    """
    config, slots = abstract.config, slot_expert.shape[-1]

    def make() -> dict[str, Any]:
        model = type(abstract)(config, slots, dtype, nnx.Rngs(seed), abstract.rules)
        params = nnx.to_pure_dict(nnx.state(model))
        if "experts" in params:
            params["experts"] = _experts(model.experts, jnp.asarray(slot_expert), seed)
        return params

    with jax.set_mesh(mesh):
        return jax.jit(make)()


def _experts(experts: Experts, slot_expert: Int[Array, "L S"], seed: int) -> dict[str, Array]:
    layers, _, width, _, inner = experts.gate_up.shape
    shapes = {
        "gate_up": (Experts.GATE_UP, (width, 2, inner), 2, width**-0.5),
        "down": (Experts.DOWN, (inner, width), 0, (2 * layers * inner) ** -0.5),
    }
    made = {}
    for number, (name, (meaning, shape, split_axis, scale)) in enumerate(shapes.items()):
        spec = experts.rules.partition(*meaning)
        dtype = getattr(experts, name).dtype

        def local(
            held: Array,
            shape: Any = shape,
            axis: int = split_axis,
            scale: float = scale,
            number: int = number,
            dtype: Any = dtype,
        ) -> Array:
            parts = experts.rules.parts("expert_width")
            part = shape[axis] // parts

            def one(layer: Array, expert: Array) -> Array:
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed + 1 + number), layer), expert)
                whole = jax.random.normal(key, shape, dtype) * scale
                own = jax.lax.axis_index("tp") % parts
                return jax.lax.dynamic_slice_in_dim(whole, own * part, part, axis)

            return jax.lax.map(lambda at: jax.vmap(one, (None, 0))(*at), (jnp.arange(layers), held))

        by_slot = experts.rules.partition(None, "slots")
        held = jax.sharding.reshard(slot_expert, by_slot)
        made[name] = jax.shard_map(local, in_specs=by_slot, out_specs=spec, check_vma=False)(held)
    return made
