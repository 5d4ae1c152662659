"""How to sample: rollout.proto's SamplingParams as a dataclass that says at once what is wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lockstep.v1 import rollout_pb2 as pb

from .errors import InvalidRequest

_KINDS = {
    "raw": pb.LOGPROB_KIND_RAW,
    "temperature": pb.LOGPROB_KIND_TEMPERATURE,
    "processed": pb.LOGPROB_KIND_PROCESSED,
}


def logprob_kinds(kinds: str | Sequence[str], allowed: Sequence[str] = tuple(_KINDS)) -> dict[str, int]:
    """Names ("raw", "temperature", "processed") to protocol values, in the order given."""
    names = [kinds] if isinstance(kinds, str) else list(kinds)
    for name in names:
        if name not in allowed:
            raise InvalidRequest(f"logprobs: {name!r}, want one or several of {', '.join(allowed)}")
    return {name: _KINDS[name] for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Field by field as in rollout.proto, whose comments are the reference; None: the worker's default.

    Ranges that do not depend on the model are checked here, the others by the worker, in the same words.
    """

    temperature: float | None = None  # 0: greedy; else 0.0001 to 10000. None: 1
    top_p: float | None = None  # 0 < top_p <= 1
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0 <= min_p < 1
    seed: int | None = None  # u64. None: the client draws one for each prompt
    max_tokens: int | None = None  # None: what fits the context
    clamp: bool = False  # reduce a too large max_tokens to what fits
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    stop_token_sequences: Sequence[Sequence[int]] = ()
    stop_strings: Sequence[str] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    repetition_penalty: float | None = None  # 0.01 to 100
    presence_penalty: float = 0.0  # -100 to 100
    frequency_penalty: float = 0.0  # -100 to 100

    def __post_init__(self) -> None:
        def check(field: str, good: bool, want: str) -> None:
            if not good:
                raise InvalidRequest(f"sampling.{field}: {getattr(self, field)!r}, want {want}")

        t = self.temperature
        check("temperature", t is None or t == 0 or 0.0001 <= t <= 10000, "0 (greedy) or 0.0001 to 10000")
        check("top_p", self.top_p is None or 0 < self.top_p <= 1, "0 < top_p <= 1")
        check("top_k", self.top_k >= 0, "0 (off) or more")
        check("min_p", 0 <= self.min_p < 1, "0 <= min_p < 1")
        check("seed", self.seed is None or 0 <= self.seed < 1 << 64, "0 to 2^64 - 1")
        check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None for what fits")
        most = math.inf if self.max_tokens is None else self.max_tokens
        check("min_tokens", 0 <= self.min_tokens <= most, f"0 to max_tokens ({self.max_tokens})")
        r = self.repetition_penalty
        check("repetition_penalty", r is None or 0.01 <= r <= 100, "0.01 to 100")
        check("presence_penalty", -100 <= self.presence_penalty <= 100, "-100 to 100")
        check("frequency_penalty", -100 <= self.frequency_penalty <= 100, "-100 to 100")
        check("logit_bias", all(-100 <= v <= 100 for v in self.logit_bias.values()), "values from -100 to 100")
        # A bare string is a sequence of one-character strings: surely not what was meant.
        check("stop_strings", not isinstance(self.stop_strings, str) and all(self.stop_strings), "non-empty strings")
        for field in ("stop_token_sequences", "bad_words"):
            check(field, all(len(ids) > 0 for ids in getattr(self, field)), "non-empty lists of token ids")

    def to_proto(self) -> pb.SamplingParams:
        message = pb.SamplingParams(
            top_k=self.top_k,
            min_p=self.min_p,
            clamp=self.clamp,
            min_tokens=self.min_tokens,
            stop_token_ids=self.stop_token_ids,
            stop_token_sequences=[pb.TokenSequence(token_ids=ids) for ids in self.stop_token_sequences],
            stop_strings=self.stop_strings,
            ignore_eos=self.ignore_eos,
            logit_bias=dict(self.logit_bias),
            allowed_token_ids=self.allowed_token_ids,
            bad_words=[pb.TokenSequence(token_ids=ids) for ids in self.bad_words],
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )
        for field in ("temperature", "top_p", "seed", "max_tokens", "repetition_penalty"):
            if getattr(self, field) is not None:
                setattr(message, field, getattr(self, field))
        return message
