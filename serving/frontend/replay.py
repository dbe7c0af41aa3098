"""Between an answer as it was streamed and the same answer as it is kept: one message."""

from collections.abc import Iterable, Iterator

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import usage_pb2


def whole(chunks: Iterable[pb.GenerateChunk]) -> pb.GenerateResponse:
    """The answer of a whole stream, its last chunk included, as GenerateUnary would give it."""
    response = pb.GenerateResponse()
    choices: dict[int, pb.Choice] = {}
    texts: dict[int, list[str]] = {}
    for chunk in chunks:
        response.request_id = chunk.request_id
        if chunk.HasField("done"):
            done = chunk.done
            response.usage.CopyFrom(done.usage)
            response.charge.CopyFrom(done.charge)
            response.model_version = done.model_version
            if done.HasField("receipt"):
                response.receipt.CopyFrom(done.receipt)
            continue
        choice = choices.setdefault(chunk.index, pb.Choice(index=chunk.index))
        texts.setdefault(chunk.index, []).append(chunk.text)
        choice.token_ids.extend(chunk.token_ids)
        choice.logprobs.extend(chunk.logprobs)
        if chunk.finish_reason:
            choice.finish_reason = chunk.finish_reason
    for index in sorted(choices):
        choices[index].text = "".join(texts[index])
        response.choices.append(choices[index])
    return response


def streamed(response: pb.GenerateResponse) -> Iterator[pb.GenerateChunk]:
    """The answer as a stream: one chunk for each choice, then the one with `done`.

    Usage grows with the chunks as it did then; the part that was reasoning is known of the whole
    only, so it stands in the last choice's chunk and in `done`.
    """
    usage = usage_pb2.Usage()
    usage.CopyFrom(response.usage)
    usage.completion_tokens = usage.reasoning_tokens = 0
    for number, choice in enumerate(response.choices, 1):
        usage.completion_tokens += len(choice.token_ids)
        is_last = number == len(response.choices)
        yield pb.GenerateChunk(
            request_id=response.request_id,
            index=choice.index,
            text=choice.text,
            token_ids=choice.token_ids,
            logprobs=choice.logprobs,
            finish_reason=choice.finish_reason,
            usage=response.usage if is_last else usage,
        )
    done = pb.Done(
        usage=response.usage, charge=response.charge, model_version=response.model_version
    )
    if response.HasField("receipt"):
        done.receipt.CopyFrom(response.receipt)
    yield pb.GenerateChunk(request_id=response.request_id, usage=response.usage, done=done)
