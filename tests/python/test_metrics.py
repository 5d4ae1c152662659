"""lockstep.metrics: hand-computed values."""

import numpy as np
import pytest

from lockstep.metrics import NAMES, mismatch


def test_equal():
    a = np.log(np.array([0.5, 0.25, 0.1], np.float32))
    m = mismatch(a, a.copy())
    assert m["bit_equal"] == 1 and m["vllm_vs_local_logprob_diff_max"] == 0 and m["k3_kl"] == 0
    assert m["effective_sample_size"] == pytest.approx(1) and m["token_mult_prob_error"] == 1
    assert m["rollout_actor_probs_pearson_corr"] == pytest.approx(1) and m["tokens"] == 3 and set(NAMES) < set(m)


def test_by_hand():
    p, q = np.array([0.5, 0.4]), np.array([0.25, 0.8])
    m = mismatch(np.log(p).astype(np.float32), np.log(q).astype(np.float32))
    ln2 = np.log(2)
    want = {
        "vllm_vs_local_logprob_diff_mean": ln2,
        "vllm_vs_local_logprob_diff_std": 0,
        "vllm_local_reverse_kl": 0,
        "k3_kl": (0.5 + 2 - 2) / 2,
        "token_mult_prob_error": 2,
        "rollout_probs_diff_mean": 0.325,
        "rollout_probs_diff_max": 0.4,
        "rollout_probs_diff_std": 0.075,
        "rollout_actor_probs_pearson_corr": -1,
        "effective_sample_size": 2.5**2 / (2 * 4.25),
        "bit_equal": 0,
    }
    for name, value in want.items():
        assert m[name] == pytest.approx(value, abs=1e-6), name


def test_one_ulp_is_not_equal_and_nan_does_not_pass():
    a = np.full(4, -1.0, np.float32)
    b = a.copy()
    b[2] = np.nextafter(b[2], np.float32(0))
    assert mismatch(a, b)["bit_equal"] == 0.75
    b[2] = np.nan
    assert mismatch(a, b)["vllm_vs_local_logprob_diff_mean"] == np.inf
    with pytest.raises(ValueError, match="want the same"):
        mismatch(a, b[:2])
