import pytest

from jaxmoe import bench
from jaxmoe.measuring import machine
from jaxmoe.measuring.machine import Machine

SMALL = ("--max-batch", "2", "--max-context", "64", "--max-prefill-tokens", "16", "--context", "64")
QUICK = ("--prefills", "2", "--decodes", "3", "--profile-steps", "3", "--compile-cache", "")


def command(capsys, *arguments):
    code = bench.main([*SMALL, *QUICK, *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_phases_are_timed_and_those_beyond_the_limits_named(capsys):
    code, out, err = command(capsys, "--phases", "prefill:32,prefill:512,decode:2")
    assert code == 0
    assert "prefill of 32 tokens" in out
    assert "decode at batch 2" in out
    assert "left out: prefill of 512 tokens; the context limit is 64 tokens" in err


def test_steps_that_draft_and_experts_in_8_bits_are_timed(capsys, monkeypatch):
    fake = Machine("cpu", "cpu", 10e9, {4: 100e9, 2: 50e9}, 0, 2**30)
    monkeypatch.setattr(machine, "measure_machine", lambda: fake)
    flags = ("--model", "demo:deepseek-v3", "--speculate", "mtp", "--expert-weights", "int8")
    code, out, _ = command(capsys, *flags, "--phases", "decode:2", "--floor")
    assert code == 0
    assert "bound by" in out


def test_floors_and_a_profile_come_from_the_same_run(capsys, monkeypatch, tmp_path):
    fake = Machine("cpu", "cpu", 10e9, {4: 100e9, 2: 50e9}, 0, 2**30)
    monkeypatch.setattr(machine, "measure_machine", lambda: fake)
    code, out, _ = command(capsys, "--phases", "decode:2", "--floor", "--profile", str(tmp_path))
    assert code == 0
    assert all(word in out for word in ("bound by memory", "floor, ms", "between operations", "host", "10.0 GB/s"))
    assert list(tmp_path.glob("decode-2/plugins/profile/*/*.xplane.pb"))


def test_what_was_compiled_is_listed_with_its_cost(capsys):
    code, out, _ = command(capsys, "--compiled", "--max-batch", "1", "--max-prefill-tokens", "8")
    assert code == 0
    assert "step tokens=1 batch=1 pages=4" in out
    assert "sampling batch=1" in out
    assert "programs ready in" in out


WRONG = {
    ("--phases", "decode"): "phase 'decode' is not of the form",
    ("--profile", "/dev/null/x"): "--profile /dev/null/x: Not a directory",
    ("--profile-steps", "0", "--profile", "x"): "--profile-steps 0 must be at least 1",
    ("--max-batch", "0"): "max_batch=0 must be a whole number of at least 1",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_what_cannot_be_measured_is_told_and_exits_with_2(capsys, arguments):
    code, out, err = command(capsys, *arguments)
    assert (code, out) == (2, "")
    assert WRONG[arguments] in err
