"""Score under --numerics fp32 against transformers in fp32: one random checkpoint for each branch of the models, and
the tiny checkpoint.
"""

import configs
import pytest
import torch
from scoring import generate, score_all
from transformers import OlmoHybridForCausalLM
from transformers.models.olmo_hybrid import modeling_olmo_hybrid

TOLERANCE = 2e-5
# 64 is the recurrent layers' chunk; 128 attention's tile; 700 crosses both and every worker's prefill pieces.
LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 300, 700]


def compare(worker, reference, sequences, name):
    expected = configs.reference_logprobs(reference, sequences)
    got = score_all(worker, sequences)
    worst = 0.0
    for tokens, want, have in zip(sequences, expected, got):
        assert have.shape == want.shape
        if len(tokens) < 2:
            continue
        difference = (have - want).abs()
        position = int(difference.argmax())
        worst = max(worst, float(difference[position]))
        # Written so that a NaN fails.
        assert float(difference[position]) <= TOLERANCE, (
            f"{name}, {len(tokens)} tokens: at position {position + 1} Lockstep has {have[position]}, "
            f"transformers {want[position]}; they differ by {difference[position]:.2e}, want at most {TOLERANCE:.0e}"
        )
    print(f"{name}: max |difference| {worst:.2e} over {sum(len(e) for e in expected)} positions")


@pytest.mark.parametrize("checkpoint", configs.CHECKPOINTS, ids=lambda c: c.name)
def test_random_checkpoint(checkpoint, start_worker, tmp_path):
    configs.write(checkpoint, tmp_path / checkpoint.name)
    reference = configs.load_reference(checkpoint, tmp_path / checkpoint.name, torch.float32)
    sequences = configs.random_sequences(checkpoint.config["vocab_size"], LENGTHS, seed=1)
    worker = start_worker(tmp_path / checkpoint.name, "--numerics", "fp32")
    compare(worker, reference, sequences, checkpoint.name)
    worker.stop()


def recurrence_fp64(query, key, value, g, beta, **unused):
    """Gated DeltaNet by its definition, token by token, in fp64. Shapes as torch_chunk_gated_delta_rule's."""
    query, key, value, g, beta = (x.double() for x in (query, key, value, g, beta))
    query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    state = torch.zeros(*key.shape[0:1], *key.shape[2:], value.shape[-1], dtype=torch.float64)
    rows = []
    for t in range(key.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        missing = value[:, t] - (state * key[:, t].unsqueeze(-1)).sum(-2)
        state = state + key[:, t].unsqueeze(-1) * (missing * beta[:, t].unsqueeze(-1)).unsqueeze(-2)
        rows.append((state * query[:, t].unsqueeze(-1)).sum(-2) * key.shape[-1] ** -0.5)
    return torch.stack(rows, 1), None


def test_tiny_checkpoint(start_worker, tiny_model, monkeypatch):
    """On sequences drawn from the model itself, as a learner's are, and not only against transformers in fp32 but also
    against the same model in fp64: trained weights amplify roundings more than the random ones above, and at single
    positions transformers' own fp32 is off by more than the tolerance. There Lockstep has to be right, not to share it.
    """
    worker = start_worker(tiny_model, "--numerics", "fp32")
    sequences = []
    for length in LENGTHS[1:]:
        first = 37 + length % 64
        drawn = generate(worker, [first], length - 1, temperature=1, seed=length, ignore_eos=True)[0]
        sequences.append([first, *drawn])
    assert [len(tokens) for tokens in sequences] == LENGTHS[1:]

    lockstep = torch.cat(score_all(worker, sequences)).double()
    fp32 = OlmoHybridForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    peer = torch.cat(configs.reference_logprobs(fp32, sequences)).double()
    fp64 = OlmoHybridForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    monkeypatch.setattr(modeling_olmo_hybrid, "torch_chunk_gated_delta_rule", recurrence_fp64)
    exact = torch.cat(configs.reference_logprobs(fp64, sequences)).double()

    difference, error, peer_error = (lockstep - peer).abs(), (lockstep - exact).abs(), (peer - exact).abs()
    apart = int((difference > TOLERANCE).sum())
    print(
        f"tiny: {len(peer)} positions; max |difference| to transformers fp32 {difference.max():.2e} ({apart} positions "
        f"over {TOLERANCE:.0e}); to fp64 {error.max():.2e}, where transformers fp32 is up to {peer_error.max():.2e} from it"
    )
    assert error.max() <= TOLERANCE
    assert apart <= len(peer) // 500
    assert (peer_error[difference > TOLERANCE] > 0.5 * TOLERANCE).all(), "Lockstep is what differs"


def test_references_differ(tmp_path):
    """The comparison can tell the branches apart: changing any one of these fields moves transformers' own
    log-probabilities by far more than the tolerance.
    """
    base = next(c for c in configs.CHECKPOINTS if c.name == "rope_yarn_gqa")
    hybrid = base.config
    variants = {
        "rope_theta": hybrid | {"rope_parameters": hybrid["rope_parameters"] | {"rope_theta": 40000.0}},
        "yarn factor": hybrid | {"rope_parameters": hybrid["rope_parameters"] | {"factor": 3.0}},
        "yarn beta_fast": hybrid | {"rope_parameters": hybrid["rope_parameters"] | {"beta_fast": 8.0}},
        "no rope": hybrid | {"rope_parameters": dict(configs.NOPE)},
        "linear_allow_neg_eigval": hybrid | {"linear_allow_neg_eigval": False},
        "rms_norm_eps": hybrid | {"rms_norm_eps": 1e-2},
    }
    sequences = configs.random_sequences(hybrid["vocab_size"], [300], seed=1)
    configs.write(base, tmp_path / "base")
    (expected,) = configs.reference_logprobs(configs.load_reference(base, tmp_path / "base", torch.float32), sequences)
    for name, fields in variants.items():
        variant = configs.Checkpoint(name, fields)
        directory = tmp_path / name.replace(" ", "_")
        configs.write(variant, directory)
        (other,) = configs.reference_logprobs(configs.load_reference(variant, directory, torch.float32), sequences)
        assert (other - expected).abs().max() > 50 * TOLERANCE, name
