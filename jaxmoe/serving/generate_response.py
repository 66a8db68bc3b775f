"""The answer to a GenerateRequest on its way out: as a stream of deltas, or whole."""

from collections.abc import Sequence

import grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxmoe.engine.request import RoutedExperts, SamplingParams, TopLogprobs
from jaxmoe.serving.routed import add_routed
from jaxmoe.serving.streams import Finish, Piece, Stream


async def send_stream(
    stream: Stream,
    context: grpc.aio.ServicerContext,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    logprobs: bool,
) -> None:
    """What has come since the last write goes out together: one chunk a step, more tokens a chunk for a slow reader."""
    totals, left = [0] * params.n, params.n
    while left:
        piece = await stream.read()
        if piece.token_ids:
            totals[piece.sample] += len(piece.token_ids)
            chunk = pb.GenerateStreamChunk(
                token_ids=piece.token_ids,
                prompt_tokens=len(prompt),
                cached_tokens=stream.timeline.cached_tokens,
                completion_tokens=len(piece.token_ids),
                index=piece.sample,
            )
            _add_logprobs(chunk, piece, prompt, params, logprobs=logprobs)
            add_routed(chunk, piece.routed)
            await context.write(pb.GenerateResponse(chunk=chunk))
        if piece.finish is not None:
            left -= 1
            complete = _complete(piece.finish, piece.sample, stream, totals[piece.sample])
            await context.write(pb.GenerateResponse(complete=complete))


async def send_whole(
    stream: Stream,
    context: grpc.aio.ServicerContext,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    logprobs: bool,
) -> None:
    wholes: dict[int, pb.GenerateComplete] = {}
    routed: dict[int, RoutedExperts] = {}
    left = params.n
    while left:
        piece = await stream.read()
        whole = wholes.setdefault(piece.sample, pb.GenerateComplete())
        whole.output_ids.extend(piece.token_ids)
        _add_logprobs(whole, piece, prompt, params, logprobs=logprobs)
        if piece.routed is not None:
            before = routed.setdefault(piece.sample, piece.routed._replace(experts=b""))
            routed[piece.sample] = before._replace(experts=before.experts + piece.routed.experts)
        if piece.finish is not None:
            left -= 1
            add_routed(whole, routed.get(piece.sample))
            whole.MergeFrom(_complete(piece.finish, piece.sample, stream, len(whole.output_ids)))
            await context.write(pb.GenerateResponse(complete=whole))


def _add_logprobs(
    message: pb.GenerateStreamChunk | pb.GenerateComplete,
    piece: Piece,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    logprobs: bool,
) -> None:
    """Appends the piece's log-probabilities, and with the first token those of the prompt, as far as asked for."""
    if logprobs and piece.token_ids:
        told = message.output_logprobs
        told.token_ids.extend(piece.token_ids)
        told.token_logprobs.extend(piece.logprobs)
        told.top_logprobs.extend(map(_top, piece.top_logprobs))
    if piece.prompt_logprobs is not None:
        of_prompt = message.input_logprobs
        of_prompt.token_ids.extend(prompt)
        of_prompt.token_logprobs.add()  # nothing is before the first token
        of_prompt.token_logprobs.extend(pb.InputTokenLogProb(value=value) for value, _ in piece.prompt_logprobs)
        if params.prompt_logprobs:
            of_prompt.top_logprobs.add()
            of_prompt.top_logprobs.extend(_top(top) for _, top in piece.prompt_logprobs)


def _top(top: TopLogprobs) -> pb.TopLogProbs:
    return pb.TopLogProbs(values=[value for _, value in top], token_ids=[token for token, _ in top])


def _complete(finish: Finish, index: int, stream: Stream, completion_tokens: int) -> pb.GenerateComplete:
    return pb.GenerateComplete(
        index=index,
        finish_reason=finish.reason,
        prompt_tokens=stream.timeline.prompt_tokens,
        cached_tokens=stream.timeline.cached_tokens,
        completion_tokens=completion_tokens,
        matched_token_id=finish.stop_token,
        matched_stop_str=finish.stop_string,
    )
