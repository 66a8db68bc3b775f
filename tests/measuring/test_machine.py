from jaxmoe.measuring import machine
from jaxmoe.measuring.machine import Machine, largest_cache, measure_machine

CPU = Machine("cpu", "cpu", 10e9, {4: 100e9, 2: 50e9}, cache=2**25, streamed=2**30)


def test_a_machine_is_measured_through_jax(monkeypatch):
    monkeypatch.setattr(machine, "STREAMED", 2**20)
    monkeypatch.setattr(machine, "SIDE", 64)
    monkeypatch.setattr(machine, "CACHES", machine.CACHES / "none")
    measured = measure_machine()
    assert measured.platform == "cpu"
    assert measured.bandwidth > 0
    assert set(measured.flops) == {2, 4}
    assert "GB/s" in measured.describe()


def test_virtual_devices_share_the_machine():
    one, eighth = CPU.device(1), CPU.device(8)
    assert one.bandwidth == 8 * eighth.bandwidth == CPU.bandwidth
    assert one.flops[4] == 8 * eighth.flops[4] == CPU.flops[4]


def test_the_largest_cache_is_what_linux_says(tmp_path):
    for index, size in enumerate(("48K", "2048K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert largest_cache(tmp_path) == 32 * 2**20
    assert largest_cache(tmp_path / "none") == 0
