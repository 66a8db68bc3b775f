"""Why a request is refused, across the link: an exception of the engine's process is one of the same kind here."""

from jaxmoe.errors import (
    ConfigError,
    DuplicateRequestError,
    InvalidRequestError,
    JaxmoeError,
    QueueFullError,
    UnavailableError,
)
from jaxmoe.serving.link import Rejection, RejectionKind


class EngineFailedError(Exception):
    """The engine failed while it worked on a request."""


# The first that fits; any other JaxmoeError is of the last kind.
_KINDS: tuple[tuple[type[JaxmoeError], RejectionKind], ...] = (
    (DuplicateRequestError, "duplicate"),
    (QueueFullError, "queue_full"),
    (ConfigError, "precondition"),
    (JaxmoeError, "unavailable"),
)


def rejection(error: JaxmoeError) -> Rejection:
    if isinstance(error, InvalidRequestError):
        return Rejection("invalid", str(error), error.field)
    return Rejection(next(kind for raised, kind in _KINDS if isinstance(error, raised)), str(error))


def exception(told: Rejection) -> Exception:
    match told.kind:
        case "invalid":
            return InvalidRequestError(told.message, told.field)
        case "precondition":
            return ConfigError(told.message)
        case "duplicate":
            return DuplicateRequestError(told.message)
        case "queue_full":
            return QueueFullError(told.message)
        case "unavailable":
            return UnavailableError(told.message)
    return EngineFailedError(told.message)
