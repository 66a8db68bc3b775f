"""How evenly tokens fall on experts and devices: counted by every step on its devices, summed up here on the host.

A *call* is one run of a compiled program; a *copy* is the devices that share one copy of the experts. Balancedness of a
copy's devices is their mean load over that of the fullest; of a model, the mean of that over mixture layers (and
copies). It has a ceiling below 1 that no placement passes, since a finite batch never falls evenly: `noise_ceiling`.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmoe.moe.strategy import Mixture, Strategy, sent_bytes
from jaxmoe.sharding.mesh import RANKS

WINDOW, HALF_LIFE = 1024, 256
BLOCK = 32  # calls that are read and summed at once: on the host one call alone costs nearly as much as many
DRAWS, LARGEST_BATCH = 2000, 1 << 20


class Exchange(NamedTuple):
    """How the mixtures of a call dispatched, and what shape they had."""

    strategy: Strategy
    shape: Mixture


def count_loads(slots: Int[Array, "L R N K"], num_slots: int, devices: int) -> Int[Array, "R L counts"]:
    """What each rank sends where, in each mixture layer: tokens to each slot, then rows to each device. No collectives.

    A token with several experts on one device is one row. Slot -1, of padding, counts nowhere.
    """

    def local(slots: Array) -> Array:
        of_rank = slots[:, 0]
        device = jnp.where(of_rank < 0, -1, of_rank // (num_slots // devices))
        to_slots = jnp.sum(of_rank[..., None] == jnp.arange(num_slots), axis=(1, 2), dtype=jnp.int32)
        goes = jnp.any(device[..., None] == jnp.arange(devices), axis=2)
        rows = jnp.sum(goes, axis=1, dtype=jnp.int32)
        return jnp.concatenate([to_slots, rows], axis=1)[None]

    with jax.named_scope("statistics"):
        by_rank = P(None, RANKS, None, None)
        return jax.shard_map(local, in_specs=by_rank, out_specs=P(RANKS, None, None), check_vma=False)(slots)


def balancedness(loads: Float[np.ndarray, "*rows D"] | Int[np.ndarray, "*rows D"]) -> float:
    """Mean over rows of their mean over their maximum; rows without load are left out; 1 if all are.

    >>> balancedness(np.array([[100, 0, 0, 0], [100, 0, 0, 0]]))
    0.25
    """
    of_rows = _of_rows(np.asarray(loads, np.float64))
    return 1.0 if np.isnan(of_rows).all() else float(np.nanmean(of_rows))


def _of_rows(loads: Float[np.ndarray, "*rows D"]) -> Float[np.ndarray, "*rows"]:
    """Balancedness of each row; nan without load."""
    most = loads.max(axis=-1)
    return np.divide(loads.mean(axis=-1), most, out=np.full(most.shape, np.nan), where=most > 0)


def noise_ceiling(
    assignments: Float[np.ndarray, "rows"] | Int[np.ndarray, "rows"], devices: int
) -> Float[np.ndarray, "rows"]:
    """The balancedness to expect of so many assignments (tokens x K) that fall on devices independently and evenly.

    By simulation, between powers of two by interpolation. Real choices are distinct within a token and alike within a
    text, so that a measured balancedness may lie a little to either side.
    """
    sizes, means = _ceilings(devices)
    return np.interp(np.log2(np.clip(assignments, 1, LARGEST_BATCH)), sizes, means)


@functools.lru_cache(maxsize=8)
def _ceilings(devices: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = np.arange(LARGEST_BATCH.bit_length())
    draws = max(100, min(DRAWS, DRAWS * 64 // devices))
    even = np.full(devices, 1 / devices)
    return sizes, np.array([_of_rows(rng.multinomial(1 << int(size), even, draws) * 1.0).mean() for size in sizes])


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What an operator looks at first. Of the window's calls, on average, unless said otherwise.

    assignments: tokens x K of all mixture layers together, of all calls.
    balancedness: of single calls; what a step's time follows.
    ceiling: what a perfect placement could expect at these batch sizes. of_ceiling: the one over the other; 1: moving
        experts cannot help any more.
    long_run: balancedness of the loads of all calls together; what a placement can cure.
    worst_layer, worst_balancedness: the mixture layer, counted among mixture layers, with the least of single calls.
    rounds, most_rounds: of exchanges a layer, on average and at most; 1 with a strategy that has no queues.
    exchanged_bytes: that left devices, in all, with what buffers carry beside rows.
    """

    calls: int
    assignments: int
    balancedness: float
    ceiling: float
    of_ceiling: float
    long_run: float
    worst_layer: int
    worst_balancedness: float
    rounds: float
    most_rounds: int
    exchanged_bytes: int


class CallLoads(NamedTuple):
    """Of single calls, the oldest first, in tokens x K: what the step times of a benchmark are compared with.

    fullest: on the fullest device of any copy of the experts. even: on each device, if all had as much.
    """

    fullest: Int[np.ndarray, "calls L"]
    even: Float[np.ndarray, "calls"]


class _Call(NamedTuple):
    counts: Array | np.ndarray  # [R, L, slots + devices]
    slot_expert: Int[np.ndarray, "layers S"]
    tokens: int  # of a rank


class _Block(NamedTuple):
    """Some calls, summed up. Balance of a call and layer is nan where nothing was routed."""

    calls: int
    experts: Int[np.ndarray, "L E"]
    devices: Int[np.ndarray, "copies L D"]
    fullest: Int[np.ndarray, "calls L"]
    balance: Float[np.ndarray, "calls L"]
    sizes: Int[np.ndarray, "calls copies"]
    rounds: Int[np.ndarray, "calls L"]
    sent: int


class LoadStatistics:
    """A sliding window and an exponential moving average over the counts of calls.

    copies, devices: of the experts, and devices of each. exchange: how calls of so many tokens a rank dispatch.
    window, half_life: calls. The window moves on by up to BLOCK calls at a time.
    """

    def __init__(
        self,
        experts: int,
        copies: int,
        devices: int,
        exchange: Callable[[int], Exchange],
        window: int = WINDOW,
        half_life: int = HALF_LIFE,
    ) -> None:
        self._experts, self._copies, self._num_devices = experts, copies, devices
        self._exchange = functools.cache(exchange)
        self._window, self._decay = window, 0.5 ** (1 / half_life)
        self._pending: list[_Call] = []
        self._blocks: deque[_Block] = deque()
        self._average: np.ndarray | None = None
        self._weight = 0.0
        self.num_calls = 0
        _ceilings(devices)

    def record(
        self, counts: Int[Array | np.ndarray, "R L counts"], slot_expert: Int[np.ndarray, "layers S"], tokens: int
    ) -> None:
        """Takes what `count_loads` gives in a call of so many tokens a rank; it is not read yet.

        slot_expert: of the call's placement; layers beyond those that were counted are ignored.
        """
        self._pending.append(_Call(counts, slot_expert, tokens))
        self.num_calls += 1

    def settle(self, least: int = BLOCK) -> None:
        """Reads what was recorded, if that is at least so many calls."""
        if len(self._pending) < max(1, least):
            return
        pending, self._pending = self._pending, []
        start = 0
        for end in range(1, len(pending) + 1):
            if end == len(pending) or pending[end].slot_expert is not pending[start].slot_expert:
                self._add(pending[start:end])
                start = end
        while self._blocks and sum(block.calls for block in self._blocks) - self._blocks[0].calls >= self._window:
            self._blocks.popleft()

    def restart(self) -> None:
        """Begins a new window, as after experts moved; the average, which does not depend on that, stays."""
        self.settle(1)
        self._blocks.clear()

    def report(self) -> LoadReport | None:
        """None before the first call that routed anything."""
        self.settle(1)
        blocks = self._blocks
        sizes = np.concatenate([block.sizes for block in blocks]) if blocks else np.zeros((0, 1))
        if not sizes.any():
            return None
        balance = np.concatenate([block.balance for block in blocks])
        rounds = np.concatenate([block.rounds for block in blocks])
        routed = ~np.isnan(balance)
        of_layers = np.where(routed, balance, 0).sum(axis=0) / np.maximum(1, routed.sum(axis=0))
        busy = sizes[sizes > 0]
        measured, ceiling = float(balance[routed].mean()), float(noise_ceiling(busy, self._num_devices).mean())
        worst = int(of_layers.argmin())
        return LoadReport(
            calls=len(sizes),
            assignments=int(sum(block.experts.sum() for block in blocks)),
            balancedness=measured,
            ceiling=ceiling,
            of_ceiling=measured / ceiling,
            long_run=balancedness(self.devices().astype(np.float64)),
            worst_layer=worst,
            worst_balancedness=float(of_layers[worst]),
            rounds=float(rounds.mean()),
            most_rounds=int(rounds.max()),
            exchanged_bytes=sum(block.sent for block in blocks),
        )

    def experts(self) -> Int[np.ndarray, "L E"]:
        """Tokens to each logical expert of each mixture layer within the window; [0, E] before the first call."""
        self.settle(1)
        return sum((block.experts for block in self._blocks), np.zeros((), np.int64)) + self._none()

    def devices(self) -> Int[np.ndarray, "copies L D"]:
        """Tokens to each device of each copy of the experts, by mixture layer, within the window."""
        self.settle(1)
        none = np.zeros((self._copies, len(self._none()), self._num_devices), np.int64)
        return sum((block.devices for block in self._blocks), none)

    def calls(self) -> CallLoads:
        """Of every call within the window; there are none before the first."""
        self.settle(1)
        none = CallLoads(np.zeros((0, len(self._none())), np.int64), np.zeros(0))
        of_blocks = (
            CallLoads(block.fullest, block.sizes.sum(axis=1) / (self._copies * self._num_devices))
            for block in self._blocks
        )
        return CallLoads(*(np.concatenate(arrays) for arrays in zip(none, *of_blocks, strict=True)))

    def average(self) -> Float[np.ndarray, "L E"]:
        """The exponential moving average of `experts`, of one call."""
        self.settle(1)
        return self._none() * 1.0 if self._average is None else self._average / self._weight

    def _none(self) -> Int[np.ndarray, "L E"]:
        layers = len(self._blocks[0].experts) if self._blocks else 0
        return np.zeros((layers, self._experts), np.int64)

    def _add(self, calls: list[_Call]) -> None:
        """Calls of one placement."""
        counts = np.stack([np.asarray(call.counts) for call in calls])
        number, ranks, layers, width = counts.shape
        slots, devices, copies = width - self._num_devices, self._num_devices, self._copies
        to_slots, rows = counts[..., :slots], counts[..., slots:]

        # In 32 bits, which no block of calls fills: numpy's default of 64 takes three times as long.
        def sum_of(array: np.ndarray, axis: int) -> np.ndarray:
            return np.asarray(array.sum(axis=axis, dtype=np.int32))

        of_copies = sum_of(to_slots.reshape(number, copies, ranks // copies, layers, slots), axis=2)
        loads = sum_of(of_copies.reshape(number, copies, layers, devices, -1), axis=-1)
        balance = _of_rows(loads * 1.0)
        routed = ~np.isnan(balance)
        seen = routed.sum(axis=1)
        of_calls = np.where(routed, balance, 0).sum(axis=1) / np.maximum(1, seen)
        exchanges = [self._exchange(call.tokens) for call in calls]
        rounds = self._rounds(rows.max(axis=(1, 3), initial=0), exchanges)
        slot_expert = calls[0].slot_expert[:layers]
        total = sum_of(of_copies, axis=1)
        faded = (self._decay ** np.arange(number - 1, -1, -1)).astype(np.float32)
        self._blocks.append(
            _Block(
                number,
                self._by_expert(total.sum(axis=0), slot_expert).astype(np.int64),
                loads.sum(axis=0),
                loads.max(axis=(1, 3), initial=0),
                np.where(seen > 0, of_calls, np.nan),
                loads[:, :, :1].sum(axis=(2, 3)),
                rounds,
                sum(map(_bytes_sent, exchanges, rounds, rows)),
            )
        )
        latest = self._by_expert(np.einsum("n,nls->ls", faded, total), slot_expert)
        old = 0.0 if self._average is None else self._average * self._decay**number
        self._average = old + latest
        self._weight = self._weight * self._decay**number + float(faded.sum())

    def _by_expert(self, of_slots: np.ndarray, slot_expert: Int[np.ndarray, "L S"]) -> np.ndarray:
        """[L, S] to [L, E]."""
        layers = len(slot_expert)
        index = np.arange(layers)[:, None] * self._experts + slot_expert
        summed = np.bincount(index.ravel(), of_slots.ravel(), layers * self._experts)
        return summed.reshape(layers, self._experts)

    @staticmethod
    def _rounds(longest: Int[np.ndarray, "calls L"], exchanges: list[Exchange]) -> Int[np.ndarray, "calls L"]:
        """Of exchanges, whose longest queues these are; 1 where there are no queues."""
        queued = [each.strategy in ("all_to_all", "ragged_all_to_all") for each in exchanges]
        capacity = [each.shape.capacity if has else 0 for each, has in zip(exchanges, queued, strict=True)]
        return np.maximum(1, -(-longest // np.maximum(1, capacity)[:, None]) * np.array(queued)[:, None])


def _bytes_sent(exchange: Exchange, rounds: Int[np.ndarray, "L"], rows: Int[np.ndarray, "R L D"]) -> int:
    """That left all devices in one call; dense computation gathers weights instead."""
    strategy, shape = exchange
    if strategy == "dense" or shape.devices == 1:
        return 0
    if strategy == "ragged_all_to_all":
        ranks = np.arange(len(rows))
        stay = rows[ranks, :, ranks % shape.devices].sum()
        return int(rows.sum() - stay) * sum(shape.row_bytes)
    if strategy == "replicate":
        return len(rows) * len(rounds) * sum(sent_bytes(strategy, shape))
    return len(rows) * sum(sent_bytes(strategy, shape, int(rounds.sum())))
