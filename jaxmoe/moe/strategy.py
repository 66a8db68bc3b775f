"""Which way of dispatch is the cheapest: an explicit rule over the shapes of a program and the links of a device."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast, get_args

from jaxmoe.errors import ConfigError

Strategy = Literal["auto", "dense", "replicate", "all_to_all", "ragged_all_to_all"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
SMALLEST_CAPACITY = 4
NUMBER_BYTES = 4  # of a slot or a weight on its way, whatever the rows are in


class Mixture(NamedTuple):
    """The shape of one mixture layer in a program.

    tokens: of a rank. width: of the model. choices: experts a token. devices: that share one copy of the experts.
    itemsize: bytes of a number in a row. capacity_factor: room in an exchange's buffers, in multiples of what balanced
    routing would send.
    """

    tokens: int
    width: int
    choices: int
    devices: int
    itemsize: int
    capacity_factor: float = 2.0

    @property
    def lanes(self) -> int:
        """The most devices that one token goes to."""
        return min(self.choices, self.devices)

    @property
    def mean_queue(self) -> float:
        """Rows that a rank sends to each device if experts are chosen independently and evenly."""
        return self.tokens * (1 - (1 - 1 / self.devices) ** self.choices)

    @property
    def capacity(self) -> int:
        """Rows that one round carries from a rank to each device; never more than there can be."""
        wanted = max(SMALLEST_CAPACITY, math.ceil(self.mean_queue * self.capacity_factor))
        return min(self.tokens, wanted)

    @property
    def most_rounds(self) -> int:
        """Of an exchange at the worst skew there is: all tokens of a rank to one device."""
        return -(-self.tokens // self.capacity)

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Of a token on its way to experts, with its slots and weights, and back."""
        back = self.width * self.itemsize
        return back + 2 * self.choices * NUMBER_BYTES, back


class Link(NamedTuple):
    """latency: seconds that a collective takes before the first byte. bandwidth: bytes a second out of a device."""

    latency: float
    bandwidth: float


# Of one node or slice; what a vendor states, less a customary 20% (docs/performance.md has the sources). Of virtual
# devices: measured on two cores, which all devices share.
LINKS: Mapping[str, Link] = {
    "cpu": Link(150e-6, 1e9),
    "gpu": Link(15e-6, 360e9),
    "tpu": Link(5e-6, 150e9),
}
HAS_RAGGED = frozenset({"gpu", "tpu"})


def check_strategy(strategy: str, platform: str) -> None:
    """Raises ConfigError if there is no such strategy, or not on this platform."""
    if strategy not in STRATEGIES:
        raise ConfigError(f"dispatch={strategy!r} is not one of {', '.join(STRATEGIES)}")
    if strategy == "ragged_all_to_all" and platform not in HAS_RAGGED:
        raise ConfigError(
            f"dispatch={strategy!r} is not implemented on {platform}; use all_to_all, which sends the same"
        )


def sent_bytes(strategy: Strategy, shape: Mixture, rounds: int = 1) -> tuple[int, int]:
    """Bytes that leave a device in one mixture layer, to the experts and back, when the exchange takes `rounds`."""
    to, back = shape.row_bytes
    others = shape.devices - 1
    if strategy == "replicate":
        rows = shape.tokens
    elif strategy == "all_to_all":
        rows = shape.capacity * rounds
    elif strategy == "ragged_all_to_all":
        rows = math.ceil(shape.mean_queue)
    else:
        raise ValueError(f"strategy={strategy!r} sends no rows")
    return others * rows * to, others * rows * back


def num_collectives(strategy: Strategy, shape: Mixture, rounds: int = 1) -> int:
    """Collectives of one mixture layer, small ones included."""
    if shape.devices == 1:
        return 0
    if strategy == "replicate":
        return 2
    agreed = shape.most_rounds > 1
    return 2 * rounds + agreed + (strategy == "ragged_all_to_all")


def seconds(strategy: Strategy, shape: Mixture, link: Link) -> float:
    """What one mixture layer's exchange takes, everything else apart, at balanced routing."""
    return num_collectives(strategy, shape) * link.latency + sum(sent_bytes(strategy, shape)) / link.bandwidth


def choose(strategy: str, shape: Mixture, platform: str) -> Strategy:
    """The strategy of that name, or what "auto" comes to on this platform (JAX's name: "cpu", "gpu", "tpu").

    That is the cheapest; of equals the first of replicate, all_to_all and ragged_all_to_all. Raises ConfigError.
    """
    check_strategy(strategy, platform)
    if strategy != "auto":
        return cast(Strategy, strategy)
    if shape.devices == 1:
        return "replicate"
    choices: list[Strategy] = ["replicate", "all_to_all"]
    if platform in HAS_RAGGED:
        choices.append("ragged_all_to_all")
    return min(choices, key=lambda each: seconds(each, shape, LINKS[platform]))
