import pytest

from jaxmoe.errors import ConfigError
from jaxmoe.measuring.phases import Driver, Phase

WRONG = ["prefill", "decode:", "decode:0", "decode:-1", "encode:8", "prefill:1.5"]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_phase_is_told(text):
    with pytest.raises(ConfigError, match="not of the form prefill:TOKENS or decode:BATCH"):
        Phase.parse(text)


def test_a_prefill_is_timed_over_all_its_steps(engine):
    inside = []

    class Step:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            inside.append(self.number)

        def __exit__(self, *_):
            pass

    timed = Driver(engine).run(Phase.parse("prefill:40"), 64, 2, Step)
    assert len(timed.seconds) == 2
    assert timed.tokens == timed.context == 40
    assert inside == list(range(2 * 3)), "40 tokens are three steps of at most 16"
    assert not engine.has_work


def test_decoding_stays_within_the_context_and_leaves_the_engine_idle(engine):
    timed = Driver(engine).run(Phase.parse("decode:2"), 64, 5)
    assert len(timed.seconds) == 5
    assert timed.tokens == 2
    assert 16 < timed.context < 64
    assert not engine.has_work
    engine.check_integrity()


def test_a_context_too_short_for_the_steps_is_told(engine):
    with pytest.raises(ConfigError, match="context=8 is too short for 5 steps of decode at batch 2"):
        Driver(engine).run(Phase.parse("decode:2"), 8, 5)


def test_phases_beyond_the_limits_are_refused_with_the_limit(engine):
    driver = Driver(engine)
    assert driver.refusal(Phase("prefill", 63), 64) == ""
    assert driver.refusal(Phase("prefill", 64), 64) == "the context limit is 64 tokens"
    assert driver.refusal(Phase("decode", 3), 64) == "--max-batch is 2"
    assert driver.refusal(Phase("decode", 2), 65) == "the context limit is 64 tokens"
