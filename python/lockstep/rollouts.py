"""What generate() returns: samples with their log-probabilities, as ragged lists or as padded arrays for a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


class Version(NamedTuple):
    """A version of the weights; ordered."""

    epoch: int
    step: int


class VersionSpan(NamedTuple):
    """Tokens at offsets [begin, end) were computed under `weights`, from a state built under `state`.

    None: not known, as the worker that computed them was lost before it could say (on_loss="continue" only).
    """

    weights: Version | None
    state: Version | None
    begin: int
    end: int


@dataclasses.dataclass
class Sample:
    """One completion."""

    prompt_index: int  # into the prompts of the call
    sample_index: int  # keys the draws: (seed, prompt, sample_index, offset)
    seed: int
    tokens: np.ndarray  # int32 [T]; a stop token is part of it
    logprobs_by_kind: dict[str, np.ndarray]  # fp32 [T] for each kind asked for
    top: dict[str, tuple[np.ndarray, np.ndarray]]  # by kind: ids int32 [T, K], log-probabilities fp32 [T, K]
    # With kept_token_ids, for each token the ids it was drawn from, int32, ascending; None where nothing was filtered.
    kept: list[np.ndarray | None] | None
    finish_reason: str  # "stop", "length" or "aborted"
    reason: str  # of a stop: "eos", "token_id", ...; length: "max_tokens", "context"; aborted: "time_budget", ...
    message: str  # of an abort, for people
    matched_stop: Any  # rollout.proto's MatchedStop; None unless finish_reason is "stop"
    version_spans: list[VersionSpan]
    counters: Any  # rollout.proto's Counters, of the last request that the sample took
    worker: str  # HOST:PORT that finished it
    # Of the prompt's log-probabilities, positions [begin, end): weights may change between them and the first token.
    prompt_span: VersionSpan | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mixed_state(self) -> bool:
        """Whether a token came from a state of other weights (policy KEEP): no forward pass reproduces it."""
        return any(span.weights != span.state for span in self.version_spans)


@dataclasses.dataclass
class Padded:
    """B sequences, prompt then completion, padded on the right to L tokens. numpy arrays or torch tensors."""

    input_ids: Any  # int64 [B, L]
    attention_mask: Any  # int64 [B, L]: 1 for prompt and completion
    completion_mask: Any  # bool [B, L]: the tokens that were generated
    logprobs: Any  # fp32 [B, L]: of the token at that position; 0 outside the completion
    sample_mask: Any  # bool [B]: False for aborted samples


@dataclasses.dataclass
class Rollouts:
    """Samples of one generate() call: n of prompt 0, then n of prompt 1, ... Index and iterate them as a list."""

    prompts: list[np.ndarray]  # int32 [P] each
    samples: list[Sample]
    n: int
    kinds: tuple[str, ...]  # of log-probabilities; `logprobs` are of the first
    # For each prompt, by kind (raw, temperature), fp32 [P - 1]: of its tokens from the second on, fewer where all its
    # samples were aborted before. None: not asked for.
    prompt_logprobs: list[dict[str, np.ndarray]] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    @property
    def tokens(self) -> list[np.ndarray]:
        """int32 [T] for each sample."""
        return [sample.tokens for sample in self.samples]

    @property
    def logprobs(self) -> list[np.ndarray]:
        """fp32 [T] for each sample, of the first kind asked for. Raises ValueError if none was."""
        if not self.kinds:
            raise ValueError("these rollouts were generated without log-probabilities: generate(..., logprobs=...)")
        return [sample.logprobs_by_kind[self.kinds[0]] for sample in self.samples]

    @property
    def finish_reasons(self) -> list[str]:
        return [sample.finish_reason for sample in self.samples]

    @property
    def version_spans(self) -> list[list[VersionSpan]]:
        return [sample.version_spans for sample in self.samples]

    @property
    def sequences(self) -> list[np.ndarray]:
        """int32 [P + T] for each sample: prompt and completion."""
        return [np.concatenate([self.prompts[s.prompt_index], s.tokens]) for s in self.samples]

    def groups(self) -> Iterator[list[Sample]]:
        """The n samples of each prompt."""
        for begin in range(0, len(self.samples), self.n):
            yield self.samples[begin : begin + self.n]

    def padded(self, pad_id: int, *, framework: str = "numpy", multiple_of: int = 1) -> Padded:
        """Rectangular arrays, padded on the right (left padding shifts a recurrent layer's chunks).

        framework: "numpy" or "torch" (CPU tensors). multiple_of: of the padded length.
        """
        if framework not in ("numpy", "torch"):
            raise ValueError(f"framework: {framework!r}, want 'numpy' or 'torch'")
        sequences = self.sequences
        longest = max((len(s) for s in sequences), default=0)
        shape = len(sequences), -(-longest // multiple_of) * multiple_of
        ids = np.full(shape, pad_id, np.int64)
        attention, completion = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        logprobs = np.zeros(shape, np.float32)
        for row, (sample, sequence) in enumerate(zip(self.samples, sequences, strict=True)):
            ids[row, : len(sequence)] = sequence
            attention[row, : len(sequence)] = 1
            generated = slice(len(sequence) - len(sample), len(sequence))
            completion[row, generated] = True
            if self.kinds:
                logprobs[row, generated] = sample.logprobs_by_kind[self.kinds[0]]
        arrays = [ids, attention, completion, logprobs, np.array([r != "aborted" for r in self.finish_reasons], bool)]
        if framework == "torch":
            import torch

            arrays = [torch.from_numpy(array) for array in arrays]
        return Padded(*arrays)
