"""What accelerators can do, as their vendors state it.

Sources, by the figure:

* NVIDIA: data sheets of A100 80 GB SXM, H100 SXM, H200 SXM, HGX B200 and GB200 NVL72. FLOP/s are dense, half of what
  is printed "with sparsity"; 32 bits are TF32, which XLA multiplies float32 in. NVLink is stated for both directions
  together and halved here. Memory is what the driver reports of it. Beyond an NVLink domain one ConnectX-7 a GPU
  (400 Gb/s; A100: ConnectX-6, 200 Gb/s), as in DGX systems.
* AMD: data sheet of the Instinct MI300X; 7 links of 64 GB/s each way to the 7 other GPUs of a node.
* TPUs: the tables of cloud.google.com/tpu/docs ("v5e", "v5p", "v6e", "tpu7x", "v4"); the bandwidth between chips is
  stated for both directions together, and is here that of one link one way: 1,200 GB/s of v5p are 6 links of 100 GB/s
  out. float32 is multiplied as bfloat16 there. JAX sees a chip of 7x as two devices, each of one half of it.
* Latencies are no vendor's: what small collectives take in practice, in orders of magnitude.
"""

import dataclasses
import math
from collections.abc import Mapping

from jaxmoe.errors import ConfigError
from jaxmoe.moe.strategy import LINKS, Link
from jaxmoe.sharding.mesh import AXES, MeshSpec

GB, TB, TERA, GIB = 1e9, 1e12, 1e12, 2**30
GPU, TPU = LINKS["gpu"].latency, LINKS["tpu"].latency


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX counts them.

    memory: bytes. usable: the share of it that weights, KV pages and temporaries can have.
    bandwidth: bytes/s of that memory. flops: a second, dense, by bytes of a number.
    domain: how many devices the fast network joins. inner: that network, out of one device; of a torus, one link of it.
    torus: its dimensions; 0 where a switch joins all of a domain. outer: the network between domains, per device.
    """

    name: str
    platform: str
    memory: float
    bandwidth: float
    flops: Mapping[int, float]
    domain: int
    inner: Link
    outer: Link
    torus: int = 0
    usable: float = 0.92

    def describe(self, itemsize: int) -> str:
        """One line: what it has, and how it is joined to others."""
        inner = f"{self.torus}D torus of {self.inner.bandwidth / GB:,.0f} GB/s a link" if self.torus else (
            f"{self.inner.bandwidth / GB:,.0f} GB/s"
        )  # fmt: skip
        return (
            f"{self.memory / GIB:.1f} GiB at {self.bandwidth / TB:.2f} TB/s, "
            f"{self.flops[itemsize] / TERA:,.0f} TFLOP/s, {inner} between {self.domain:,}, "
            f"{self.outer.bandwidth / GB:,.1f} GB/s beyond"
        )

    def seconds(self, kind: str, sent: float, axes: tuple[str, ...], spec: MeshSpec) -> float:
        """What a collective along these axes of the mesh takes, with nothing else on the network.

        kind: HLO's name. sent: bytes that leave each device.
        """
        members, together = _group(axes, spec, self.domain)
        if members == 1:
            return 0.0
        everyone = kind.endswith("all-to-all")
        near = sent * (together - 1) / (members - 1)
        far = sent - near
        if not everyone:
            # What the others of a domain must have too goes in once, each bringing a part, and is shared inside.
            near, far = sent, far / together
        latency = (self.inner if far == 0 else self.outer).latency
        return latency + max(near / self._bandwidth(together, everyone), far / self.outer.bandwidth)

    def _bandwidth(self, members: int, everyone: bool) -> float:
        """Out of a device into the fast network, when as many exchange; everyone: with every other, not neighbours."""
        if not self.torus or members == 1:
            return self.inner.bandwidth
        # Rings of 4 along as many dimensions as there are devices for: 2 devices have one link, 4 two, 16 four.
        dimensions = min(self.torus, max(0.5, math.log2(members) / 2))
        out = 2 * dimensions * self.inner.bandwidth
        if not everyone or dimensions < 1:
            return out
        # A row travels a quarter of a ring's length along each dimension, on links that others' rows share.
        return min(out, 8 * self.inner.bandwidth / members ** (1 / dimensions))


def _group(axes: tuple[str, ...], spec: MeshSpec, domain: int) -> tuple[int, int]:
    """How many devices exchange along these axes, and how many of them share a domain with any one of them.

    Devices are numbered with `tp` fastest and `dp` slowest, and a domain is a run of numbers.
    """
    members = together = stride = 1
    for axis in reversed(AXES):
        size = getattr(spec, axis)
        if axis in axes:
            members *= size
            together *= max(1, min(size, domain // stride))
        stride *= size
    return members, together


def _gpu(
    name: str, gib: float, tb: float, tera: float, tera32: float, gb: float, outer: float, domain: int = 8
) -> Device:
    links = Link(GPU, gb * GB), Link(2 * GPU, outer * GB)
    return Device(name, "gpu", gib * GIB, tb * TB, {2: tera * TERA, 4: tera32 * TERA}, domain, *links)


def _tpu(name: str, gib: float, gb: float, tera: float, link: float, outer: float, torus: int, domain: int) -> Device:
    links = Link(TPU, link * GB), Link(20 * TPU, outer * GB)
    return Device(name, "tpu", gib * GIB, gb * GB, {2: tera * TERA, 4: tera * TERA}, domain, *links, torus)


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _gpu("a100", 80.0, 2.039, 312, 156, 300, 25),
        _gpu("h100", 79.6, 3.35, 989, 494, 450, 50),
        _gpu("h200", 140.4, 4.8, 989, 494, 450, 50),
        _gpu("b200", 179.1, 8.0, 2250, 1125, 900, 50),
        _gpu("gb200", 185.0, 8.0, 2500, 1250, 900, 50, domain=72),
        _gpu("mi300x", 192.0, 5.3, 1307, 653, 448, 50),
        _tpu("v4", 32, 1228, 275, 50, 3.1, 3, 4096),
        _tpu("v5e", 16, 819, 197, 50, 3.1, 2, 256),
        _tpu("v5p", 95, 2765, 459, 100, 6.2, 3, 8960),
        _tpu("v6e", 32, 1638, 918, 100, 12.5, 2, 256),
        _tpu("v7x", 96, 3690, 1153.5, 50, 6.2, 3, 18432),
        # One of eight virtual devices of two cores, roughly as measured; they share everything.
        Device(
            "cpu", "cpu", 2 * GIB, 2.5 * GB, {2: 2e9, 4: 8e9}, 4096, LINKS["cpu"], LINKS["cpu"], usable=0.9
        ),
    )
}  # fmt: skip


def device_named(name: str) -> Device:
    """Raises ConfigError naming those that are known."""
    if name not in DEVICES:
        raise ConfigError(f"device {name!r} is not known; use one of {', '.join(DEVICES)}")
    return DEVICES[name]
