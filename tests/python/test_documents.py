"""align()'s packed and padded batches: every document as if it were alone, forward and backward."""

import copy

import numpy as np
import pytest
import torch
import transformers

from lockstep import _documents, trainer
from lockstep.hf import TransformersTrainer

LENGTHS = (70, 33, 130, 64, 5, 1)
# fp32 on a CPU, whose matrix products depend on the batch's shape; leaks and shifted chunks are above 1e-2.
CLOSE = dict(rtol=0, atol=1e-4)


def olmo3():
    config = transformers.Olmo3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=48,
        pad_token_id=0,
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
        attn_implementation="sdpa",
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    )
    torch.manual_seed(0)
    model = transformers.Olmo3ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that logits differ between tokens
    return model


@pytest.fixture(params=["olmo_hybrid", "olmo3"])
def model(request, tiny_model):
    if request.param == "olmo3":
        return olmo3()
    return TransformersTrainer(tiny_model, device="cpu", dtype="float32").model


def sequences(model):
    generator = np.random.default_rng(0)
    return [generator.integers(2, model.config.vocab_size, n) for n in LENGTHS]


def largest(trained, layout, wanted):
    values = [v for _, v in getattr(trained, layout)(sequences(trained.model))]
    return max(float(np.abs(v - w).max(initial=0)) for v, w in zip(values, wanted, strict=True))


def test_layouts_are_the_sequences_alone(model):
    trained = TransformersTrainer(model)
    alone = [trained(s) for s in sequences(model)]
    if model.config.model_type == "olmo_hybrid":
        assert largest(trained, "packed", alone) > 1, "stock: state leaks"
    report = trainer.align(model)
    assert "packed and padded batches: every document as if it were alone" in report.settings
    assert trainer.align(model).ok and type(model).__mro__.count(type(model)) == 1, "once is enough"
    for layout in ("packed", "left_padded"):
        assert largest(trained, layout, alone) < CLOSE["atol"], layout
    kept = copy.deepcopy(model)
    trainer.unalign(model)
    assert not _documents.installed(model) and _documents.installed(kept)
    assert type(model) is getattr(transformers, type(model).__name__)
    assert largest(TransformersTrainer(kept), "packed", alone) < CLOSE["atol"]


def test_padding_is_stripped():
    mask = torch.nn.functional.pad(torch.ones(1, 70, dtype=torch.long), (7, 0))
    row = _documents._row_of((1, 77), torch.device("cpu"), mask, None, None, 0)
    assert row.documents.lengths == (70,) and row.where.tolist() == list(range(7, 77))
    assert row.documents.positions.tolist() == [list(range(70))]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", ["packed", "left", "right"])
def test_gradients_are_those_of_the_sequences_alone(model, layout):
    documents = [torch.from_numpy(s) for s in sequences(model) if len(s) > 1]

    def loss(logits, ids):
        return trainer.logprobs(logits[:-1], ids[1:]).sum()

    stock = gradients(model, sum(loss(model(input_ids=d[None], use_cache=False).logits[0], d) for d in documents))
    trainer.align(model)
    if layout == "packed":
        positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
        logits = model(input_ids=torch.cat(documents)[None], position_ids=positions).logits[0]
        total = sum(loss(part, d) for part, d in zip(logits.split([len(d) for d in documents]), documents, strict=True))
    else:
        longest = max(len(d) for d in documents)
        pads = [(longest - len(d), 0) if layout == "left" else (0, longest - len(d)) for d in documents]
        pad = torch.nn.functional.pad
        ids = torch.stack([pad(d, p) for d, p in zip(documents, pads, strict=True)])
        mask = torch.stack([pad(torch.ones_like(d), p) for d, p in zip(documents, pads, strict=True)])
        logits = model(input_ids=ids, attention_mask=mask).logits
        total = sum(loss(row[m.bool()], d) for row, m, d in zip(logits, mask, documents, strict=True))
    for name, gradient in gradients(model, total).items():
        scale = stock[name].abs().max().clamp(min=1e-6)
        assert (gradient - stock[name]).abs().max() < 1e-4 * scale, name


def test_convolution_across_a_boundary_is_the_zeros_of_a_beginning(tiny_model):
    model = TransformersTrainer(tiny_model, device="cpu", dtype="float32").model
    trainer.align(model)
    modeling = __import__(type(model).__module__, fromlist=["causal_conv1d_fn"])
    torch.manual_seed(0)
    states, weight = torch.randn(1, 9, 40).transpose(1, 2), torch.randn(40, 4)
    documents = _documents.Documents.of([1, 2, 6], torch.device("cpu"))
    apart = modeling.causal_conv1d_fn(states, weight, activation="silu", documents=documents)
    alone = [modeling.causal_conv1d_fn(s, weight, activation="silu") for s in states.split((1, 2, 6), 2)]
    torch.testing.assert_close(apart, torch.cat(alone, 2), rtol=1e-6, atol=1e-6)


def test_what_a_batch_is():
    def row(mask=None, positions=None, boundaries=None, shape=(2, 4), window=0):
        tensor = lambda value: None if value is None else torch.tensor(value)  # noqa: E731
        found = _documents._row_of(
            shape, torch.device("cpu"), tensor(mask), tensor(positions), tensor(boundaries), window
        )
        return found if isinstance(found, str) else found.documents.lengths

    ones, right, left = [1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]
    assert row() == row([ones, ones]) == row(positions=[[0, 1, 2, 3]]) == "stock"
    assert row([ones, right]) == row([ones, right], [[0, 1, 2, 3], [0, 1, 1, 1]]) == "unmasked"
    assert row([ones, right], window=5) == "unmasked" and row([ones, right], window=4) == (4, 2)
    assert row([ones, left]) == row([ones, left], [[0, 1, 2, 3], [1, 0, 1, 2]]) == (4, 3)
    assert row(positions=[[0, 1, 0, 1], [0, 1, 2, 3]]) == (2, 2, 4)
    assert row([ones, [1, 1, 1, 0]], [[0, 1, 0, 1], [0, 0, 1, 5]]) == (2, 2, 1, 2)
    assert row(boundaries=[0, 1, 4], shape=(1, 4)) == (1, 3)
    for bad in (
        {"boundaries": [0, 4]},
        {"boundaries": [0, 3], "shape": (1, 4)},
        {"boundaries": [0, 4, 4], "shape": (1, 4)},
    ):
        with pytest.raises(ValueError, match="want"):
            row(**bad)
    with pytest.raises(ValueError, match="padding"):
        row([left], boundaries=[0, 4], shape=(1, 4))


def test_labels_logits_to_keep_and_caches(model):
    ids = torch.randint(2, 100, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    trainer.align(model)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits
        assert whole.shape[:2] == (2, 12) and not whole[0, :5].any() and whole[0, 5:].any()
        some = model(input_ids=ids, attention_mask=mask, logits_to_keep=9).logits
        torch.testing.assert_close(some, whole[:, -9:], **CLOSE)
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, 5] = -100  # a padding token predicts nothing
        want = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask, labels=labels).loss, want)
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(input_ids=ids, attention_mask=mask, logits_to_keep=torch.tensor([1]))
        assert model(input_ids=ids, use_cache=True).past_key_values is not None
        trained = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        trainer.unalign(model)
        assert torch.equal(trained, model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False))


def test_the_loss_takes_what_a_trainer_passes(model):
    """A padded batch's loss over num_items_in_batch is the sum of its documents' own."""
    ids = torch.randint(2, 100, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 5] = -100  # a padding token predicts nothing
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    items = torch.tensor(37)
    with torch.no_grad():
        alone = [
            model(input_ids=row[None], labels=row[None], num_items_in_batch=items).loss for row in (ids[0, 5:], ids[1])
        ]
        trainer.align(model)
        output = model(**batch, num_items_in_batch=items)
        torch.testing.assert_close(output.loss, sum(alone), **CLOSE)
        assert output["loss"] is output[0] is output.loss and output[1] is output.logits
        following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        shifted = model(**batch | {"labels": ids}, shift_labels=following, num_items_in_batch=items).loss
        assert torch.equal(shifted, output.loss)
        loss, logits = model(**batch, num_items_in_batch=items, return_dict=False)
        assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)


def test_models_it_does_not_know(tiny_model):
    other = torch.nn.Linear(4, 4)
    report = trainer.align(other)
    assert any("computed as the model does it" in f.what for f in report.findings) and not _documents.installed(other)
    eager = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto", attn_implementation="eager")
    trainer.align(eager)
    assert not _documents.installed(eager)


def test_transformers_without_a_function_to_replace(tiny_model, monkeypatch):
    model = TransformersTrainer(tiny_model, device="cpu", dtype="float32").model
    monkeypatch.delattr(f"{type(model).__module__}.causal_conv1d_fn")
    assert not _documents.supports(model)
