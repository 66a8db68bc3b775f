"""Routing that benchmarks prescribe: experts drawn from a known distribution, or replayed, not those a router chooses.

Everything else is the real path: routers run, tokens travel, experts compute, each choice with weight 1/K. What comes
out is no model's answer. Experts of a token are distinct, drawn one after the other without replacement.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.errors import ConfigError
from jaxmoe.moe.routing import Routing, without_padding

KINDS = "uniform, normal, zipf:S, hot:N,SHARE, drift:S,CALLS or trace:FILE"
DRIFT_LEVELS = 16  # distributions between one ranking and the next
NEVER = -1e9
TRACED = 1 << 16  # tokens that a recording keeps


class Simulated(NamedTuple):
    """What a compiled step needs, as data: beside the clock it rarely changes.

    scores: log-probabilities of experts; trace: the experts of tokens, [0, L, K] unless they are replayed.
    clock: rows of all ranks that were routed before.
    """

    scores: Float[Array | np.ndarray, "L E"]
    trace: Int[Array | np.ndarray, "tokens L K"]
    clock: Int[Array | np.ndarray, ""] | np.int32


def simulated_routing(
    simulated: Simulated,
    layer: Int[Array, ""],
    rank: Int[Array, ""],
    k: int,
    valid: Bool[Array, "N"],
    seed: int = 0,
) -> Routing:
    """What the rows of a rank are given. Row n of rank r in turn is row clock + r N + n of the trace, which repeats."""
    rows = valid.shape[0]
    first = simulated.clock + rank * rows
    if simulated.trace.shape[0]:
        at = (first + jnp.arange(rows)) % simulated.trace.shape[0]
        experts = simulated.trace[at, layer].astype(jnp.int32)
    else:
        # The largest of log-probability + Gumbel noise: drawn without replacement.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), first), layer)
        scores = simulated.scores[layer]
        _, experts = jax.lax.top_k(scores + jax.random.gumbel(key, (rows, scores.shape[0])), k)
    return without_padding(experts, jnp.full(experts.shape, 1 / k, jnp.float32), valid)


class Simulation:
    """The host's side: reads what is asked for, and says what to expect of it.

    text: "uniform"; "normal" (bins of the logistic of a normal variate, as vLLM's simulator has it); "zipf:S", shares
    as 1/rank^S; "hot:N,SHARE", N experts with that share of all in equal parts; "drift:S,CALLS", a Zipf whose ranking
    turns into another within so many calls, and so on; "trace:FILE", of a recording. Which experts are which ranks is
    drawn for each layer from `seed`.
    Raises ConfigError.
    """

    def __init__(self, text: str, layers: int, experts: int, k: int, seed: int = 0) -> None:
        self.text, self._shape, self._k, self._seed = text, (layers, experts), k, seed
        self._rows = self._calls = 0
        self._kind, _, rest = text.partition(":")
        numbers = {"uniform": 0, "normal": 0, "zipf": 1, "hot": 2, "drift": 2}
        self._trace = np.zeros((0, layers, k), np.int16)
        self._numbers: list[float] = []
        if self._kind == "trace" and rest:
            self._trace = _read_trace(rest, layers, experts, k)
            return
        try:
            self._numbers = [float(part) for part in rest.split(",")] if rest else []
        except ValueError:
            self._kind = ""
        if numbers.get(self._kind, -1) != len(self._numbers) or not all(map(math.isfinite, self._numbers)):
            raise ConfigError(f"simulated routing {text!r} is not one of {KINDS}")
        if self._kind == "hot" and not (1 <= self._numbers[0] <= experts and 0 < self._numbers[1] <= 1):
            raise ConfigError(f"{text!r}: N must be between 1 and the {experts} experts, SHARE above 0 and at most 1")
        if self._kind == "hot" and self._numbers[1] == 1 and self._numbers[0] < k:
            raise ConfigError(f"{text!r}: tokens have {k} experts each, so that fewer hot ones cannot take all")
        if self._kind == "drift" and self._numbers[1] < 1:
            raise ConfigError(f"{text!r}: CALLS must be at least 1")

    def probabilities(self, call: int = 0) -> Float[np.ndarray, "L E"]:
        """Of the first expert that a token draws, in the call of that number."""
        layers, experts = self._shape
        if self._kind == "trace":
            return self._traced()
        if self._kind == "normal":
            edges = np.arange(1, experts) / experts
            below = np.array([0.5 * (1 + math.erf(math.log(edge / (1 - edge)) / math.sqrt(2))) for edge in edges])
            return np.tile(np.diff(below, prepend=0, append=1), (layers, 1))
        if self._kind == "hot":
            number, share = int(self._numbers[0]), self._numbers[1]
            ranked = np.full(experts, (1 - share) / max(1, experts - number))
            ranked[:number] = share / number if number < experts else 1 / experts
            return self._by_rank(ranked, 0)
        ranked = (1 + np.arange(experts)) ** -(self._numbers[0] if self._numbers else 0.0)
        ranked /= ranked.sum()
        if self._kind != "drift":
            return self._by_rank(ranked, 0)
        turn, within = divmod(call, int(self._numbers[1]))
        level = within * DRIFT_LEVELS // int(self._numbers[1]) / DRIFT_LEVELS
        return (1 - level) * self._by_rank(ranked, turn) + level * self._by_rank(ranked, turn + 1)

    def expected(self, call: int = 0) -> Float[np.ndarray, "L E"]:
        """The share of tokens that each expert gets; a layer's sum is K."""
        shares = self.probabilities(call)
        return shares * self._k if self._kind == "trace" else np.array([inclusion(row, self._k) for row in shares])

    def next(self, rows: int) -> Simulated:
        """For a call of so many rows of all ranks."""
        simulated = Simulated(self._scores(self._level()), self._trace, np.int32(self._rows & 0x7FFFFFFF))
        self._rows += rows
        self._calls += rows > 0
        return simulated

    def _level(self) -> int:
        """A call whose distribution is that of the present one."""
        if self._kind != "drift":
            return 0
        step = max(1, int(self._numbers[1]) // DRIFT_LEVELS)
        return self._calls // step * step

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a simulation lives as long as its process
    def _scores(self, call: int) -> Float[np.ndarray, "L E"]:
        return np.log(np.maximum(self.probabilities(call), math.exp(-80))).astype(np.float32)

    def _traced(self) -> Float[np.ndarray, "L E"]:
        layers, experts = self._shape
        counts = np.array([np.bincount(self._trace[:, layer].ravel(), minlength=experts) for layer in range(layers)])
        return counts / counts.sum(axis=1, keepdims=True)

    def _by_rank(self, ranked: Float[np.ndarray, "E"], turn: int) -> Float[np.ndarray, "L E"]:
        rng = np.random.default_rng((self._seed, turn))
        return np.array([ranked[rng.permutation(len(ranked))] for _ in range(self._shape[0])])


def inclusion(shares: Float[np.ndarray, "E"], k: int) -> Float[np.ndarray, "E"]:
    """The probability of each item to be among k that are drawn without replacement, in proportion to their shares.

    If items arrive as Poisson processes of these rates, the draw is the first k to arrive: an item is in it if fewer
    than k others are there by the time it comes. Integrated over that time, in steps of its logarithm.
    """
    experts = len(shares)
    if k >= experts:
        return np.ones(experts)
    rates = np.maximum(shares, 1e-12)
    times = np.exp(np.linspace(np.log(1e-5), np.log(60 / rates.min()), 1500))
    there = -np.expm1(-np.outer(times, rates))
    found = np.empty(experts)
    for item in range(experts):
        # fewer[j]: probability that j others have arrived, for j below k.
        fewer = np.zeros((k, len(times)))
        fewer[0] = 1
        for other in range(experts):
            if other != item:
                arrived = there[:, other]
                fewer[1:] = fewer[1:] * (1 - arrived) + fewer[:-1] * arrived
                fewer[0] *= 1 - arrived
        density = rates[item] * np.exp(-rates[item] * times) * fewer.sum(axis=0)
        found[item] = np.trapezoid(density * times, np.log(times))
    return found * k / found.sum()


class Recorder:
    """The experts of the first tokens that an engine routes, in the order of calls, ranks and rows."""

    def __init__(self, most: int = TRACED) -> None:
        self._most = most
        self._kept: list[np.ndarray] = []
        self.num_tokens = 0

    def record(self, experts: Int[Array | np.ndarray, "L R N K"]) -> None:
        """Of one call; padding, -1, is left out."""
        if self.num_tokens >= self._most:
            return
        by_row = np.moveaxis(np.asarray(experts), 0, 2)
        routed = by_row[by_row[:, :, 0, 0] >= 0][: self._most - self.num_tokens]
        self._kept.append(routed.astype(np.int16))
        self.num_tokens += len(routed)

    def save(self, path: str | Path) -> None:
        """For `trace:FILE`: an npz of `experts` [tokens, L, K]. Raises ConfigError."""
        try:
            with Path(path).open("wb") as file:
                np.savez_compressed(file, experts=np.concatenate(self._kept or [np.zeros((0, 0, 0), np.int16)]))
        except OSError as error:
            raise ConfigError(
                f"the routing cannot be written to {path}: {error.strerror}; name another file"
            ) from error


def _read_trace(path: str, layers: int, experts: int, k: int) -> Int[np.ndarray, "tokens L K"]:
    try:
        with np.load(path, allow_pickle=False) as told:
            trace = told["experts"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"trace:{path} cannot be read: {error}; record one with --record-routing") from error
    if trace.ndim != 3 or not trace.size or not np.issubdtype(trace.dtype, np.integer):
        raise ConfigError(f"trace:{path} has routed no token: it holds {trace.dtype}{list(trace.shape)}")
    if trace.shape[2] != k or trace.shape[1] > layers or trace.min() < 0 or trace.max() >= experts:
        raise ConfigError(
            f"trace:{path} is of {trace.shape[1]} layers, {trace.shape[2]} experts a token and experts up to "
            f"{trace.max()}; the model has {layers}, {k} and {experts} experts"
        )
    # A layer of further prediction has no record of its own.
    return np.pad(trace, ((0, 0), (0, layers - trace.shape[1]), (0, 0)), mode="edge")
