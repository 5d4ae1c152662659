"""Puts the messages of one or several streams together into samples. No I/O: what both clients share.

A token is taken exactly once: the message that begins where the sample ends. One from before is a protocol error, as is
a gap, so that a retry can neither double nor lose a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lockstep.v1 import rollout_pb2 as pb

from .errors import WorkerDefect
from .rollouts import Sample, Version, VersionSpan


def _version(message: pb.WeightVersion) -> Version:
    return Version(message.epoch, message.step)


def _span(message: pb.VersionSpan) -> VersionSpan:
    return VersionSpan(_version(message.weight_version), _version(message.state_version), message.begin, message.end)


def _enum_name(enum: Any, value: int, prefix: str) -> str:
    return enum.Name(value).removeprefix(prefix).lower()


@dataclasses.dataclass
class _Partial:
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    top: dict[str, tuple[list[int], list[float], int]] = dataclasses.field(default_factory=dict)
    kept: list[np.ndarray | None] = dataclasses.field(default_factory=list)
    spans: list[VersionSpan] = dataclasses.field(default_factory=list)  # of what came before the current request
    done: pb.Done | None = None
    worker: str = ""

    def drop_last(self) -> None:
        """Forgets the last token and what belongs to it."""
        del self.tokens[-1:], self.kept[-1:]
        for values in self.logprobs.values():
            del values[-1:]
        for ids, logprobs, k in self.top.values():
            del ids[-k:], logprobs[-k:]


class Assembly:
    """The samples of one prompt.

    prompt_kinds: of the prompt's log-probabilities, () for none; prompt_length: tokens.
    """

    def __init__(
        self,
        prompt_index: int,
        first: int,
        n: int,
        seed: int,
        kinds: tuple[str, ...],
        kept: bool = False,
        prompt_kinds: tuple[str, ...] = (),
        prompt_length: int = 0,
    ):
        self.prompt_index, self.seed, self.kinds, self.kept = prompt_index, seed, kinds, kept
        self.prompt_kinds, self.prompt_length = prompt_kinds, prompt_length
        self._prompt: dict[str, list[float]] = {kind: [] for kind in prompt_kinds}
        self.partials = {index: _Partial() for index in range(first, first + n)}

    def add(self, message: pb.GenerateResponse, worker: str) -> int:
        """Takes one message; returns the number of new tokens."""
        if message.HasField("prompt_logprobs"):
            self._add_prompt(message.prompt_logprobs, worker)
        if not (message.token_ids or message.HasField("done")):
            return 0
        partial = self.partials.get(message.sample_index)
        if partial is None or partial.done is not None:
            raise WorkerDefect(f"sample_index {message.sample_index}: not asked for, or done before", worker=worker)
        if message.offset != len(partial.tokens):
            raise WorkerDefect(f"offset {message.offset}, want {len(partial.tokens)}", worker=worker)
        partial.tokens.extend(message.token_ids)
        for kind in self.kinds:
            values = getattr(message.logprobs, kind)
            if len(values) != len(message.token_ids):
                raise WorkerDefect(f"{len(values)} {kind} values for {len(message.token_ids)} tokens", worker=worker)
            partial.logprobs.setdefault(kind, []).extend(values)
            if message.logprobs.top_k:
                ids, logprobs, _ = partial.top.get(kind, ([], [], 0))
                ids.extend(getattr(message.logprobs, f"top_{kind}_ids"))
                logprobs.extend(getattr(message.logprobs, f"top_{kind}_logprobs"))
                partial.top[kind] = ids, logprobs, message.logprobs.top_k
        if self.kept:
            self._add_kept(partial, message, worker)
        if message.HasField("done"):
            if message.done.end_offset != len(partial.tokens):
                raise WorkerDefect(
                    f"end_offset {message.done.end_offset}, want {len(partial.tokens)}", code=None, worker=worker
                )
            partial.done, partial.worker = message.done, worker
        return len(message.token_ids)

    def _add_prompt(self, part: pb.PromptLogprobs, worker: str) -> None:
        values = {kind: getattr(part.logprobs, kind) for kind in self.prompt_kinds}
        counts = {len(v) for v in values.values()}
        end = part.begin + max(counts, default=0)
        if part.begin != self.next_prompt_position or len(counts) != 1 or end > self.prompt_length:
            text = f"prompt log-probabilities of {part.begin} to {end - 1}, want {self.next_prompt_position} to {self.prompt_length - 1} at most"
            raise WorkerDefect(text, worker=worker)
        for kind, added in values.items():
            self._prompt[kind].extend(added)

    @property
    def next_prompt_position(self) -> int:
        """The first position whose log-probabilities have not come."""
        return 1 + min(map(len, self._prompt.values()), default=0)

    @property
    def wants_prompt(self) -> bool:
        return bool(self.prompt_kinds) and self.next_prompt_position < self.prompt_length

    def restart_prompt(self) -> None:
        """Another request gives the prompt's log-probabilities from the start."""
        self._prompt = {kind: [] for kind in self.prompt_kinds}

    def prompt_logprobs(self) -> dict[str, np.ndarray]:
        """By kind, fp32 [P - 1]; fewer only where all samples were aborted before they had come."""
        if self.wants_prompt and any(
            p.done is not None and p.done.finish_reason != pb.FINISH_REASON_ABORTED for p in self.partials.values()
        ):
            text = f"{self.next_prompt_position - 1} prompt log-probabilities of {self.prompt_length - 1}"
            raise WorkerDefect(text, worker=next(iter(self.partials.values())).worker)
        return {kind: np.array(values, np.float32) for kind, values in self._prompt.items()}

    @staticmethod
    def _add_kept(partial: _Partial, message: pb.GenerateResponse, worker: str) -> None:
        counts, ids = message.logprobs.kept_counts, np.array(message.logprobs.kept_ids, np.int32)
        if len(counts) != len(message.token_ids) or sum(counts) != len(ids):
            text = (
                f"{len(counts)} kept_counts of {sum(counts)} ids for {len(message.token_ids)} tokens and {len(ids)} ids"
            )
            raise WorkerDefect(text, worker=worker)
        begin = 0
        for count in counts:
            partial.kept.append(ids[begin : begin + count] if count else None)
            begin += count

    def unfinished(self) -> list[int]:
        """Sample indices that have no end yet."""
        return [index for index, partial in self.partials.items() if partial.done is None]

    def offset(self, index: int) -> int:
        return len(self.partials[index].tokens)

    def tokens(self, index: int) -> list[int]:
        return self.partials[index].tokens

    def cut_off(self) -> list[int]:
        """Samples without an end, or that a stopping worker ended; another one can go on with them."""
        return [
            index
            for index, partial in self.partials.items()
            if partial.done is None or partial.done.abort_reason == pb.ABORT_REASON_SHUTDOWN
        ]

    def reopen(self, index: int, *, keep_tokens: bool) -> None:
        """Makes a sample ready for another request: from scratch, or continuing its tokens."""
        old = self.partials[index]
        if not keep_tokens:
            self.partials[index] = _Partial()
            return
        old.spans = self._spans(old)
        known = old.spans[-1].end if old.spans else 0
        if old.done is None and known < len(old.tokens):
            old.drop_last()  # it may be the one that ends the sample: drawn again, under the same key, it says so
        if known < len(old.tokens):
            old.spans.append(VersionSpan(None, None, known, len(old.tokens)))
        old.done = None

    @staticmethod
    def _spans(partial: _Partial) -> list[VersionSpan]:
        new = partial.done.version_spans if partial.done is not None else ()
        return partial.spans + [_span(span) for span in new]

    def sample(self, index: int) -> Sample:
        partial = self.partials[index]
        done = partial.done
        if done is None:
            raise AssertionError(f"sample {index} has no end")
        finish = _enum_name(pb.FinishReason, done.finish_reason, "FINISH_REASON_")
        reason = {
            "stop": lambda: _enum_name(pb.StopKind, done.matched_stop.kind, "STOP_KIND_"),
            "length": lambda: _enum_name(pb.LengthReason, done.length_reason, "LENGTH_REASON_"),
            "aborted": lambda: _enum_name(pb.AbortReason, done.abort_reason, "ABORT_REASON_"),
        }.get(finish, lambda: "")()
        return Sample(
            prompt_index=self.prompt_index,
            sample_index=index,
            seed=self.seed,
            tokens=np.array(partial.tokens, np.int32),
            logprobs_by_kind={kind: np.array(partial.logprobs.get(kind, ()), np.float32) for kind in self.kinds},
            top={
                kind: (np.array(ids, np.int32).reshape(-1, k), np.array(logprobs, np.float32).reshape(-1, k))
                for kind, (ids, logprobs, k) in partial.top.items()
            },
            kept=partial.kept if self.kept else None,
            finish_reason=finish,
            reason=reason,
            message=done.abort_message,
            matched_stop=done.matched_stop if finish == "stop" else None,
            version_spans=self._spans(partial),
            counters=done.counters,
            worker=partial.worker,
            prompt_span=_span(done.prompt_span) if done.HasField("prompt_span") else None,
        )
