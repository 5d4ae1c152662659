"""lockstep.trainer: log-probabilities and their gradient; what align() finds."""

import types

import pytest
import torch
import transformers

from lockstep import trainer


def reference(logits, tokens, temperature):
    return torch.log_softmax(logits.float() / temperature, -1).gather(-1, tokens[..., None])[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradient(dtype, temperature, monkeypatch):
    monkeypatch.setattr(trainer, "_ROWS", 7)  # several blocks, the last one short
    torch.manual_seed(0)
    logits = (torch.randn(2, 10, 33) * 4).to(dtype).requires_grad_()
    tokens, weights = torch.randint(0, 33, (2, 10)), torch.randn(2, 10)
    got = trainer.logprobs(logits, tokens, temperature)
    assert got.dtype == torch.float32 and torch.equal(got, reference(logits, tokens, temperature))
    (ours,) = torch.autograd.grad((got * weights).sum(), logits)
    (theirs,) = torch.autograd.grad((reference(logits, tokens, temperature) * weights).sum(), logits)
    # fp32 throughout, one rounding to the logits' dtype at the end: at most an ulp of it apart, of values around 1.
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=2e-7)


def test_gradient_by_differences():
    torch.manual_seed(1)
    logits = torch.randn(3, 6, requires_grad=True)
    tokens = torch.tensor([0, 5, 2])
    for temperature in (1.0, 0.5):
        trainer.logprobs(logits, tokens, temperature).sum().backward()
        for row, column in ((0, 0), (1, 2), (2, 5)):
            step = torch.zeros(3, 6)
            step[row, column] = 1e-2
            up, down = (reference((logits + s).double(), tokens, temperature).sum() for s in (step, -step))
            assert abs((up - down) / 2e-2 - logits.grad[row, column]) < 2e-3
        logits.grad = None


def test_no_fp32_copy_is_kept():
    logits = torch.randn(64, 512).bfloat16().requires_grad_()
    result = trainer.logprobs(logits, torch.zeros(64, dtype=torch.long))
    saved = [t for t in result.grad_fn.next_functions[0][0].saved_tensors]
    assert {t.dtype for t in saved} == {torch.bfloat16, torch.int64}
    assert saved[0].data_ptr() == logits.data_ptr()


def test_greedy_counts_as_one_and_wrong_arguments():
    logits, tokens = torch.randn(3, 5), torch.tensor([1, 2, 3])
    assert torch.equal(trainer.logprobs(logits, tokens, 0.0), trainer.logprobs(logits, tokens))
    for bad in (
        (logits, tokens[:2], 1.0),
        (logits.double(), tokens, 1.0),
        (logits, tokens.float(), 1.0),
        (logits, tokens, -1),
    ):
        with pytest.raises(ValueError, match="want"):
            trainer.logprobs(*bad)


def info(**numerics):
    fields = dict(profile="hf-torch", weights_dtype="bfloat16", conv_casts="two") | numerics
    return types.SimpleNamespace(numerics=types.SimpleNamespace(**fields))


@pytest.fixture(scope="module")
def model(tiny_model):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()


def texts(model, worker):
    return [f"{f.level}: {f.what}" for f in trainer.align(model, worker).findings]


def test_align_of_a_matching_model(model):
    report = trainer.align(model, info())
    assert report.ok and [f.what for f in report.findings] == ["recurrent layers"], str(report)
    blas = [text for text in report.settings if "torch.backends" in text]
    assert bool(blas) == torch.cuda.is_available()


def test_align_finds_what_it_cannot_set(model, tiny_model):
    assert any("GPU trainer's arithmetic" in t for t in texts(model, info(profile="hf")))
    assert any("matrices are bfloat16" in t for t in texts(model, info(weights_dtype="float32")))
    with torch.autocast("cpu", torch.bfloat16):
        assert "wrong: autocast is on" in texts(model, info())
    assert "wrong: the model is compiled" in texts(torch.compile(model), info())
    eager = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto", attn_implementation="eager")
    assert any("attn_implementation is 'eager'" in t for t in texts(eager, info()))


@pytest.fixture
def setup(monkeypatch):
    """setup(dtype=torch.bfloat16, cudnn=True) -> an Olmo 3 model that counts as one on a GPU."""
    monkeypatch.setattr(trainer, "_on_gpu", lambda model: True)

    def make(dtype=torch.bfloat16, cudnn=True):
        monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: cudnn)
        config = transformers.Olmo3Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            sliding_window=48,
            pad_token_id=0,
            attn_implementation="sdpa",
            layer_types=["sliding_attention", "full_attention"],
        )
        return transformers.Olmo3ForCausalLM(config).to(dtype).eval()

    return make


def wrong(model, profile):
    return [t for t in texts(model, info(profile=profile)) if t.startswith("wrong")]


PROFILES = {  # the trainer's dtype, whether autocast is on, whether SDPA may take cuDNN
    "hf": (torch.bfloat16, False, True),
    "hf-masked": (torch.bfloat16, False, True),
    "hf-flash": (torch.bfloat16, False, False),
    "hf-autocast": (torch.float32, True, True),
    "hf-autocast-masked": (torch.float32, True, True),
}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_setup_of_each_gpu_profile(setup, profile):
    """The right one is called right, and each that differs in one thing wrong. (The worker's matrices are bf16 in all.)"""
    dtype, autocast, cudnn = PROFILES[profile]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert wrong(setup(dtype, cudnn), profile) == []
        other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
        (found,) = wrong(setup(other, cudnn), profile)
        assert "matrices are" in found
        (found,) = wrong(setup(dtype, not cudnn), profile)
        assert "cuDNN" in found and profile in found
    with torch.autocast("cpu", torch.bfloat16, enabled=not autocast):
        found = [t for t in texts(setup(dtype, cudnn), info(profile=profile)) if "autocast is o" in t]
        assert found == (
            [f"check: autocast is off here, profile {profile} follows it"] if autocast else ["wrong: autocast is on"]
        )
    if autocast:
        with torch.autocast("cpu", torch.float16):
            (found,) = wrong(setup(dtype, cudnn), profile)
            assert "autocast casts to torch.float16" in found


@pytest.mark.parametrize("profile", [*PROFILES, "hf-torch", "fp32"])
def test_the_window_is_told_by_profile(setup, profile):
    report = trainer.align(setup(), info(profile=profile))
    (finding,) = [f for f in report.findings if f.what.startswith("sliding layers")]
    assert finding.level == "check"
    masked = profile.endswith("-masked")
    if profile in PROFILES:
        assert profile in finding.what
        assert ("48 tokens or more" if masked else "shorter than 48 tokens") in finding.what
        other = (
            profile.removesuffix("-masked") if masked else "hf-masked" if profile == "hf-flash" else f"{profile}-masked"
        )
        assert finding.change.endswith(f"--numerics {other}")
    else:
        assert "hf-masked of the others" in finding.change


@pytest.mark.parametrize("profile", ["hf-torch", "fp32", "olmo-core"])
def test_other_profiles_are_not_a_gpu_trainers(setup, profile):
    (found,) = wrong(setup(), profile)
    assert f"the worker's profile is {profile}, the model is on a GPU" in found


@pytest.mark.parametrize("profile", PROFILES)
def test_gpu_profiles_want_a_gpu(model, profile):
    assert any("the model is on a CPU" in t for t in texts(model, info(profile=profile)))


def test_misaligned():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    assert trainer.misaligned(model) == []
    model[1].weight.data = torch.zeros(65)[1:].view(8, 8)
    assert trainer.misaligned(model) == ["1.weight"]
