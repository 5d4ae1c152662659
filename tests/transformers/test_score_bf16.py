"""Score under --numerics hf-torch against transformers in bf16 (its PyTorch programs, on a CPU): closer by half than
transformers' bf16 is to its own fp32.

The weights are the same bf16 values in all three. In bf16 two programs that round in the same places still differ where
their sums are taken in another order and a rounding flips; what bf16 itself costs is the scale to measure that by.
"""

import configs
import pytest
import torch
from scoring import score_all
from transformers import OlmoHybridForCausalLM

LENGTHS = [2, 63, 64, 65, 128, 129, 300, 700]


def compare(worker, reference_bf16, reference_fp32, sequences, name):
    bf16 = torch.cat(configs.reference_logprobs(reference_bf16, sequences))
    fp32 = torch.cat(configs.reference_logprobs(reference_fp32, sequences))
    lockstep = torch.cat(score_all(worker, sequences))
    mismatch = (lockstep - bf16).abs()
    own = (bf16 - fp32).abs()
    print(
        f"{name}: {len(bf16)} positions; Lockstep to transformers bf16: mean {mismatch.mean():.5f}, "
        f"max {mismatch.max():.4f}; transformers bf16 to fp32: mean {own.mean():.5f}, max {own.max():.4f}; "
        f"ratio {mismatch.mean() / own.mean():.3f}"
    )
    assert own.mean() > 1e-4, "transformers' bf16 and fp32 hardly differ: there is no scale to measure by"
    assert mismatch.mean() <= 0.5 * own.mean()


@pytest.mark.parametrize("checkpoint", configs.CHECKPOINTS, ids=lambda c: c.name)
def test_random_checkpoint(checkpoint, start_worker, tmp_path):
    directory = tmp_path / checkpoint.name
    # Stored in bf16 whatever the checkpoint's own dtype: a worker keeps A_log and dt_bias as stored, transformers
    # rounds them to the dtype it loads.
    configs.write(checkpoint, directory, dtype=torch.bfloat16)
    worker = start_worker(directory, "--numerics", "hf-torch")
    compare(
        worker,
        configs.load_reference(checkpoint, directory, torch.bfloat16),
        configs.load_reference(checkpoint, directory, torch.float32),
        configs.random_sequences(checkpoint.config["vocab_size"], LENGTHS, seed=1),
        checkpoint.name,
    )
    worker.stop()


def test_tiny_checkpoint(start_worker, tiny_model):
    bf16 = OlmoHybridForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    fp32 = OlmoHybridForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    worker = start_worker(tiny_model, "--numerics", "hf-torch")
    compare(worker, bf16, fp32, configs.random_sequences(bf16.config.vocab_size, LENGTHS, seed=2), "tiny")
