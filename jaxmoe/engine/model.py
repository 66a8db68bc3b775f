"""A checkpoint on a mesh: configuration, parameters and placement, and logits without an engine."""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmoe.axes import Logits
from jaxmoe.checkpoints.loader import (
    has_tensors,
    load_params,
    read_config,
    read_generation_config,
    read_quantization,
)
from jaxmoe.checkpoints.native import is_native, load_native
from jaxmoe.engine.pages import pages_reached
from jaxmoe.errors import ConfigError, InvalidRequestError, MoveError
from jaxmoe.models.config import rules_for, split_sizes, text_config, token_ids
from jaxmoe.models.decoder import RANK_ROWS, Decoder, Execution, merge
from jaxmoe.models.kv_cache import PagedContext, make_cache
from jaxmoe.models.presets import read_preset
from jaxmoe.models.random_weights import random_params
from jaxmoe.models.registry import family_of
from jaxmoe.moe.moving import Mover, same, slot_sources
from jaxmoe.moe.placement import initial_placement, placement_of, read_placement, write_placement
from jaxmoe.moe.simulation import Simulated, Simulation
from jaxmoe.moe.statistics import Exchange
from jaxmoe.moe.strategy import Mixture, Strategy, check_strategy, choose
from jaxmoe.ops import native
from jaxmoe.ops.linear import Compute
from jaxmoe.ops.quantised import LARGEST, quantise
from jaxmoe.sharding.devices import use_huge_pages, virtual_devices
from jaxmoe.sharding.mesh import RANKS, MeshSpec, make_mesh, slots_for

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
EXPERT_WEIGHTS = {"same": None, "bfloat16": jnp.bfloat16, "int8": jnp.int8, "float8": jnp.float8_e4m3fn}


def no_progress(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


class Model:
    """Loads `folder` onto the mesh. Raises CheckpointError, MeshError or ConfigError.

    random_weights: in place of a folder, a preset (see `read_preset`) whose weights are drawn at random.
    mesh: a MeshSpec or its text, "dp=2,ep=4". On a CPU the devices it needs are made if JAX has not started yet.
    expert_axes: of a mesh given as text: "ep", a copy of the experts for each `dp` coordinate, or "dp,ep", one in all.
    redundant_experts: replicas of experts beyond one of each, in all; rounded up to as many slots on every device.
    dtype: what to compute in: float32, bfloat16 or float16.
    expert_weights: what the experts' weights are kept in: "bfloat16"; "int8" or "float8" (e4m3fn), with a float32 scale
        for every output channel of every expert; or the "same" dtype that is computed in.
    simulate_routing: where benchmarks have tokens go instead (`moe.simulation.Simulation`); answers are then none.
    placement: a file of `save_placement` to start from; it then says how many slots there are.
    kernels: "native", compiled here for a CPU, "xla", or "auto": native ones where they can be had.
    progress: called with a stage's name, what is done and what there is in all.
    """

    def __init__(
        self,
        folder: str | Path | None,
        mesh: str | MeshSpec = MeshSpec(),  # noqa: B008 - frozen
        dtype: str = "float32",
        execution: Execution = Execution(),  # noqa: B008 - frozen
        progress: Progress = no_progress,
        random_weights: str | None = None,
        expert_axes: str = "ep",
        redundant_experts: int = 0,
        kernels: str = "auto",
        expert_weights: str = "same",
        placement: str | Path | None = None,
        simulate_routing: str | None = None,
    ) -> None:
        if (folder is None) == (random_weights is None):
            raise ConfigError("give either the folder of a checkpoint or a preset for random weights")
        if redundant_experts < 0:
            raise ConfigError(f"redundant_experts={redundant_experts} must not be negative")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
        if expert_weights not in EXPERT_WEIGHTS:
            raise ConfigError(f"expert_weights={expert_weights!r} is not one of {', '.join(EXPERT_WEIGHTS)}")
        self.folder = None if folder is None else Path(folder)
        self.name = self.folder.resolve().name if self.folder else f"random:{random_weights}"
        self.dtype = jnp.dtype(DTYPES[dtype])
        self.mesh_spec = MeshSpec.parse(mesh, expert_axes) if isinstance(mesh, str) else mesh
        converted = self.folder is not None and is_native(self.folder)
        hf = read_config(self.folder) if self.folder else read_preset(random_weights or "")
        generation = read_generation_config(self.folder) if self.folder else {}
        family = family_of(hf)
        self.config = family.read_config(hf)
        # generation_config.json, where there is one, has the last word on what ends a generation.
        self.eos_token_ids = token_ids(generation, "eos_token_id") or self.config.eos_token_ids
        self.recommended_sampling = {
            name: generation[name]
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if isinstance(generation.get(name), int | float) and generation.get("do_sample", True)
        }
        if (
            self.folder
            and not converted
            and self.config.mtp_layers
            and not has_tensors(self.folder, f"model.layers.{self.config.layers}.")
        ):
            # Some exporters keep the promise of further layers in the config and leave their tensors out.
            self.config = dataclasses.replace(self.config, mtp_layers=0)
        config, spec = self.config, self.mesh_spec
        self.rules = rules_for(config, spec)
        virtual_devices(spec.num_devices)
        self.mesh = make_mesh(spec)
        platform = self.mesh.devices.flat[0].platform
        chosen = native.choose(kernels, platform, self.dtype)
        self.execution = dataclasses.replace(execution, platform=platform, kernels=chosen)
        check_strategy(self.execution.strategy, self.execution.platform)
        slots = slots_for(config.experts, spec, redundant_experts)
        mixtures = len(config.stacks["moe"])
        if placement is None:
            slot_expert = np.asarray(initial_placement(mixtures, config.experts, slots).slot_expert)
        else:
            slot_expert = read_placement(placement, mixtures, config.experts, spec.expert_devices)
            if redundant_experts and slot_expert.shape[1] != slots:
                raise ConfigError(
                    f"{placement} has {slot_expert.shape[1]} slots, redundant_experts={redundant_experts} asks for "
                    f"{slots}; leave it out, the file says how many there are"
                )
            slots = slot_expert.shape[1]
        with jax.set_mesh(self.mesh):
            self.abstract: Decoder = nnx.eval_shape(lambda: family(config, slots, self.dtype, nnx.Rngs(0), self.rules))
        self.params = self._load(hf, slot_expert, functools.partial(progress, "loading weights"))
        stored = EXPERT_WEIGHTS[expert_weights]
        if stored is not None and config.stacks["moe"]:
            with jax.set_mesh(self.mesh):
                self.abstract = nnx.eval_shape(
                    lambda: family(config, slots, self.dtype, nnx.Rngs(0), self.rules, jnp.dtype(stored))
                )
                self.params["experts"] = _kept_in(self.params["experts"], jnp.dtype(stored))
        use_huge_pages(self.params)
        self.masked_slots = np.zeros(slots, bool)
        self._simulation: Simulation | None = None
        self._drawn: tuple[Simulated, Array, Array] | None = None
        if simulate_routing is not None:
            if not mixtures:
                raise ConfigError(f"{self.name} has no routing to simulate")
            self._simulation = Simulation(simulate_routing, mixtures, config.experts, config.experts_per_token)
            log.warning("%s", self.invalid)
        self._put_placement(slot_expert)

    def _load(self, hf: Mapping[str, Any], slot_expert: np.ndarray, progress: Callable[[int, int], None]) -> Any:
        family = type(self.abstract)
        if self.folder is None:
            return random_params(self.abstract, slot_expert, self.mesh, self.dtype)
        what = (self.folder, self.abstract, family.keys, self.config, slot_expert, self.mesh)
        if is_native(self.folder):
            return load_native(*what, progress=progress)
        ignored, further = family.ignored, f"model.layers.{self.config.layers}."
        if not self.config.mtp_layers and has_tensors(self.folder, further + "eh_proj."):
            # A layer of further prediction that the config does not ask for; any other layer too many is an error.
            ignored += rf"|{re.escape(further)}.*"
        return load_params(
            *what,
            ignored=ignored,
            prefix=family.prefix,
            block_size=read_quantization(hf if "quantization_config" in hf else text_config(hf)),
            progress=progress,
        )

    @property
    def num_ranks(self) -> int:
        return self.mesh_spec.num_ranks

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def expert_dtype(self) -> jnp.dtype:
        """What experts' weights are kept in, or would be."""
        experts = self.params.get("experts")
        return jnp.dtype(experts["gate_up"].dtype if experts else self.dtype)

    def describe(self) -> str:
        """One line for a log: what was loaded, where."""
        config = self.config
        return (
            f"{config.model_type} of {self.num_parameters / 1e6:,.1f} M parameters "
            f"({config.experts} experts, {config.experts_per_token} a token) in {self._describe_dtype()} "
            f"on {self.mesh_spec}, {self.mesh.devices.flat[0].device_kind}, "
            f"{self.execution.kernels} kernels{self._describe_layout()}{'; ' * bool(self.invalid)}{self.invalid}"
        )

    def _describe_dtype(self) -> str:
        kept = self.expert_dtype
        return str(self.dtype) if kept == self.dtype else f"{self.dtype}, experts in {kept},"

    def _describe_layout(self) -> str:
        """What is not as the mesh alone would have it; "" if nothing is."""
        config, spec, parts = self.config, self.mesh_spec, []
        slots = self.placement.slot_expert.shape[1]
        if config.stacks["moe"] and spec.expert_devices > 1:
            parts.append(
                f"{slots // spec.expert_devices} of {slots} expert slots a device, over {spec.axes_of_experts}"
            )
        if whole := sorted(set(split_sizes(config)) - self.rules.split) if spec.tp > 1 else []:
            parts.append(f"tp leaves {', '.join(whole)} whole")
        return "".join(f"; {part}" for part in parts)

    def place_experts(self, slot_expert: Int[np.ndarray, "L S"]) -> None:
        """Moves experts so that slot s of mixture l holds slot_expert[l, s]; the answers stay the same.

        Steps read placement and weights as arguments, so nothing is compiled anew but, the first time, the move.
        Raises ConfigError, and changes nothing, on another shape or if an expert has no slot.
        """
        new = self.checked_placement(slot_expert)
        for layer in np.flatnonzero((self.slot_expert != new).any(axis=1)):
            move = LayerMove(self, int(layer), new[layer])
            while not move.fetched:
                move.fetch()
            move.commit()

    def checked_placement(self, slot_expert: Int[np.ndarray, "L S"]) -> Int[np.ndarray, "L S"]:
        """As it is, if this model could be placed so. Raises ConfigError."""
        new = np.asarray(slot_expert, np.int32)
        if new.shape != self.slot_expert.shape:
            raise ConfigError(f"a placement of {new.shape} mixtures and slots does not fit {self.slot_expert.shape}")
        placement_of(new, self.config.experts, self.masked_slots)
        return new

    def mask_devices(self, devices: Collection[int] = ()) -> None:
        """Sends no token to these devices of any copy of the experts from the next step on; none: to all again.

        Raises ConfigError, and changes nothing, unless each expert has a replica elsewhere.
        """
        spec, slots = self.mesh_spec, self.slot_expert.shape[1]
        if unknown := sorted(set(devices) - set(range(spec.expert_devices))):
            raise ConfigError(f"devices {unknown} cannot be masked; there are {spec.expert_devices} of them, from 0")
        masked = np.isin(np.arange(slots) // (slots // spec.expert_devices), list(devices))
        placement_of(self.slot_expert, self.config.experts, masked)
        self.masked_slots = masked
        self._put_placement(self.slot_expert)

    def save_placement(self, path: str | Path) -> None:
        """Writes which slot holds which expert, for a start from there (`placement`). Raises ConfigError."""
        write_placement(path, self.slot_expert, self.config.experts, self.mesh_spec.expert_devices)

    @functools.cached_property
    def mover(self) -> Mover:
        """What moves experts; compiled, and its room taken, when it is first asked for. Raises ConfigError."""
        if not self.config.stacks["moe"]:
            raise ConfigError(f"{self.name} has no experts to move")
        return Mover(self.mesh, self.rules, self.params["experts"])

    def _put_placement(self, slot_expert: Int[np.ndarray, "L S"]) -> None:
        """From the next step on, tokens go where these slots are."""
        placement = placement_of(slot_expert, self.config.experts, self.masked_slots)
        self.placement = jax.device_put(placement, NamedSharding(self.mesh, P()))
        self.slot_expert = np.asarray(placement.slot_expert)
        self.simulate(0)

    def simulate(self, rows: int) -> None:
        """Before each step of so many rows of all ranks; without simulated routing nothing to do."""
        if self._simulation is None:
            return
        on_mesh, drawn = NamedSharding(self.mesh, P()), self._simulation.next(rows)
        if self._drawn is None or drawn.scores is not self._drawn[0].scores:
            self._drawn = (drawn, *jax.device_put((drawn.scores, drawn.trace), on_mesh))
        _, scores, trace = self._drawn
        simulated = Simulated(scores, trace, drawn.clock)
        self.placement = self.placement._replace(simulated=simulated)

    @property
    def invalid(self) -> str:
        """Why answers are no model's; "" if they are."""
        return f"outputs are invalid: routing is simulated ({self._simulation.text})" if self._simulation else ""

    def strategy(self, tokens: int) -> Strategy:
        """How mixtures dispatch in a program of so many tokens a rank."""
        return self.exchange(tokens).strategy

    def exchange(self, tokens: int) -> Exchange:
        """The same, with the shape of a mixture."""
        config, execution = self.config, self.execution
        shape = Mixture(
            tokens,
            config.width,
            config.experts_per_token,
            self.mesh_spec.expert_devices,
            self.dtype.itemsize,
            execution.capacity_factor,
        )
        return Exchange(choose(execution.strategy, shape, execution.platform), shape)

    def logits(self, token_ids: Int[np.ndarray, "B T"] | Sequence[Sequence[int]]) -> Float[np.ndarray, "B T V"]:
        """Logits at every position of every row, float32, without a cache.

        Raises InvalidRequestError on a bad id or shape.

        Compiles once for each shape.
        """
        tokens = self._checked(token_ids, 2)
        batch, length = tokens.shape
        per_rank = -(-batch // self.num_ranks)
        padded = np.zeros((self.num_ranks * per_rank, length), np.int32)
        padded[:batch] = tokens
        positions = np.where(np.arange(len(padded))[:, None] < batch, np.arange(length), -1).astype(np.int32)
        by_rank = [array.reshape(self.num_ranks, per_rank, length) for array in (padded, positions)]
        with jax.set_mesh(self.mesh):
            placed = jax.device_put(by_rank, NamedSharding(self.mesh, RANK_ROWS))
            out = self._forward(self.params, self.placement, *placed)
        return np.asarray(out).reshape(len(padded), length, -1)[:batch]

    def logits_decode(
        self, token_ids: Int[np.ndarray, "T"] | Sequence[int], prefill: int, page_size: int = 16
    ) -> Float[np.ndarray, "steps V"]:
        """Logits through the paged cache, float32: after `prefill` tokens at once, then after each further one.

        Row i is what follows token prefill - 1 + i. Raises InvalidRequestError on a bad id, shape or number.
        """
        tokens = self._checked(token_ids, 1)
        if not 1 <= prefill <= len(tokens):
            raise InvalidRequestError(f"prefill={prefill} must be between 1 and the {len(tokens)} tokens", "prefill")
        spans, total = self.config.spans, -(-len(tokens) // page_size)
        rings = [pages_reached(span, prefill, page_size, total) for span in spans]
        cache = make_cache(self.config, self.mesh, self.rules, tuple(rings), page_size, self.dtype)
        rows = []
        for start in (0, *range(prefill, len(tokens))):
            count = prefill if start == 0 else 1
            # One sequence on the first rank; a windowed group reuses its pages in turn.
            firsts = [span.first(start) // page_size for span in spans]
            widths = [pages_reached(span, count, page_size, total) for span in spans]
            tables = [
                (first + np.arange(width)) % ring for first, width, ring in zip(firsts, widths, rings, strict=True)
            ]
            on_first = np.arange(self.num_ranks) == 0
            positions = np.where(on_first[:, None], start + np.arange(count), -1)[:, None]
            fed = np.broadcast_to(tokens[start : start + count], positions.shape)
            on_ranks = [np.broadcast_to(table, (self.num_ranks, 1, len(table))) for table in tables]
            starts = [np.full((self.num_ranks, 1), first * page_size) for first in firsts]
            arrays = jax.tree.map(
                lambda array: array.astype(np.int32), (fed, positions, tuple(on_ranks), tuple(starts))
            )
            with jax.set_mesh(self.mesh):
                out, cache = self._cached_forward(self.params, self.placement, cache, *self._placed(arrays))
            rows.append(np.asarray(out)[0])
        return np.stack(rows)

    def mtp_logits(self, token_ids: Int[np.ndarray, "T"] | Sequence[int]) -> Float[np.ndarray, "rows V"]:
        """Logits of multi-token prediction, float32 [T - 1, V]: row i is of token i + 2, given tokens 0 to i + 1.

        Raises ConfigError if the checkpoint has no layer for it, InvalidRequestError on a bad id or shape.
        """
        if not self.config.mtp_layers:
            raise ConfigError(f"{self.name} has no layers for multi-token prediction")
        tokens = self._checked(token_ids, 1)
        if len(tokens) < 2:
            raise InvalidRequestError("multi-token prediction needs at least two tokens")
        on_first = np.arange(self.num_ranks)[:, None, None] == 0
        positions = np.where(on_first, np.arange(len(tokens) - 1), -1).astype(np.int32)
        windows = [np.broadcast_to(part, positions.shape).astype(np.int32) for part in (tokens[:-1], tokens[1:])]
        with jax.set_mesh(self.mesh):
            out = self._mtp_forward(self.params, self.placement, *self._placed((*windows, positions)))
        return np.asarray(out)[0]

    def _checked(self, token_ids: Any, ndim: int) -> np.ndarray:
        tokens = np.asarray(token_ids)
        if tokens.ndim != ndim or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            axes = "[B, T]" if ndim == 2 else "[T]"
            raise InvalidRequestError(f"token_ids must be integers {axes}, not {tokens.dtype}{list(tokens.shape)}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise InvalidRequestError(
                f"token ids span {tokens.min()}..{tokens.max()}, outside the vocabulary of {self.config.vocab_size}"
            )
        return tokens

    def _placed(self, arrays: Any) -> Any:
        """Host arrays with a leading rank axis, each on its ranks."""
        return jax.tree.map(
            lambda array: jax.device_put(array, NamedSharding(self.mesh, P(RANKS, *(None,) * (array.ndim - 1)))), arrays
        )

    @functools.cached_property
    def _cached_forward(self) -> Any:
        def forward(
            params: Any, placement: Any, cache: Any, tokens: Array, positions: Array, tables: Any, firsts: Any
        ) -> tuple[Array, Any]:
            model = merge(self.abstract, params)
            context = PagedContext(cache, tables, firsts)
            hidden, written, _ = model(tokens, positions, placement, context, self.execution)
            assert written is not None
            logits = model.logits(hidden[:, -1:], Compute(self.execution.kernels))
            return logits[:, 0].astype(jnp.float32), written.cache

        return jax.jit(forward, donate_argnums=2)

    @functools.cached_property
    def _mtp_forward(self) -> Any:
        def forward(params: Any, placement: Any, tokens: Array, following: Array, positions: Array) -> Logits:
            model = merge(self.abstract, params)
            hidden, _, _ = model(tokens, positions, placement, None, self.execution)
            hidden, _, _ = model.predict_next(hidden, following, positions, placement, None, self.execution)
            return model.logits(hidden, Compute(self.execution.kernels)).astype(jnp.float32)

        return jax.jit(forward)

    @functools.cached_property
    def _forward(self) -> Any:
        def forward(params: Any, placement: Any, tokens: Array, positions: Array) -> Logits:
            model = merge(self.abstract, params)
            hidden, _, _ = model(tokens, positions, placement, None, self.execution)
            return model.logits(hidden, Compute(self.execution.kernels)).astype(jnp.float32)

        return jax.jit(forward)


class LayerMove:
    """One layer of a model on its way to another placement, one expert after the other; until `commit` it is as it was.

    of_layer: the expert of every slot. moves: how many of them change.
    """

    def __init__(self, model: Model, layer: int, of_layer: Int[np.ndarray, "S"]) -> None:
        self._model, self._layer, self._of_layer = model, layer, of_layer
        old = model.slot_expert[layer]
        self._sources = slot_sources(old, of_layer, model.mesh_spec.expert_devices)
        self._slots = np.flatnonzero(old != of_layer)
        self._digests: list[tuple[Array, Array]] = []
        self.moves = len(self._slots)

    @property
    def fetched(self) -> bool:
        return len(self._digests) == self.moves

    def fetch(self) -> None:
        """Brings the next expert beside the layer."""
        model, slot = self._model, int(self._slots[len(self._digests)])
        source = int(self._sources[slot])
        self._digests.append(model.mover.fetch(model.params["experts"], self._layer, source, slot))

    def commit(self) -> None:
        """Puts what was fetched in its slots, and has tokens go there, from the next step on.

        Raises MoveError, and changes nothing, if an expert did not arrive as it was sent.
        """
        model = self._model
        for slot, digests in zip(self._slots, self._digests, strict=True):
            sent, there = map(np.asarray, digests)
            if not same(sent, there, model.rules):
                raise MoveError(
                    f"expert {self._of_layer[slot]} of mixture {self._layer} reached slot {slot} other than it left "
                    f"slot {self._sources[slot]}; the layer stays as it was"
                )
        placed = model.slot_expert.copy()
        placed[self._layer] = self._of_layer
        placement_of(placed, model.config.experts, model.masked_slots)
        model.params["experts"] = model.mover.commit(model.params["experts"], self._layer, self._slots)
        model._put_placement(placed)


def _kept_in(experts: dict[str, Array], dtype: jnp.dtype) -> dict[str, Array]:
    """The experts' parameters in another dtype, with scales if it has 8 bits. Stacks that are replaced are dropped."""
    kept: dict[str, Array] = {}
    for name in sorted(experts):
        stack = experts.pop(name)
        if dtype in LARGEST:
            run = jax.jit(functools.partial(quantise, dtype=dtype))
            kept[name], kept[f"{name}_scale"] = run(stack)
        else:
            kept[name] = jax.jit(lambda array: array.astype(dtype))(stack)
    return kept
