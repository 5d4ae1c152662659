"""Score under --numerics hf-torch against transformers in bf16 (its PyTorch programs, on a CPU). The weights are the
same bf16 values everywhere.

PyTorch's libraries choose the order of a sum by the processor. hf-torch has the orders of AMD's with AVX512-BF16, and
there most outputs of every operation have PyTorch's bits; what is left is a nearest value missed by one of two
exponentials, and the last keys of a sequence, which PyTorch's attention treats by the sequence's length. With `own` =
|transformers bf16 - transformers fp32|, means over the tokens:

  - Lockstep to transformers bf16: at most half of `own`;
  - Lockstep to transformers fp32: at most 1.15 times `own`: no less accurate than transformers is.

A rounding that flips grows through the layers to a good part of what bf16 itself costs: transformers with nothing
changed but the order of its sums (linear layers in fp32, Gated DeltaNet in chunks of 32 instead of 64) lies 0.2 to 0.8
of `own` from itself. That control is measured beside. On a CPU whose linear layers or triangular solves (Gated
DeltaNet's, by oneMKL: Intel's have an order of their own) do not give the bits of tests/data/torch_cpu, Lockstep may be
1.25 times as far as it.
"""

import contextlib
import functools
import pathlib

import configs
import pytest
import torch
from scoring import score_all
from transformers import OlmoHybridForCausalLM
from transformers.models.olmo_hybrid import modeling_olmo_hybrid

TORCH_CPU = pathlib.Path(__file__).resolve().parents[1] / "data" / "torch_cpu"  # tools/make_torch_cpu_fixture.py

LENGTHS = [2, 63, 64, 65, 128, 129, 300, 700]


def fixture(name):
    return torch.from_file(str(TORCH_CPU / name), size=(TORCH_CPU / name).stat().st_size // 2, dtype=torch.bfloat16)


@functools.cache
def orders_that_differ():
    """The operations whose order of sums on this CPU is not that of the fixtures, so not hf-torch's."""
    differ = []
    for k in (97, 600, 1100):
        x, weight, y = (fixture(f"linear{k}_{part}.bf16") for part in "xwy")
        if not torch.equal(torch.nn.functional.linear(x.view(1, 3, k), weight.view(7, k)).flatten(), y):
            differ.append(f"linear, {k} inputs")
    qkv = fixture("gdn_qkv.bf16").view(1, 130, -1)
    q, k, v = (x.unflatten(-1, (2, -1)) for x in qkv.split((48, 48, 80), dim=-1))
    beta = fixture("gdn_beta.bf16").view(1, 130, 2)
    # Without decay, so that the exponential has no part in it: products and solves.
    y, _ = modeling_olmo_hybrid.torch_chunk_gated_delta_rule(
        q, k, v, g=torch.zeros(1, 130, 2), beta=beta, use_qk_l2norm_in_kernel=True
    )
    if not torch.equal(y.flatten(), fixture("gdn_still_y.bf16")):
        differ.append("Gated DeltaNet")
    return differ


@contextlib.contextmanager
def reordered_sums():
    """Within it, bf16 linear layers multiply in fp32 and round once, and Gated DeltaNet runs in chunks of 32: the same
    casts, sums in another order.
    """
    linear = torch.nn.functional.linear
    chunk = modeling_olmo_hybrid.torch_chunk_gated_delta_rule

    def in_fp32(x, weight, bias=None):
        if x.dtype != torch.bfloat16:
            return linear(x, weight, bias)
        return linear(x.float(), weight.float()).to(x.dtype)

    torch.nn.functional.linear = in_fp32
    modeling_olmo_hybrid.torch_chunk_gated_delta_rule = functools.partial(chunk, chunk_size=32)
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
        modeling_olmo_hybrid.torch_chunk_gated_delta_rule = chunk


def compare(worker, reference_bf16, reference_fp32, sequences, name):
    bf16 = torch.cat(configs.reference_logprobs(reference_bf16, sequences))
    with reordered_sums():
        reordered = torch.cat(configs.reference_logprobs(reference_bf16, sequences))
    fp32 = torch.cat(configs.reference_logprobs(reference_fp32, sequences))
    lockstep = torch.cat(score_all(worker, sequences))

    def mean(a, b):
        return float((a - b).abs().mean())

    own, mismatch, itself, error = mean(bf16, fp32), mean(lockstep, bf16), mean(reordered, bf16), mean(lockstep, fp32)
    same = float((lockstep == bf16).float().mean())
    print(
        f"{name}: {len(bf16)} positions, {100 * same:.1f}% equal; mean |d logprob|: transformers bf16 to fp32 {own:.5f}; "
        f"Lockstep to transformers bf16 {mismatch:.5f} (ratio {mismatch / own:.3f}); transformers bf16 to itself "
        f"reordered {itself:.5f} (ratio {itself / own:.3f}); Lockstep to fp32 {error:.5f} (ratio {error / own:.3f})"
    )
    assert own > 1e-4, "transformers' bf16 and fp32 hardly differ: there is no scale to measure by"
    assert itself > 0, "the reordered sums changed nothing: the comparison lost its point"
    differ = orders_that_differ()
    if differ:
        print(f"  on this CPU PyTorch has another order of sums than hf-torch: {', '.join(differ)}")
    assert mismatch <= (max(0.5 * own, 1.25 * itself) if differ else 0.5 * own)
    assert error <= 1.15 * own


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
