"""How far rollout and trainer are apart, under the names that learners log. numpy alone."""

from __future__ import annotations

import numpy as np


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """bool [...]: whether fp32 values are equal in bits (-0 and 0 differ; a NaN equals itself)."""
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    return a.view(np.int32) == b.view(np.int32)


def mismatch(rollout: np.ndarray, trainer: np.ndarray) -> dict[str, float]:
    """Of log-probabilities of the same N tokens, fp32 [N]. r = exp(trainer - rollout) is the importance ratio.

    vllm_vs_local_logprob_diff_{mean,max,std}   |trainer - rollout| (open-instruct's names)
    vllm_local_reverse_kl                       mean of rollout - trainer: KL(rollout || trainer), from its samples
    k3_kl                                       mean of r - 1 - log r, the same with less variance
    token_mult_prob_error                       mean of exp(|trainer - rollout|) (NeMo-RL)
    rollout_probs_diff_{mean,max,std}           |probability - probability| (verl)
    rollout_actor_probs_pearson_corr            of the probabilities; 1 where both are constant and equal
    effective_sample_size                       (sum r)^2 / (N sum r^2): the share of samples that importance weights leave
    bit_equal                                   the share of tokens equal in bits

    A NaN on one side makes the numbers infinite, not the check pass. Raises ValueError for other shapes or no tokens.
    """
    if rollout.shape != trainer.shape or rollout.ndim != 1 or not rollout.size:
        raise ValueError(f"mismatch: {rollout.shape} against {trainer.shape}, want the same [N], N > 0")
    equal = same_bits(rollout, trainer)
    a, b = rollout.astype(np.float64), trainer.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        bad = {name: float("inf") for name in NAMES}
        return bad | {
            "bit_equal": float(equal.mean()),
            "effective_sample_size": 0.0,
            "rollout_actor_probs_pearson_corr": 0.0,
            "tokens": a.size,
        }
    difference = np.abs(b - a)
    log_ratio = b - a
    ratio = np.exp(np.clip(log_ratio, -700, 700))
    p, q = np.exp(a), np.exp(b)
    spread = p.std() * q.std()
    correlation = (
        float(((p - p.mean()) * (q - q.mean())).mean() / spread) if spread > 0 else float(np.array_equal(p, q))
    )
    values = (
        difference.mean(),
        difference.max(),
        difference.std(),
        (a - b).mean(),
        (ratio - 1 - log_ratio).mean(),
        np.exp(np.minimum(difference, 700)).mean(),
        np.abs(p - q).mean(),
        np.abs(p - q).max(),
        np.abs(p - q).std(),
        correlation,
        (ratio / ratio.max()).sum() ** 2 / (a.size * ((ratio / ratio.max()) ** 2).sum()),
        equal.mean(),
    )
    return {name: float(value) for name, value in zip(NAMES, values, strict=True)} | {"tokens": a.size}


NAMES = (
    "vllm_vs_local_logprob_diff_mean",
    "vllm_vs_local_logprob_diff_max",
    "vllm_vs_local_logprob_diff_std",
    "vllm_local_reverse_kl",
    "k3_kl",
    "token_mult_prob_error",
    "rollout_probs_diff_mean",
    "rollout_probs_diff_max",
    "rollout_probs_diff_std",
    "rollout_actor_probs_pearson_corr",
    "effective_sample_size",
    "bit_equal",
)
