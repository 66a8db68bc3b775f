"""What the engine's process and the front end's say to each other, over one unix socket pair.

A frame on the wire is its length in four bytes, then a msgpack array that begins with the frame's name. The engine
sends one `Outputs` per step, whatever the number of requests. Imports neither jax nor grpc.
"""

import asyncio
import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import msgspec

from jaxmoe.engine.kv_events import KvEventBatch
from jaxmoe.engine.request import Output, Request

logger = logging.getLogger(__name__)


class LinkClosed(Exception):
    """The process at the other end is gone, or has stopped reading."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the front end knows of the model and tells clients.

    model_path: the directory of the checkpoint; its tokenizer files are read from there.
    max_context: tokens of prompt and generation together.
    max_queue: requests that may wait for a place, over all ranks.
    max_running: requests that may run at once, over all ranks; 0 if not known.
    page_size: tokens per KV page.
    prefix_cache: what enters and leaves it can be told.
    default_sampling_params: what the checkpoint recommends; told to gateways, which merge it into their requests.
    invalid: why answers are no model's, which every response then says; "" if they are.
    routed_experts: can be asked for.
    mixture_layers: the decoder layers that are mixtures.
    """

    model_path: str
    served_model_name: str
    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    max_queue: int
    max_running: int = 0
    num_ranks: int
    page_size: int
    prefix_cache: bool = False
    mesh: str = ""
    dtype: str = ""
    default_sampling_params: dict[str, float] = {}
    invalid: str = ""
    routed_experts: bool = False
    mixture_layers: tuple[int, ...] = ()


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the front end serves; see `server.run`."""

    host: str
    port: int
    reflection: bool
    drain_timeout: float
    step_timeout: float
    max_backlog: int
    log_level: int
    log_format: Literal["text", "json"] = "text"
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    otlp_endpoint: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    auth_token_file: str | None = None
    max_client_requests: int = 0
    read_timeout: float = 60.0


class RankLoad(msgspec.Struct, frozen=True, array_like=True):
    """What one attention rank carries.

    waiting: the queued requests that are pinned to it.
    throughput: tokens a second that it generated of late. hit_rate: of its prompts, found in the prefix cache so far.
    """

    running: int
    waiting: int
    used_pages: int
    total_pages: int
    throughput: float = 0.0
    hit_rate: float = 0.0


class Step(msgspec.Struct, frozen=True, array_like=True):
    """What one step of the engine did and cost.

    began: by the monotonic clock, which all processes of a machine share. seconds: that it took, and of these
        device_seconds: launching programs and waiting for them.
    started, prefill_tokens, sequences: see `jaxmoe.engine.engine.StepReport`.
    """

    began: float
    seconds: float
    device_seconds: float
    started: tuple[str, ...]
    prefill_tokens: int
    sequences: int


class Totals(msgspec.Struct, frozen=True, array_like=True):
    """What has happened since the engine was made; see `jaxmoe.engine.engine.Counters`."""

    preemptions: int = 0
    programs: int = 0
    compile_seconds: float = 0.0
    late_compiles: int = 0
    failed_steps: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0
    drafts: int = 0
    accepted_drafts: int = 0


class Balance(msgspec.Struct, frozen=True, array_like=True):
    """How evenly tokens fell on devices; see `jaxmoe.moe.statistics.LoadReport`. worst_layer: among mixture layers."""

    balancedness: float
    ceiling: float
    of_ceiling: float
    worst_layer: int
    worst_balancedness: float


class Moves(msgspec.Struct, frozen=True, array_like=True):
    """Rebalances that are over, by how they ended; what moved in all; whether some do now.

    worst_step_seconds, worst_moving_seconds: of the latest; see `jaxmoe.engine.rebalancing.RebalanceReport`.
    """

    done: int = 0
    failed: int = 0
    deadline: int = 0
    moved_experts: int = 0
    moved_bytes: int = 0
    running: bool = False
    worst_step_seconds: float = 0.0
    worst_moving_seconds: float = 0.0


class Frame(msgspec.Struct, array_like=True, tag=True):
    """Base of all frames."""


class Submit(Frame):
    request: Request


class Cancel(Frame):
    """index: of the only sample to end; None ends all."""

    ids: list[str]
    index: int | None = None


class AskLoads(Frame):
    """Answered with `Loads` before the next step."""


class AskTable(Frame):
    """Answered with a `Table` of the same number, when it is made. name: of a message of `jaxmoe.v1`."""

    number: int
    name: str
    argument: str


class Order(Frame):
    """Done between two steps and answered with a `Table` of the same number. name: of the message that content is."""

    number: int
    name: str
    content: bytes


class ClearPrefixCache(Frame):
    """Answered with an empty `Table` of the same number, when it is done."""

    number: int


class WatchKvEvents(Frame):
    """From now on `KvEvents` are sent."""


class Bound(Frame):
    """The front end listens at this `host:port`; metrics: where these are read, if they are served."""

    address: str
    metrics: str = ""


class BindFailed(Frame):
    message: str


class Serving(Frame):
    """The front end lets requests through."""


class Progress(Frame):
    """How far the start has come; clients that are turned away read it."""

    text: str


class Ready(Frame):
    info: ModelInfo


class Outputs(Frame):
    """What one step brought. Sent even when empty: it shows that the engine still steps."""

    outputs: list[Output]
    step: Step | None = None


RejectionKind: TypeAlias = Literal["invalid", "precondition", "duplicate", "queue_full", "unavailable", "internal"]


class Rejection(msgspec.Struct, frozen=True, array_like=True):
    """Why something was not done; see `jaxmoe.serving.rejections`. field: of the request, that is at fault."""

    kind: RejectionKind
    message: str
    field: str = ""


class Rejected(Frame):
    """The engine did not take a request."""

    id: str
    why: Rejection


class Loads(Frame):
    ranks: list[RankLoad]


class Table(Frame):
    """content: the serialized message; problem: why there is none."""

    number: int
    content: bytes = b""
    problem: Rejection | None = None


class KvEvents(Frame):
    """What entered and left the prefix caches; the first tells all that is there."""

    batches: list[KvEventBatch]


class Report(Frame):
    """How the engine fares; sent unasked, about once a second while it works, and when its work is done."""

    ranks: list[RankLoad]
    totals: Totals
    balance: Balance | None = None
    moves: Moves = Moves()


class Fatal(Frame):
    """The engine will not step again."""

    message: str


ToEngine: TypeAlias = (
    Submit | Cancel | AskLoads | AskTable | Order | ClearPrefixCache | WatchKvEvents | Bound | BindFailed | Serving
)
ToFrontend: TypeAlias = Progress | Ready | Outputs | Rejected | Loads | Report | Table | KvEvents | Fatal

_F = TypeVar("_F")
_encoder = msgspec.msgpack.Encoder()


def _encode(frame: Frame) -> bytes:
    body = _encoder.encode(frame)
    return len(body).to_bytes(4, "little") + body


class _Splitter(Generic[_F]):
    """Cuts a stream of bytes into frames."""

    def __init__(self, frames: Any) -> None:
        self._decode: Callable[[bytes], _F] = msgspec.msgpack.Decoder(frames).decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[_F]:
        """The frames that `data` completes."""
        self._buffer += data
        frames, start = [], 0
        while (body := start + 4) <= len(self._buffer):
            end = body + int.from_bytes(self._buffer[start:body], "little")
            if end > len(self._buffer):
                break
            frames.append(self._decode(bytes(self._buffer[body:end])))
            start = end
        del self._buffer[:start]
        return frames


class EngineLink:
    """The engine's end: one thread sends and receives, others may `post`.

    Never waits for the reader, until more than `max_unread` bytes are unread; then it says so in the log, and gives the
    link up after `patience` seconds without a byte read.
    """

    def __init__(self, sock: socket.socket, *, max_unread: int = 64 << 20, patience: float = 60.0) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._splitter: _Splitter[ToEngine] = _Splitter(ToEngine)
        self._unsent = bytearray()
        self._max_unread = max_unread
        self._patience = patience
        self._lock = threading.Lock()  # of what is unsent, and of the order in which it is sent

    def post(self, frame: ToFrontend) -> None:
        """Sends a frame from another thread, and waits until it is sent. Raises LinkClosed."""
        data = _encode(frame)
        with self._lock:
            self._unsent += data
        while self._unsent:
            self._flush()
            if self._unsent and not self._wait(select.POLLOUT, self._patience):
                raise LinkClosed(f"the front end has read nothing for {self._patience:g} s")

    def send(self, frame: ToFrontend) -> None:
        """Raises LinkClosed if the front end is gone."""
        data = _encode(frame)
        with self._lock:
            self._unsent += data
        self._flush()
        if len(self._unsent) > self._max_unread:
            logger.warning("the front end leaves %d MiB unread; the engine waits for it", len(self._unsent) >> 20)
            while len(self._unsent) > self._max_unread:
                if not self._wait(select.POLLOUT, self._patience):
                    raise LinkClosed(f"the front end has read nothing for {self._patience:g} s")
                self._flush()

    def receive(self, *, block: bool) -> list[ToEngine]:
        """All frames that have come; with `block`, at least one. Raises LinkClosed if the front end is gone."""
        while True:
            self._flush()
            frames = self._read()
            if frames or not block:
                return frames
            self._wait(select.POLLIN | (select.POLLOUT if self._unsent else 0))

    def finish(self, timeout: float) -> None:
        """Sends what is unsent, and returns once the front end has closed its end, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with contextlib.suppress(LinkClosed):
            while (left := deadline - time.monotonic()) > 0:
                self.receive(block=False)
                self._wait(select.POLLIN | (select.POLLOUT if self._unsent else 0), left)

    def close(self) -> None:
        self._socket.close()

    def _read(self) -> list[ToEngine]:
        frames: list[ToEngine] = []
        while not frames:
            try:
                data = self._socket.recv(1 << 20)
            except BlockingIOError:
                break
            except ConnectionError as error:
                raise LinkClosed("the front end is gone") from error
            if not data:
                raise LinkClosed("the front end is gone")
            frames.extend(self._splitter.feed(data))
        return frames

    def _flush(self) -> None:
        try:
            with self._lock:
                while self._unsent:
                    del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except ConnectionError as error:
            raise LinkClosed("the front end is gone") from error

    def _wait(self, events: int, timeout: float | None = None) -> bool:
        poll = select.poll()
        poll.register(self._socket, events)
        return bool(poll.poll(None if timeout is None else timeout * 1000))


class FrontendLink(asyncio.Protocol):
    """The front end's end, on an event loop: calls `on_frame` for every frame, `on_close` when the engine is gone."""

    def __init__(self, on_frame: Callable[[ToFrontend], None], on_close: Callable[[], None]) -> None:
        self._on_frame = on_frame
        self._on_close = on_close
        self._splitter: _Splitter[ToFrontend] = _Splitter(ToFrontend)
        self._transport: asyncio.Transport | None = None

    async def connect(self, sock: socket.socket) -> None:
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=sock)

    def send(self, frame: ToEngine) -> None:
        """Does nothing once the engine is gone; `on_close` has told of that."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(_encode(frame))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for frame in self._splitter.feed(data):
            self._on_frame(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_close()
