"""Which experts tokens went to, for the requests that ask: from the arrays of whole calls to each request's own."""

import dataclasses
from collections.abc import Sequence as Seq

import numpy as np
from jaxtyping import Array, Int

from jaxmoe.engine.batch import Ranks, StepShape
from jaxmoe.engine.request import Output, RoutedExperts
from jaxmoe.engine.sequence import Chunk, Sequence


@dataclasses.dataclass
class _Untold:
    """Of one sample. start: position of the first row, before which all is told."""

    sequence: Sequence
    start: int
    rows: list[Int[np.ndarray, "L K"]] = dataclasses.field(default_factory=list)


class RoutedTokens:
    """By request and sample, until an output tells of it."""

    def __init__(self) -> None:
        self._untold: dict[tuple[str, int], _Untold] = {}

    def record(self, shape: StepShape, ranks: Ranks, experts: Int[Array, "L R N K"]) -> None:
        """What a call routed; read from the device only if one of its requests asks."""
        wanted = [
            (chunk, rank, begin)
            for rank, chunks in enumerate(ranks)
            for begin, chunk in zip(shape.begins(chunks), chunks, strict=False)
            if chunk.sequence.request.params.routed_experts and not chunk.sequence.ended
        ]
        if not wanted:
            return
        by_row = np.moveaxis(np.asarray(experts), 0, 2)
        for chunk, rank, begin in wanted:
            self._take(chunk, by_row[rank, begin : begin + chunk.length])

    def attach(self, outputs: Seq[Output]) -> list[Output]:
        """The same with what became known of each; what was computed in vain, as after a preemption, is told once."""
        return [self._told(output) for output in outputs] if self._untold else list(outputs)

    def _take(self, chunk: Chunk, rows: Int[np.ndarray, "tokens L K"]) -> None:
        sequence = chunk.sequence
        untold = self._untold.setdefault((sequence.name, sequence.index), _Untold(sequence, chunk.start))
        del untold.rows[max(0, chunk.start - untold.start) :]
        untold.rows += list(rows[max(0, untold.start - chunk.start) :])

    def _told(self, output: Output) -> Output:
        key = (output.request_id, output.index)
        untold = self._untold.get(key)
        if untold is None:
            return output
        if output.finish_reason:
            del self._untold[key]
        # A draft that was not taken went through the model for nothing.
        rows = untold.rows[: max(0, untold.sequence.num_computed - untold.start)]
        if not rows or not output.token_ids:
            return output
        told = np.stack(rows).astype("<u2")
        _, layers, k = told.shape
        routed = RoutedExperts(untold.start, layers, k, told.tobytes())
        untold.start, untold.rows = untold.start + len(rows), []
        return dataclasses.replace(output, routed_experts=routed)
