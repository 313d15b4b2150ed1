"""Run as a script: compile the grammar on standard input within bounds, and print what is wrong with it.

A process of its own, since llguidance has no limit of time: intersected patterns keep it busy for minutes.
It imports nothing of this package, which would take longer than the compiling.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress

CPU_SECONDS = 2
MEMORY_BYTES = 256 << 20


class _Bytes:
    """A vocabulary of the 256 bytes and an end."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: str) -> Sequence[int]:
        return list(text.encode())


def main() -> None:
    """Print llguidance's complaint about a grammar, nothing if it has none."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    with suppress(ImportError):  # Windows has no such limits: there the caller's patience alone counts
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    limits = LLParserLimits(verbose_errors=False)
    tokens = LLTokenizer(TokenizerWrapper(_Bytes()))
    matcher = LLMatcher(tokens, sys.stdin.read(), log_level=0, limits=limits)
    matcher.compute_bitmask()
    sys.stdout.write(matcher.get_error())


if __name__ == "__main__":
    main()
