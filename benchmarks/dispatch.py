"""One mixture layer by every strategy: bytes that leave a device, rounds and time, over tokens and skew.

    python benchmarks/dispatch.py [--mesh ep=8] [--expert-axes ep] [--tokens 1,8,64,256] [--model deepseek,mixtral]
        [--kernels auto]

The floor is the same work without an exchange: all tokens of all ranks through all experts on one device. Virtual
devices share this machine's cores, so the ratio to the floor says what exchanging costs in copies and waiting, and not
what a network would. The oracle, dense, is left out where it takes seconds.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

import jaxmoe
from jaxmoe.moe.dispatch import TOKENS, mixture
from jaxmoe.moe.experts import Experts
from jaxmoe.moe.placement import choose_slots, initial_placement
from jaxmoe.moe.strategy import Mixture, choose, sent_bytes
from jaxmoe.ops import native
from jaxmoe.ops.linear import Kernels
from jaxmoe.sharding.devices import use_huge_pages
from jaxmoe.sharding.mesh import MeshSpec, make_mesh, slots_for
from jaxmoe.sharding.rules import Rules

# Width, experts, experts a token, width of an expert.
MODELS = {"deepseek": (512, 64, 8, 256), "mixtral": (512, 8, 2, 1792), "llama4": (512, 16, 1, 1024)}
SKEWS = ("balanced", "zipf 1.2", "same experts")
STRATEGIES = ("replicate", "all_to_all")
DENSE_TOKENS = 8  # of a rank; with more the oracle takes seconds


class Layer:
    """One mixture layer of a model on a mesh."""

    def __init__(self, spec: MeshSpec, model: str, kernels: Kernels) -> None:
        self.kernels = kernels
        self.width, self.experts, self.choices, inner = MODELS[model]
        self.spec, self.mesh = spec, make_mesh(spec)
        slots = slots_for(self.experts, spec)
        self.placement = initial_placement(1, self.experts, slots)
        rules = Rules.fit(spec, expert_width=inner)

        def make() -> Experts:
            return Experts(1, slots, self.width, inner, "silu", jnp.dtype("float32"), nnx.Rngs(0), rules)

        with jax.set_mesh(self.mesh):
            self.graph, _ = nnx.split(nnx.eval_shape(make))
            self.state = jax.jit(lambda: nnx.state(make()))()
        use_huge_pages(self.state)

    def run(self, strategy: str, *arrays: np.ndarray) -> functools.partial[jax.Array]:
        """A compiled call on these tokens, slots and weights, which lie on their ranks already."""

        def layer(state: nnx.State, x: jax.Array, slots: jax.Array, weights: jax.Array) -> jax.Array:
            return mixture(x, slots, weights, nnx.merge(self.graph, state), 0, strategy, kernels=self.kernels)

        with jax.set_mesh(self.mesh):
            placed = jax.device_put(arrays, NamedSharding(self.mesh, TOKENS))
            return functools.partial(jax.jit(layer).lower(self.state, *placed).compile(), self.state, *placed)

    def routing(self, tokens: int, skew: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, their slots and weights on every rank; experts of a token are different ones."""
        rng = np.random.default_rng(0)
        shape = (self.spec.num_ranks, tokens, self.choices)
        popularity = np.arange(1.0, self.experts + 1) ** (-1.2 if skew == "zipf 1.2" else 0)
        # The largest of log-probabilities with Gumbel noise: a draw without replacement.
        noise = rng.gumbel(size=(*shape[:2], self.experts)) * (skew != "same experts")
        chosen = np.argsort(-(np.log(popularity) + noise), axis=-1, kind="stable")[..., : self.choices]
        replicas = [jnp.asarray(each[0]) for each in (self.placement.replica_slots, self.placement.replica_count)]
        slots = jax.vmap(choose_slots, in_axes=(0, None, None))(chosen.astype(np.int32), *replicas)
        x = rng.normal(size=(*shape[:2], self.width)).astype(np.float32)
        return x, np.asarray(slots), rng.random(shape).astype(np.float32)

    def shape(self, tokens: int) -> Mixture:
        return Mixture(tokens, self.width, self.choices, self.spec.expert_devices, 4)

    def rounds(self, slots: np.ndarray) -> int:
        """That an exchange takes: the longest queue of any rank, a token once for each device."""
        per_device = self.placement.slot_expert.shape[1] // self.spec.expert_devices
        goes = (slots[..., None] // per_device == np.arange(self.spec.expert_devices)).any(axis=2)
        return -(-int(goes.sum(axis=1).max()) // self.shape(slots.shape[1]).capacity)


def seconds(runs: list[functools.partial[jax.Array]], budget: float) -> list[float]:
    """Median time of each, one after the other in turn so that all meet the same disturbances."""
    taken: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run().block_until_ready()
    until = time.perf_counter() + budget
    while len(taken[0]) < 3 or time.perf_counter() < until:
        for run, times in zip(runs, taken, strict=True):
            began = time.perf_counter()
            run().block_until_ready()
            times.append(time.perf_counter() - began)
    return [statistics.median(times) for times in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="ep=8")
    parser.add_argument("--expert-axes", default="ep")
    parser.add_argument("--tokens", default="1,8,64,256", help="of a rank")
    parser.add_argument("--model", default="deepseek,mixtral", help=", ".join(MODELS))
    parser.add_argument("--kernels", default="auto", choices=("auto", "native", "xla"))
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a row")
    args = parser.parse_args()
    spec = MeshSpec.parse(args.mesh, args.expert_axes)
    jaxmoe.virtual_devices(spec.num_devices)
    platform = jax.devices()[0].platform
    kernels = native.choose(args.kernels, platform, jnp.dtype("float32"))
    print(f"mesh {spec}, experts over {spec.axes_of_experts}, {platform}, {kernels} kernels")
    columns = ("model", "tokens a rank", "skew", "auto takes", "kB sent: replicate, all_to_all", "rounds",
               "ms: dense, replicate, all_to_all", "floor, ms", "auto to floor")  # fmt: skip
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for model in args.model.split(","):
        layer, alone = Layer(spec, model, kernels), Layer(MeshSpec(), model, kernels)
        for tokens in map(int, args.tokens.split(",")):
            for skew in SKEWS:
                shape, (x, slots, weights) = layer.shape(tokens), layer.routing(tokens, skew)
                runs = [layer.run(name, x, slots, weights) for name in STRATEGIES]
                runs.append(alone.run("replicate", *alone.routing(tokens * spec.num_ranks, skew)))
                *times, floor = seconds(runs, args.budget)
                dense = "-"
                if tokens <= DENSE_TOKENS:
                    (taken,) = seconds([layer.run("dense", x, slots, weights)], 0)
                    dense = f"{taken * 1e3:.0f}"
                rounds, chosen = layer.rounds(slots), choose("auto", shape, "cpu")
                sent = [sum(sent_bytes("replicate", shape)), sum(sent_bytes("all_to_all", shape, rounds))]
                print(
                    f"| {model} | {tokens} | {skew} | {chosen} | {', '.join(f'{each / 1e3:.0f}' for each in sent)} "
                    f"| {rounds} | {', '.join([dense, *(f'{taken * 1e3:.1f}' for taken in times)])} "
                    f"| {floor * 1e3:.1f} | {times[STRATEGIES.index(chosen)] / floor:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
