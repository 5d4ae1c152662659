"""65,536 tokens through the tiny checkpoint: right, the same by Generate and Score, in memory that grows by what the
model keeps and no more.
"""

import pathlib

import configs
import torch
from scoring import generate, score
from transformers import OlmoHybridForCausalLM

LENGTH = 65536
GENERATED = 16
COMPARED = 512  # positions at the end, against transformers
MIB = 1 << 20


def memory_mib(pid, field):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/{pid}/status has no {field}")


def kept_bytes(config, tokens):
    """What one sequence keeps, in fp32: keys and values of every token in the attention layers."""
    attention = config.layer_types.count("full_attention")
    head_dim = config.hidden_size // config.num_attention_heads
    return tokens * attention * 2 * config.num_key_value_heads * head_dim * 4


@torch.no_grad()
def reference_tail(model, tokens, count):
    """transformers' log-probabilities of the last `count` tokens."""
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(1, ids[0, -count:, None])[:, 0]


def test_65536_tokens(start_worker, tiny_model, pb):
    model = OlmoHybridForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    (prompt,) = configs.random_sequences(model.config.vocab_size, [LENGTH - GENERATED], seed=3)
    worker = start_worker(tiny_model, "--numerics", "fp32")
    assert worker.stub.GetInfo(pb.GetInfoRequest()).limits.max_sequence_tokens == LENGTH

    score(worker, prompt[:1024])  # buffers that do not grow with the sequence are there from now on
    before = memory_mib(worker.process.pid, "VmRSS")
    tokens, logprobs, done = generate(worker, prompt, GENERATED, temperature=1, seed=5, ignore_eos=True)
    grown = memory_mib(worker.process.pid, "VmHWM") - before
    assert len(tokens) == GENERATED
    assert done.finish_reason == pb.FINISH_REASON_LENGTH

    kept = kept_bytes(model.config, LENGTH) / MIB
    print(f"keys and values of {LENGTH} tokens: {kept:.0f} MiB; the worker grew by {grown:.0f} MiB")
    # Attention needs kept MiB, touched once each. Beside them: the state, the batch's activations at full batch size,
    # the request's own ids, huge pages' rounding.
    assert 0.9 * kept <= grown <= 1.1 * kept + 64
    load = worker.stub.GetLoad(pb.GetLoadRequest())
    assert load.kv_pages_used == 0 and load.state_slots_used == 0, f"memory is still held after the request: {load}"

    scored = score(worker, prompt + tokens)
    assert torch.isfinite(scored).all()
    # As integers: torch.equal takes -0 for +0.
    assert torch.equal(scored[-GENERATED:].view(torch.int32), logprobs.view(torch.int32)), "Generate differs from Score"

    difference = (scored[-COMPARED:] - reference_tail(model, prompt + tokens, COMPARED)).abs().max()
    print(f"last {COMPARED} positions against transformers: max |difference| {difference:.2e}")
    # 2e-5 is the bound at 700 tokens; sums over 65,536 keys are a hundred times as long, their rounding grows by about
    # the square root of that.
    assert difference <= 2e-4
