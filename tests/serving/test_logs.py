import json
import logging

import pytest
from fake_engine import model_info
from harness import serving

from jaxmoe.serving.logs import _Json, _Text, fields

SECRET = "one two three"
FORGED = "id\n2026-01-01 INFO jaxmoe: forged \x1b[31m\u2028"


def record(message="hello", exc_info=None, **told):
    made = logging.LogRecord("jaxmoe.x", logging.INFO, "file", 1, message, None, exc_info)
    made.__dict__.update(fields(**told))
    return made


def test_a_text_line_is_one_line_whatever_it_tells():
    line = _Text().format(record(f"about {FORGED}", request_id=FORGED, tokens=3, trace_id=None))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert line.endswith(r'request_id="id\n2026-01-01 INFO jaxmoe: forged \u001b[31m\u2028" tokens=3')


def test_a_json_line_is_one_object():
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        line = _Json().format(record(request_id=FORGED, exc_info=(ValueError, error, error.__traceback__)))
    assert len(line.splitlines()) == 1
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"], told["request_id"]) == ("info", "jaxmoe.x", "hello", FORGED)
    assert "ValueError" in told["exception"]


@pytest.mark.parametrize(
    ("level", "form"), [(logging.INFO, "json"), (logging.DEBUG, "text"), (logging.WARNING, "text")]
)
def test_requests_are_logged_by_id_and_never_with_their_prompt(checkpoint, capfd, level, form):
    with serving(model_info(checkpoint), log_level=level, log_format=form) as server:
        list(server.generate(SECRET, request_id=FORGED, max_tokens=2))
        server.refusal(SECRET, request_id="refused", top_p=2.0)
    log = capfd.readouterr().err
    assert SECRET not in log
    assert "\x1b" not in log
    if level == logging.WARNING:
        assert log == ""
    elif form == "json":
        told = {line["message"]: line for line in map(json.loads, log.splitlines())}
        assert told["request ended"]["request_id"] == FORGED
        assert told["request ended"]["completion_tokens"] == 2
        assert told["request refused"]["code"] == "INVALID_ARGUMENT"
