"""From prompts and fields to a job for the engine."""

from collections.abc import Callable, Sequence

from gptoss_lite.engine import Request
from gptoss_lite.errors import RequestError
from gptoss_lite.harmony.parse import turn_ends
from gptoss_lite.sampling import LogitsProcessor
from gptoss_lite.serve.fields import Choosing
from gptoss_lite.serve.service import Job
from gptoss_lite.stream import EventStream, Reader
from gptoss_lite.tokenizer import Tokenizer


def make_job(
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    choosing: Choosing,
    reader: Callable[[], Reader],
    *,
    choices: int,
    max_tokens: int | None,
    logprobs: int | None,
    salt: bytes,
    constrain: Callable[[], LogitsProcessor] | None = None,
    remember: bool = False,
) -> Job:
    """Ask for `choices` answers to each prompt; RequestError names a field that is wrong.

    reader and constrain make what one answer has for itself. All have one seed, and each its own draws.
    """
    seed = choosing.drawn_seed()
    ends = turn_ends(tokenizer)
    sampling = choosing.sampling(logprobs)
    if unknown := [token for token in sampling.logit_bias if token >= tokenizer.vocab_size]:
        raise RequestError(
            f"logit_bias names token {unknown[0]}: the vocabulary ends at {tokenizer.vocab_size - 1}"
        )
    requests = [
        Request(
            tokens,
            sampling if constrain is None else choosing.sampling(logprobs, (constrain(),)),
            seed,
            max_tokens,
            ends,
            choice=choice,
            cache_salt=salt,
        )
        for tokens in prompts
        for choice in range(choices)
    ]
    streams = [EventStream(reader(), seed, len(request.tokens), frozenset()) for request in requests]
    return Job(requests, streams, choices, salt, bool(choosing.stop_on_repetition), remember)
