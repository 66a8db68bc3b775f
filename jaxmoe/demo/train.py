"""Trains the embedded demo models with the runtime's own modules: `python -m jaxmoe.demo.train --family mixtral`.

The data are what `jaxmoe.demo.corpus` prepares. Every step draws its windows from a generator seeded by (seed, step),
so an interrupted run goes on from its last saved state as if it had never stopped. The result is an ordinary Hugging
Face
checkpoint: config.json, model.safetensors (bfloat16), tokenizer.json, tokenizer_config.json, generation_config.json.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from jaxmoe.checkpoints.writer import save_hf
from jaxmoe.demo import corpus
from jaxmoe.errors import ConfigError, JaxmoeError
from jaxmoe.models.decoder import Execution, merge
from jaxmoe.models.registry import family_of
from jaxmoe.moe.placement import Placement, initial_placement
from jaxmoe.sharding.mesh import MeshSpec, make_mesh

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 4096,
        "hidden_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 40,
        "intermediate_size": 216,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "router_aux_loss_coef": 0.01,
        "torch_dtype": "bfloat16",
    },
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 4096,
        "hidden_size": 160,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 48,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
    "llama4": {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": 4096,
        "hidden_size": 160,
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 2,
        "intermediate_size": 176,
        "intermediate_size_mlp": 432,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 40,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 128,
        "no_rope_layer_interval": 4,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 256,
        "attn_scale": 0.1,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "router_aux_loss_coef": 0.01,
        "torch_dtype": "bfloat16",
    },
}


SHARES = {"prose": 0.32, "drama": 0.12, "code": 0.2, "french": 0.12, "german": 0.1, "spanish": 0.1}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of the run: windows of one length, drawn from the domains in these shares."""

    share: float
    length: int
    mix: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the shipped weights were trained with; tokens a step are the same in every phase.

    router_aux: weight of the loss that balances experts. bias_step: where routers have a bias, how far it moves a step
    against an expert's excess load, instead of that loss (DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2).
    mtp_weight: of the loss of predicting a token more.
    """

    tokens: int = 10_000_000
    tokens_per_step: int = 2048
    peak_lr: float = 4e-3
    warmup_steps: int = 150
    weight_decay: float = 0.05
    clip: float = 1.0
    router_aux: float = 0.01
    bias_step: float = 2e-3
    mtp_weight: float = 0.3
    phases: tuple[Phase, ...] = (
        Phase(0.8, 256, SHARES | {"chat": 0.04}),
        # Longer windows at the end teach the whole context, and more dialogue how to answer.
        Phase(0.2, 1024, {name: 0.85 * share for name, share in SHARES.items()} | {"chat": 0.18}),
    )

    @property
    def steps(self) -> int:
        return self.tokens // self.tokens_per_step

    def phase(self, step: int) -> Phase:
        done = step / self.steps
        for phase in self.phases:
            if done < phase.share:
                return phase
            done -= phase.share
        return self.phases[-1]


def sample_windows(
    arrays: Mapping[str, np.ndarray], phase: Phase, rows: int, rng: np.random.Generator
) -> Int[np.ndarray, "rows T"]:
    """`rows` windows of phase.length + 1 tokens, each from a domain drawn by its share, at a uniform place."""
    names = [name for name in phase.mix if name in arrays]
    shares = np.array([phase.mix[name] for name in names])
    chosen = rng.choice(len(names), size=rows, p=shares / shares.sum())
    window = phase.length + 1
    out = np.empty((rows, window), np.int32)
    for row, index in enumerate(chosen):
        tokens = arrays[names[index]]
        start = rng.integers(0, len(tokens) - window + 1)
        out[row] = tokens[start : start + window]
    return out


def balance_loss(logits: Float[Array, "L R N E"], experts: Int[Array, "L R N K"]) -> Float[Array, ""]:
    """Switch Transformer's auxiliary loss (arXiv:2101.03961, eq. 4), for top-k.

    E * sum(share of tokens * mean probability), divided by k so that perfect balance is 1.
    """
    num_experts = logits.shape[-1]
    probability = jnp.mean(jax.nn.softmax(logits.astype(jnp.float32)), axis=(1, 2))
    share = jnp.mean(jnp.sum(jax.nn.one_hot(experts, num_experts), axis=3), axis=(1, 2))
    return num_experts * jnp.mean(jnp.sum(share * probability, axis=-1)) / experts.shape[-1]


class Trainer:
    """Model, optimiser and compiled steps of one run."""

    def __init__(self, family: str, recipe: Recipe, seed: int) -> None:
        self.recipe, self.seed, self.hf = recipe, seed, CONFIGS[family]
        self.family = family_of(self.hf)
        self.config = config = self.family.read_config(self.hf)
        self.mesh = make_mesh(MeshSpec())
        self.placement = initial_placement(len(config.stacks["moe"]), config.experts, config.experts)
        with jax.set_mesh(self.mesh):
            model = self.family(config, config.experts, jnp.dtype("float32"), nnx.Rngs(seed))
            self.abstract = nnx.eval_shape(lambda: model)
        self.params: Any = nnx.to_pure_dict(nnx.state(model))
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, recipe.peak_lr, min(recipe.warmup_steps, recipe.steps // 10), recipe.steps, recipe.peak_lr * 0.02
        )
        decays = jax.tree.map(lambda leaf: leaf.ndim > 2, self.params)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(recipe.clip),
            optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=recipe.weight_decay, mask=decays),
        )
        # Moments lie as their parameters do; scalars on the mesh too, or the second step would compile again.
        on_mesh = NamedSharding(self.mesh, P())
        self.opt_state = jax.tree.map(
            lambda leaf: leaf if leaf.ndim else jax.device_put(leaf, on_mesh), self.optimizer.init(self.params)
        )
        self.step = 0

    def _loss(
        self, params: Any, windows: Int[Array, "B T1"], placement: Placement
    ) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, "L E"]]]:
        """The loss, the cross-entropy alone, and how many (token, choice) each expert of each mixture layer took."""
        model = merge(self.abstract, params)
        tokens, targets = windows[None, :, :-1], windows[None, :, 1:]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[2]), tokens.shape)
        execution = Execution(unroll=True)
        hidden, _, routed = model(tokens, positions, placement, None, execution)
        assert routed is not None

        def cross_entropy(hidden: Array, targets: Array) -> Array:
            """targets -1 are left out."""
            logits = jax.sharding.reshard(model.logits(hidden), P())[0]
            each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
            return jnp.sum(jnp.where(targets >= 0, each, 0)) / jnp.sum(targets >= 0)

        plain = cross_entropy(hidden, targets.reshape(-1))
        loss = plain
        if self.config.mtp_layers:
            further, _, also = model.predict_next(hidden, targets, positions, placement, None, execution)
            routed = jax.tree.map(lambda main, last: jnp.concatenate([main, last[None]]), routed, also)
            after_next = jnp.pad(windows[:, 2:], ((0, 0), (0, 1)), constant_values=-1)
            loss += self.recipe.mtp_weight * cross_entropy(further, after_next.reshape(-1))
        routed = jax.sharding.reshard(routed, P())
        loads = jnp.sum(jax.nn.one_hot(routed.experts[:, 0], self.config.experts), axis=(1, 2))
        if self.config.groups is None:
            loss += self.recipe.router_aux * balance_loss(routed.logits, routed.experts)
        return loss, (plain, loads)

    @functools.cached_property
    def _update(self) -> Any:
        def update(params: Any, opt_state: Any, windows: Array, placement: Placement) -> tuple[Any, Any, Array]:
            grads, (cross_entropy, loads) = jax.grad(self._loss, has_aux=True)(params, windows, placement)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            if "router_bias" in params:
                excess = jnp.sign(loads - jnp.mean(loads, axis=-1, keepdims=True))
                params = {**params, "router_bias": params["router_bias"] - self.recipe.bias_step * excess}
            return params, opt_state, cross_entropy

        return jax.jit(update, donate_argnums=(0, 1))

    @functools.cached_property
    def _evaluate(self) -> Any:
        return jax.jit(lambda params, windows, placement: self._loss(params, windows, placement)[1])

    def train_step(self, arrays: Mapping[str, np.ndarray]) -> Array:
        """One update; returns the batch's cross-entropy a token, in nats."""
        phase = self.recipe.phase(self.step)
        rng = np.random.default_rng((self.seed, self.step))
        windows = sample_windows(arrays, phase, self.recipe.tokens_per_step // phase.length, rng)
        with jax.set_mesh(self.mesh):
            self.params, self.opt_state, loss = self._update(self.params, self.opt_state, windows, self.placement)
        self.step += 1
        return loss

    def evaluate(self, tokens: Int[np.ndarray, "tokens"], windows: int = 8) -> tuple[float, Float[np.ndarray, "L E"]]:
        """Cross-entropy, and the share of tokens each expert took, on evenly spaced windows of 256 tokens."""
        starts = np.linspace(0, len(tokens) - 257, windows).astype(int)
        batch = np.stack([tokens[start : start + 257] for start in starts]).astype(np.int32)
        with jax.set_mesh(self.mesh):
            loss, loads = self._evaluate(self.params, batch, self.placement)
        loads = np.asarray(loads)
        return float(loss), loads / loads.sum(-1, keepdims=True)

    def save(self, path: Path) -> None:
        """Keeps what resuming needs; the previous state stays whole until this one is."""
        fresh, stale = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
        for leftover in (fresh, stale):
            shutil.rmtree(leftover, ignore_errors=True)
        ocp.save(fresh, {"params": self.params, "opt_state": self.opt_state, "step": np.array(self.step, np.int32)})
        if path.exists():
            path.rename(stale)
        fresh.rename(path)
        shutil.rmtree(stale, ignore_errors=True)

    def restore(self, path: Path) -> None:
        like = {"params": self.params, "opt_state": self.opt_state, "step": np.array(0, np.int32)}
        state = ocp.load(path, like)
        self.params, self.opt_state, self.step = state["params"], state["opt_state"], int(state["step"])

    def export(self, out: Path, tokenizer_dir: Path) -> None:
        """Writes the checkpoint in Hugging Face's layout, weights in bfloat16."""
        out.mkdir(parents=True, exist_ok=True)
        save_hf(out, self.family.keys, self.config, self.params, jnp.dtype("bfloat16"), wide=self.family.wide())
        (out / "config.json").write_text(json.dumps(self.hf, indent=2) + "\n")
        generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
        (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer_dir / name, out / name)


def report(trainer: Trainer, val: Mapping[str, np.ndarray]) -> str:
    """Markdown table: cross-entropy of each domain and the last layer's expert load, the figures docs quote."""
    lines = ["| domain | cross-entropy | last layer, % of tokens per expert | max/mean |", "|---|---|---|---|"]
    for name, tokens in val.items():
        loss, loads = trainer.evaluate(tokens)
        last = loads[sum(kind.moe for kind in trainer.config.kinds) - 1]  # of the main model
        lines.append(
            f"| {name} | {loss:.2f} | {' '.join(f'{100 * x:.0f}' for x in last)} | {last.max() / last.mean():.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxmoe.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=sorted(CONFIGS), default="mixtral")
    parser.add_argument("--data", type=Path, default=Path("demo_data"), help="corpus folder; built there when absent")
    parser.add_argument("--work", type=Path, default=Path("demo_work"), help="state to resume from")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="where the checkpoint is written")
    parser.add_argument("--tokens", type=int, default=Recipe.tokens, help="training tokens in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps between saved states")
    args = parser.parse_args(argv)
    try:
        run(args)
    except JaxmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    if args.tokens < Recipe.tokens_per_step:
        raise ConfigError(f"--tokens {args.tokens} is less than one step of {Recipe.tokens_per_step} tokens")
    data = corpus.load(args.data) if (args.data / "corpus.json").exists() else corpus.build(args.data)
    train = {name: domain.train for name, domain in data.domains.items()}
    val = {name: domain.val for name, domain in data.domains.items()}
    recipe = Recipe(tokens=args.tokens)
    trainer = Trainer(args.family, recipe, args.seed)
    state = args.work.resolve() / f"{args.family}-seed{args.seed}"
    if state.exists():
        trainer.restore(state)
        print(f"resumed at step {trainer.step} of {recipe.steps} from {state}")
    state.parent.mkdir(parents=True, exist_ok=True)
    count = sum(leaf.size for leaf in jax.tree.leaves(trainer.params))
    print(f"{args.family}: {count / 1e6:.2f} M parameters, {recipe.steps} steps of {recipe.tokens_per_step} tokens")
    average, began, first = None, time.monotonic(), trainer.step
    with tqdm(total=recipe.steps, initial=trainer.step, unit="step", mininterval=5) as bar:
        while trainer.step < recipe.steps:
            loss = float(trainer.train_step(train))
            average = loss if average is None else 0.98 * average + 0.02 * loss
            rate = (trainer.step - first) * recipe.tokens_per_step / (time.monotonic() - began)
            bar.set_postfix(loss=f"{average:.3f}", tok_s=f"{rate:.0f}", refresh=False)
            bar.update()
            if trainer.step % args.save_every == 0 or trainer.step == recipe.steps:
                trainer.save(state)
                bar.write(f"step {trainer.step}: train {average:.3f}\n{report(trainer, val)}")
                trainer.export(args.out, data.folder)
    print(f"{args.out}: trained {recipe.steps} steps in {(time.monotonic() - began) / 60:.1f} min")


if __name__ == "__main__":
    raise SystemExit(main())
