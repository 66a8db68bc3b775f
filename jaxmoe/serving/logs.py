"""Log lines of the server: text or JSON, on stderr. What comes from outside is escaped, so that it makes no lines."""

import json
import logging
import re
import time
from typing import Any, Literal

FORMATS = ("text", "json")
LogFormat = Literal["text", "json"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_CONTROL_BUT_LINES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def configure(level: int | str, form: LogFormat) -> None:
    """Sends all log records to stderr in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if form == "json" else _Text())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """What a record says beside its message: `logger.info("ended", extra=fields(request_id="a"))`. None is left out."""
    return {"fields": {name: value for name, value in values.items() if value is not None}}


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.created))},{int(record.msecs):03d}"
        line = f"{moment} {record.levelname} {record.name}: {_escape(record.getMessage())}"
        for name, value in getattr(record, "fields", {}).items():
            line += f" {name}={json.dumps(value) if isinstance(value, str) else value}"
        if record.exc_info:
            line += "\n" + _escape(self.formatException(record.exc_info), _CONTROL_BUT_LINES)
        return line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _escape(text: str, control: re.Pattern[str] = _CONTROL) -> str:
    return control.sub(lambda match: repr(match[0])[1:-1], text)
