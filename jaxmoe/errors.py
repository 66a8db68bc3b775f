"""One exception per situation that a user can mend. The text says what was wrong, with the value, and what to do."""


class JaxmoeError(Exception):
    """Base of every error whose cure lies with the user; front doors print its text without a traceback."""


class CheckpointError(JaxmoeError):
    """A checkpoint is missing, truncated, of an unknown architecture, or does not hold what its config promises."""


class ConfigError(JaxmoeError):
    """A setting has a value that cannot work."""


class MeshError(JaxmoeError):
    """A mesh does not parse, or does not fit the devices or the model."""


class MoveError(JaxmoeError):
    """Experts could not be moved; they are where they were."""


class InvalidRequestError(JaxmoeError):
    """A request cannot be served as asked; `field` names the offending parameter."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class QueueFullError(JaxmoeError):
    """The engine's queue is at its limit; the same request may pass later."""


class DuplicateRequestError(JaxmoeError):
    """A live request already has this id."""


class UnavailableError(JaxmoeError):
    """The engine is starting, draining or gone."""
