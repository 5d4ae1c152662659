"""A running worker against a trainer, token by token, and what is wrong where they differ.

report = check(client, TransformersTrainer(directory))
print(report); sys.exit(report.exit_code)
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .client import RolloutClient
from .errors import InvalidRequest, LockstepError, from_rpc
from .metrics import mismatch, same_bits
from .rollouts import Rollouts
from .sampling import SamplingParams

Trainer = Callable[[np.ndarray], np.ndarray]  # ids int [T] -> fp32 [T - 1], as the learner's loss computes them
LAYOUTS = ("unpadded", "packed", "left_padded")
KINDS = ("temperature", "raw", "processed")


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What passes. mean, max: of |trainer - rollout|; None: any. bits: every token equal in bits."""

    mean: float | None = 0.02
    max: float | None = None
    bits: bool = False

    def broken(self, metrics: dict[str, float]) -> list[str]:
        mean, most = metrics["vllm_vs_local_logprob_diff_mean"], metrics["vllm_vs_local_logprob_diff_max"]
        found = []
        if self.mean is not None and not mean <= self.mean:
            found.append(f"mean {mean:.3g}, want at most {self.mean:g}")
        if self.max is not None and not most <= self.max:
            found.append(f"max {most:.3g}, want at most {self.max:g}")
        if self.bits and metrics["bit_equal"] < 1:
            found.append(f"{metrics['bit_equal']:.4%} of the tokens equal in bits, want all")
        return found


@dataclasses.dataclass
class Worst:
    """A token that differs most."""

    sequence: int
    position: int  # in the sequence, prompt included
    token: int
    rollout: float
    trainer: float
    context: str  # what came before, as text or ids


@dataclasses.dataclass
class LayoutResult:
    layout: str
    metrics: dict[str, float]
    broken: list[str]
    by_position: list[tuple[str, int, float, float]]  # (positions, tokens, mean, max)
    by_type: list[tuple[str, int, float, float]]  # (type of token, tokens, mean, max)
    worst: list[Worst]
    differences: np.ndarray  # |trainer - rollout| fp64 [N]
    positions: np.ndarray  # int [N]


@dataclasses.dataclass
class ParityReport:
    profile: str
    weight_version: tuple[int, int]
    temperature: float
    layouts: list[LayoutResult]
    findings: list[str]  # faults that were recognised
    left_out: int  # samples whose state or weights were mixed by an update

    @property
    def passed(self) -> bool:
        return not any(layout.broken for layout in self.layouts)

    @property
    def exit_code(self) -> int:
        return 0 if self.passed else 1

    def __str__(self) -> str:
        from .parity_report import as_text

        return as_text(self)


def check(
    client: RolloutClient,
    trainer: Trainer,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    sampling: SamplingParams | None = None,
    layouts: Sequence[str] = ("unpadded",),
    thresholds: Thresholds | None = None,
    tokenizer: Any = None,
    control: str | None = None,
    control_token: str | None = None,
    tls_ca: str | pathlib.Path | None = None,
    count: int = 16,
    seed: int = 0,
) -> ParityReport:
    """Generates, recomputes with the trainer, compares the generated tokens.

    trainer: its log-probabilities are those of its loss, at the sampling's temperature. Layouts other than "unpadded"
      need its methods packed() and left_padded() (lockstep.hf.TransformersTrainer has them).
    prompts: None: `count` random ones of 4 to 67 ids. sampling: None: 128 tokens at temperature 1, end tokens ignored.
    thresholds: hold in every layout asked for.
    control: HOST:PORT of a worker's control plane: the trainer's tensors() are compared with its weights by digest.
      control_token, tls_ca: as the token and tls_ca of lockstep.WeightPublisher.
    tokenizer: a Hugging Face tokenizer, for the context and the types of tokens.

    Raises LockstepError where the worker fails; ValueError where the trainer's answer has the wrong length.
    """
    for layout in layouts:
        if layout not in LAYOUTS:
            raise InvalidRequest(f"layouts: {layout!r}, want some of {', '.join(LAYOUTS)}")
        if layout != "unpadded" and not hasattr(trainer, layout):
            raise InvalidRequest(f"layouts: {layout!r} needs a trainer with a method {layout}()")
    info = next(iter(client.info().values()))
    if prompts is None:
        generator = np.random.default_rng(seed)
        prompts = [generator.integers(0, info.model.vocab_size, 4 + 4 * i % 64, np.int32) for i in range(count)]
    sampling = sampling or SamplingParams(max_tokens=128, ignore_eos=True, seed=seed)
    rollouts = client.generate(prompts, sampling, logprobs=KINDS)
    whole = [
        i
        for i, s in enumerate(rollouts)
        if len(s) and not s.mixed_state and len({v.weights for v in s.version_spans}) == 1
    ]
    left_out = len(rollouts) - len(whole)
    if not whole:
        raise LockstepError("no sample came from one version of the weights alone: publish less often while checking")
    rollouts = Rollouts(rollouts.prompts, [rollouts[i] for i in whole], 1, rollouts.kinds)
    sequences = rollouts.sequences
    alone = [_checked(trainer(sequence), sequence) for sequence in sequences]
    findings = _wrong_kind(rollouts, alone, sampling) + _bf16_output(alone)
    if control is not None:
        findings += stale_weights(trainer, control, control_token, tls_ca)
    results = []
    for layout in layouts:
        if layout == "unpadded":
            values = alone
        else:
            tagged = list(getattr(trainer, layout)(sequences))
            values = [_checked(v, s) for (_, v), s in zip(tagged, sequences, strict=True)]
            findings += layout_fault(layout, [tag for tag, _ in tagged], values, alone)
        results.append(_result(layout, rollouts, values, thresholds or Thresholds(), tokenizer))
    version = rollouts[0].version_spans[0].weights or (0, 0)
    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    return ParityReport(info.numerics.profile, tuple(version), temperature, results, findings, left_out)


def _checked(values: Any, sequence: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float32)
    if values.shape != (len(sequence) - 1,):
        raise ValueError(
            f"trainer: {values.shape} for a sequence of {len(sequence)} tokens, want ({len(sequence) - 1},)"
        )
    return values


# What is wrong


def _generated(rollouts: Rollouts, values: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([v[-len(s) :] for v, s in zip(values, rollouts, strict=True)])


def _wrong_kind(rollouts: Rollouts, values: Sequence[np.ndarray], sampling: SamplingParams) -> list[str]:
    """Whether the trainer's values are another kind of the worker's."""
    theirs = _generated(rollouts, values).astype(np.float64)
    ours = {kind: np.concatenate([s.logprobs_by_kind[kind] for s in rollouts]) for kind in KINDS}
    mean = {kind: float(np.abs(ours[kind] - theirs).mean()) for kind in KINDS}
    best = min(KINDS, key=mean.__getitem__)
    if not mean[best] < 0.2 * mean["temperature"]:
        return []
    about = f"mean |difference| {mean[best]:.3g} against {mean['temperature']:.3g}"
    if best == "raw":
        return [
            f"temperature on one side: the trainer's values are the worker's RAW ones ({about}); divide the trainer's logits by {sampling.temperature}, or ask for logprobs='raw'"
        ]
    return [
        f"raw against processed: the trainer's values are those of the filtered distribution, the worker's PROCESSED ones ({about}); compare with logprobs='processed', or without the filters"
    ]


def _bf16_output(values: Sequence[np.ndarray]) -> list[str]:
    bits = np.concatenate(values).view(np.uint32)
    if bits.size < 16 or (bits & 0xFFFF).any():
        return []
    return [
        "bf16 log_softmax: every value of the trainer is a bf16 number; take log_softmax of logits.float() (lockstep.trainer.logprobs)"
    ]


def layout_fault(
    layout: str, tags: Sequence[int], values: Sequence[np.ndarray], alone: Sequence[np.ndarray]
) -> list[str]:
    """What is wrong with a trainer in a layout, against its own values of each sequence alone; empty: equal in bits.

    layout: "packed" or "left_padded"; tags and values as that method of the trainer yields them.
    """
    differences = [np.abs(v.astype(np.float64) - a) for v, a in zip(values, alone, strict=True)]
    differing = sum(int((~same_bits(v, a)).sum()) for v, a in zip(values, alone, strict=True))
    if not differing:
        return []

    def mean(wanted: Callable[[int], bool]) -> float:
        chosen = [d for d, tag in zip(differences, tags, strict=True) if wanted(tag)]
        return float(np.concatenate(chosen).mean()) if chosen else 0.0

    total = sum(len(d) for d in differences)
    text = f"{layout}: the trainer differs from its own unpadded values in {differing} of {total} tokens"
    if layout == "packed":
        first, later = mean(lambda place: place == 0), mean(lambda place: place > 0)
        if later > 10 * first + 1e-3:
            return [
                f"{text}: mean {later:.3g} in later documents, {first:.3g} in the first: state leaks across packed documents; cu_seqlens must reach the convolution and the GDN kernel"
            ]
    else:
        grid, shifted = mean(lambda pads: pads % 64 == 0), mean(lambda pads: pads % 64 != 0)
        if shifted > 2 * grid:
            return [
                f"{text}: mean {shifted:.3g} where the padding is no multiple of 64, {grid:.3g} elsewhere: left padding shifts the chunk grid; pad on the right, or strip the padding"
            ]
    return [text]


def stale_weights(
    trainer: Any, control: str, token: str | None = None, tls_ca: str | pathlib.Path | None = None
) -> list[str]:
    """Compares the trainer's tensors (its tensors(): name -> torch tensor) with those a worker serves, by digest.

    control: HOST:PORT of the worker's control plane; token, tls_ca: as of lockstep.WeightPublisher. Returns findings; empty: all are the same.
    """
    import grpc
    import torch

    from lockstep.v1 import weights_pb2, weights_pb2_grpc

    from ._channel import Credentials
    from ._digest import digest

    if not hasattr(trainer, "tensors"):
        raise InvalidRequest("control: comparing weights needs a trainer with a method tensors()")
    with Credentials(token, tls_ca).channel(control) as channel:
        try:
            answer = weights_pb2_grpc.WeightsStub(channel).GetDigests(weights_pb2.GetDigestsRequest(), timeout=120)
        except grpc.RpcError as error:
            raise from_rpc(error, control) from None
    dtypes = {
        weights_pb2.TENSOR_DTYPE_FLOAT32: torch.float32,
        weights_pb2.TENSOR_DTYPE_BFLOAT16: torch.bfloat16,
        weights_pb2.TENSOR_DTYPE_FLOAT16: torch.float16,
    }
    tensors = trainer.tensors()
    known = [held for held in answer.tensors if held.name in tensors]
    differ = [held.name for held in known if digest(tensors[held.name].to(dtypes[held.dtype])) != held.digest]
    version = answer.weight_version.epoch, answer.weight_version.step
    findings = []
    if differ:
        findings.append(
            f"stale weights: {len(differ)} of {len(known)} tensors differ from those the worker serves as version {version}: {', '.join(differ[:5])}"
        )
    missing = len(answer.tensors) - len(known)
    if missing or not known:
        findings.append(
            f"weights: {missing} of the worker's {len(answer.tensors)} tensors have no namesake in the trainer; not compared"
        )
    return findings


# Where


def _result(
    layout: str, rollouts: Rollouts, values: Sequence[np.ndarray], thresholds: Thresholds, tokenizer: Any
) -> LayoutResult:
    ours, theirs = np.concatenate(rollouts.logprobs), _generated(rollouts, values)
    metrics = mismatch(ours, theirs)
    tokens = np.concatenate(rollouts.tokens)
    sequence = np.repeat(np.arange(len(rollouts)), [len(s) for s in rollouts])
    starts = [len(rollouts.prompts[s.prompt_index]) for s in rollouts]
    positions = np.concatenate([start + np.arange(len(s)) for start, s in zip(starts, rollouts, strict=True)])
    differences = np.abs(theirs.astype(np.float64) - ours)
    differences[same_bits(ours, theirs)] = 0.0
    differences[np.isnan(differences)] = np.inf

    edges = [0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 1 << 62]
    bands = [
        (f"{low}-{high - 1}" if high < 1 << 62 else f"{low}-", (positions >= low) & (positions < high))
        for low, high in zip(edges, edges[1:], strict=False)
    ]
    kinds = np.array([token_type(int(t), tokenizer) for t in tokens])
    types = [(str(kind), kinds == kind) for kind in sorted(set(kinds.tolist()))]

    def rows(groups: list[tuple[str, np.ndarray]]) -> list[tuple[str, int, float, float]]:
        return [
            (name, int(m.sum()), float(differences[m].mean()), float(differences[m].max()))
            for name, m in groups
            if m.any()
        ]

    worst = []
    for at in np.argsort(-differences, kind="stable")[:10]:
        if differences[at] == 0:
            break
        before = rollouts.sequences[sequence[at]][max(0, positions[at] - 12) : positions[at]].tolist()
        context = tokenizer.decode(before) if tokenizer is not None else " ".join(map(str, before))
        worst.append(
            Worst(int(sequence[at]), int(positions[at]), int(tokens[at]), float(ours[at]), float(theirs[at]), context)
        )
    return LayoutResult(
        layout, metrics, thresholds.broken(metrics), rows(bands), rows(types), worst, differences, positions
    )


def token_type(token: int, tokenizer: Any) -> str:
    """special, space, number, word (begins with a space), piece, punctuation; "token" without a tokenizer."""
    if tokenizer is None:
        return "token"
    text = tokenizer.decode([token], skip_special_tokens=True)
    if not text:
        return "special"
    core = text.strip()
    if not core:
        return "space"
    if core.isdigit():
        return "number"
    if core.isalpha():
        return "word" if text[0].isspace() else "piece"
    return "punctuation" if not any(c.isalnum() for c in core) else "mixed"
