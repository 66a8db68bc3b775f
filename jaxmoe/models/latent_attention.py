"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, sec. 2.1): all that is cached is a latent vector a token.

A head's key and value are linear in the latent, so both can be moved to the other side (sec. 2.1.2): the query is taken
into the space of the latent and meets what is cached as it is, and the value is made from the mixed latents. A decode
step then reads r + dr numbers a token and never makes per-head keys and values.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.models.attention import CachedAttention, Queries, Seen, Shapes, Weights
from jaxmoe.models.config import LatentAttention as Dims
from jaxmoe.models.config import LayerKind
from jaxmoe.ops import paged_attention
from jaxmoe.ops.norms import rms_norm
from jaxmoe.ops.rope import cos_sin, rotate

NORM_EPS = 1e-6  # of the norms within attention, whatever the model's own is


class LatentAttention(CachedAttention):
    """Parameters of all layers; rq, r: ranks of query and latent; dn, dr, dv: parts of a head without and with
    rotation, and its value.

    query_a [L, D, rq], query_norm [L, rq], query_b [L, rq, H * (dn + dr)], or query [L, D, H * (dn + dr)] without a
    rank; latent [L, D, r + dr], latent_norm [L, r], key_value [L, r, H, dn + dv], out [L, H, dv, D]; maybe biases.

    Heads of queries are merged because a TPU keeps the last two axes in tiles of 8 by 128: dn + dr = 192 alone would be
    padded by a third, or as XLA has it, lie in an order that no matmul wants.
    """

    SPLIT: ClassVar = {
        "query": (None, None, "heads"),
        "query_a": (None, None, None),
        "query_a_bias": (None, None),
        "query_norm": (None, None),
        "query_b": (None, None, "heads"),
        "latent": (None, None, None),
        "latent_bias": (None, None),
        "latent_norm": (None, None),
        "key_value": (None, None, "heads", None),
        "out": (None, "heads", None, None),
        "out_bias": (None, None),
    }  # fmt: skip

    @property
    def dims(self) -> Dims:
        assert self.config.latent is not None
        return self.config.latent

    def shapes(self) -> Shapes:
        """See CachedAttention."""
        c, m = self.config, self.dims
        queries = c.heads * (m.nope_dim + m.rope_dim)
        shapes: Shapes = {
            "latent": ((c.width, m.kv_lora_rank + m.rope_dim), c.width**-0.5),
            "latent_norm": ((m.kv_lora_rank,), 0),
            "key_value": ((m.kv_lora_rank, c.heads, m.nope_dim + m.value_dim), m.kv_lora_rank**-0.5),
            "out": ((c.heads, m.value_dim, c.width), (2 * c.layers * c.heads * m.value_dim) ** -0.5),
        }
        if m.q_lora_rank is None:
            shapes["query"] = ((c.width, queries), c.width**-0.5)
        else:
            shapes["query_a"] = ((c.width, m.q_lora_rank), c.width**-0.5)
            shapes["query_norm"] = ((m.q_lora_rank,), 0)
            shapes["query_b"] = ((m.q_lora_rank, queries), m.q_lora_rank**-0.5)
        if c.attention_bias:
            shapes["latent_bias"] = ((m.kv_lora_rank + m.rope_dim,), 0.02)
            shapes["out_bias"] = ((c.width,), 0.02)
            if m.q_lora_rank is not None:
                shapes["query_a_bias"] = ((m.q_lora_rank,), 0.02)
        return shapes

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], kind: LayerKind, weights: Weights
    ) -> tuple[Queries, tuple[Float[Array, "B T *_vector"], ...]]:
        """See CachedAttention. Queries: what is not rotated [B, T, H, dn], and what is [B, T, H, dr]."""
        config, rank, nope = self.config, self.dims.kv_lora_rank, self.dims.nope_dim
        if self.dims.q_lora_rank is None:
            query, both = weights.project(x, "query", "latent")
        else:
            low, both = weights.project(x, "query_a", "latent")
            (query,) = weights.project(rms_norm(low, weights["query_norm"], NORM_EPS), "query_b")
        query = query.reshape(*query.shape[:2], -1, nope + self.dims.rope_dim)
        latent = rms_norm(both[..., :rank], weights["latent_norm"], NORM_EPS)
        cos, sin = cos_sin(config.rope, config.head_dim, jnp.maximum(positions, 0), x.dtype)
        query_rope = rotate(query[..., nope:], cos, sin, config.rope_interleaved)
        key_rope = rotate(both[:, :, None, rank:], cos, sin, config.rope_interleaved)[:, :, 0]
        return (query[..., :nope], query_rope), (jnp.concatenate([latent, key_rope], axis=-1),)

    def attend(self, queries: Queries, seen: Seen, weights: Weights) -> Float[Array, "B T H dv"]:
        """See CachedAttention."""
        if seen.where.pieces is not None:
            return self._one_row(queries, seen, weights)
        keys = seen.where.table.shape[1] * seen.pages[0].shape[2]
        way = self._absorbed if absorbs(self.dims, queries[0].shape[1], keys) else self._expanded
        return way(queries, seen, weights)

    def _absorbed(self, queries: Queries, seen: Seen, weights: Weights) -> Float[Array, "B T H dv"]:
        """Attention in the space of the latents."""
        nope, rank = self.dims.nope_dim, self.dims.kv_lora_rank
        to_latent = weights.by_head(queries[0], "key_value", slice(nope), transposed=True)
        whole = jnp.concatenate([to_latent, queries[1]], axis=-1)
        mixed = seen.attend(whole, self.config.score_scale, rank, weights.compute.kernels)
        return weights.by_head(mixed, "key_value", slice(nope, None))

    def _expanded(self, queries: Queries, seen: Seen, weights: Weights) -> Float[Array, "B T H dv"]:
        """Attention over keys and values made of the latents."""
        return paged_attention.attend_latent(
            jnp.concatenate(queries, axis=-1), seen.positions, seen.pages[0], seen.where,
            weights.stacks["key_value"], weights.layer,
            self.config.score_scale, seen.span, self.dims.value_dim, weights.compute.kernels,
        )  # fmt: skip

    def _one_row(self, queries: Queries, seen: Seen, weights: Weights) -> Float[Array, "1 N H dv"]:
        """All sequences' tokens in one row: those that decode absorbed, pieces of prompts not."""
        positions, pieces = seen.positions, seen.where.pieces
        assert pieces is not None
        decoding, most = pieces.decoding, len(pieces.decoding)
        until = jnp.sum(decoding, dtype=jnp.int32)
        own = seen.where._replace(pieces=pieces._replace(begins=jnp.minimum(pieces.begins, until)))
        at = jnp.where(decoding, positions[:, :most], -1)
        first = (queries[0][:, :most], queries[1][:, :most])
        mixed = self._absorbed(first, seen._replace(positions=at, where=own), weights)
        in_pieces = positions.at[:, :most].set(jnp.where(decoding, -1, positions[:, :most]))
        rest = self._expanded(queries, seen._replace(positions=in_pieces), weights)
        return rest.at[:, :most].set(jnp.where(decoding[:, None, None], mixed, rest[:, :most]))


def absorbs(dims: Dims, queries: int, keys: int) -> bool:
    """Whether meeting the latents as they are takes fewer multiplications than making keys and values of them.

    A head's scores and mix take 2r + dr a pair of query and key, against dn + dr + dv, once r (dn + dv) a key is spent
    on making keys and values. DeepSeek-V3 (r 512, dn 128, dr 64, dv 128) absorbs up to about 170 queries.
    """
    made = dims.nope_dim + dims.value_dim
    absorbed = queries * keys * (2 * dims.kv_lora_rank + dims.rope_dim) + queries * dims.kv_lora_rank * made
    expanded = queries * keys * (made + dims.rope_dim) + keys * dims.kv_lora_rank * made
    return absorbed <= expanded
