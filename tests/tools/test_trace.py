import numpy
import pytest
import torch
import trace_compare
import trace_format
import trace_torch
from transformers import Olmo3Config, Olmo3ForCausalLM, OlmoHybridConfig, OlmoHybridForCausalLM

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    eos_token_id=0,
    pad_token_id=None,
)


def hybrid(dtype=torch.bfloat16, **fields):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": None}
    config = OlmoHybridConfig(**SIZES | {"rope_parameters": rope} | fields)
    return OlmoHybridForCausalLM._from_config(config, attn_implementation="sdpa").to(dtype).eval()


def olmo3():
    torch.manual_seed(0)
    config = Olmo3Config(**SIZES)
    return Olmo3ForCausalLM._from_config(config, attn_implementation="sdpa").to(torch.bfloat16).eval()


TOKENS = [(7 * i + 3) % 64 for i in range(70)]


def write_and_read(directory, tensors):
    trace_format.write(directory, TOKENS, tensors, "test")
    return trace_format.read(directory)[2]


@pytest.mark.parametrize("make", [hybrid, olmo3])
def test_round_trip_in_the_documented_order(make, tmp_path):
    model = make()
    tensors = write_and_read(tmp_path, trace_torch.trace(model, TOKENS, [0, 63, 64, 69]))
    names = [(tensor.layer, tensor.name) for tensor in tensors]
    assert len(set(names)) == len(names)
    for layer in range(4):
        here = [name for number, name in names if number == layer]
        gdn = hasattr(model.model.layers[layer], "linear_attn")
        known = trace_format.GDN_LAYER if gdn else trace_format.ATTENTION_LAYER
        left_out = {"qk_l2"} if gdn else set() if make is olmo3 else {"rope_q", "rope_k"}
        assert here == [name for name in known if name not in left_out]
    assert names[0] == (-1, "embed") and names[-2:] == [(-1, "final_norm"), (-1, "logits")]

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0, [0, 63, 64, 69]]
    assert numpy.array_equal(tensors[-1].values(), logits.float().numpy())
    comparisons, remarks = trace_compare.compare_traces(tensors, tensors)
    assert len(comparisons) == len(tensors) and not remarks and not any(c.differing for c in comparisons)


def test_values_tie_up_with_each_other():
    """Each name holds what the documentation says: residuals, products and splits add up."""
    model = hybrid(torch.float32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8)
    found = {(t.layer, t.name): t for t in trace_torch.trace(model, TOKENS, [5, 69])}
    rows = {key: torch.from_numpy(tensor.values().copy()) for key, tensor in found.items()}
    gdn = model.model.layers[0].linear_attn
    assert torch.equal(rows[0, "residual_mid"], rows[-1, "embed"] + rows[0, "mixer_out"])
    assert torch.equal(rows[0, "residual"], rows[0, "residual_mid"] + rows[0, "mlp_out"])
    assert torch.equal(rows[3, "residual_mid"], rows[2, "residual"] + rows[3, "mixer_norm"])
    assert torch.equal(rows[3, "residual"], rows[3, "residual_mid"] + rows[3, "mlp_norm"])
    gate, up = rows[0, "gate_up"].chunk(2, 1)
    torch.testing.assert_close(rows[0, "swiglu"], torch.nn.functional.silu(gate) * up)
    a, b = rows[0, "ab"].chunk(2, 1)
    torch.testing.assert_close(rows[0, "beta"], b.sigmoid() * 2)
    torch.testing.assert_close(rows[0, "g"], -gdn.A_log.exp() * torch.nn.functional.softplus(a + gdn.dt_bias))
    assert found[0, "conv"].width == gdn.conv_dim and found[0, "conv"].parts == [["q", 16], ["k", 16], ["v", 64]]
    q = torch.nn.functional.linear(rows[0, "input_norm"], gdn.q_proj.weight)
    torch.testing.assert_close(rows[0, "qkv_g"][:, :16], q)


@pytest.mark.parametrize(
    "layer,parameter,operation",
    [
        (1, "linear_attn.k_proj", "qkv_g"),
        (2, "linear_attn.conv1d", "conv"),
        (2, "linear_attn.o_norm", "gated_norm"),
        (3, "self_attn.k_norm", "k_norm"),
        (3, "mlp.down_proj", "mlp_out"),
    ],
)
def test_names_the_changed_operation(layer, parameter, operation, tmp_path):
    positions = [0, 1, 40, 69]
    before = trace_torch.trace(hybrid(), TOKENS, positions)
    model = hybrid()
    with torch.no_grad():
        model.model.layers[layer].get_submodule(parameter).weight.mul_(1.25)
    after = write_and_read(tmp_path, trace_torch.trace(model, TOKENS, positions))
    comparisons, _ = trace_compare.compare_traces(before, after)
    lines = trace_compare.report(comparisons, [], limit=5)
    assert lines[-1].startswith(f"FIRST DIFFERENCE: layer {layer} {operation}, position 0 ")
    first = next(c for c in comparisons if c.differing)
    assert (first.layer, first.name) == (layer, operation) and first.max > 0
    if operation == "qkv_g":
        assert first.first[1].startswith("k[")


def test_names_the_row():
    model = hybrid()
    tensors = trace_torch.trace(model, TOKENS, [0, 10, 20])
    changed = [trace_format.Tensor(**{**vars(t), "rows": t.rows.copy()}) for t in tensors]
    beta = next(t for t in changed if (t.layer, t.name) == (1, "beta"))
    beta.rows[2, 1] ^= 1
    comparisons, _ = trace_compare.compare_traces(tensors, changed)
    (only,) = [c for c in comparisons if c.differing]
    assert (only.operation, only.differing, only.differing_rows, only.first[0]) == ("layer 1 beta", 1, 1, 20)


def test_negative_zero_and_nan_are_differences():
    def one(value):
        rows = numpy.array([[value]], numpy.float32)
        return [trace_format.Tensor(-1, "logits", "f32", [0], rows, [])]

    ((zero,), _) = trace_compare.compare_traces(one(0.0), one(-0.0))
    assert zero.differing == 1 and zero.max == 0
    ((nan,), _) = trace_compare.compare_traces(one(numpy.nan), one(1.0))
    assert nan.differing == 1 and nan.max == numpy.inf


def test_only_common_positions_and_operations_are_compared():
    model = hybrid()
    some, others = (trace_torch.trace(model, TOKENS, positions) for positions in ([0, 5, 9], [5, 6]))
    comparisons, remarks = trace_compare.compare_traces(some, others[:-1])
    assert {c.rows for c in comparisons} == {1} and not any(c.differing for c in comparisons)
    assert remarks == ["layer -1 logits: only in the first trace"]


def test_hooks_are_gone_afterwards():
    model = hybrid()
    trace_torch.trace(model, TOKENS, [0])
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid

    assert modeling_olmo_hybrid.torch_chunk_gated_delta_rule.__module__ != "trace_torch"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_damaged_trace_is_an_error(tmp_path):
    tensors = trace_torch.trace(hybrid(), TOKENS, [0])
    trace_format.write(tmp_path, TOKENS, tensors, "test")
    file = tmp_path / "0000_embed.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match="0000_embed.bin"):
        trace_format.read(tmp_path)


def test_positions():
    assert trace_torch.parse_positions("0,63-65", 100) == [0, 63, 64, 65]
    for text in ("5", "-1", "0-9"):
        with pytest.raises(ValueError):
            trace_torch.parse_positions(text, 5)
