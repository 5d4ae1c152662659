#!/usr/bin/env python3
"""Trains the tiny checkpoint of tests/data/tiny: the Olmo Hybrid architecture with the 7B's head sizes, on
public-domain text and generated arithmetic.

    tools/tiny_data.py --out build/tiny_data
    tools/train_tiny.py --data build/tiny_data --out tests/data/tiny --device cuda --minutes 8

Needs PyTorch and transformers. The time box covers everything (tokenizer, data, training, evaluation); the learning
rate follows the elapsed share of it, or of --steps where that is given. Weights are trained in fp32 and saved in bf16,
and the saved model is what the model card's figures are of.
"""

import argparse
import concurrent.futures
import datetime
import json
import math
import os
import pathlib
import random
import shlex
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, OlmoHybridConfig, OlmoHybridForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import tiny_data  # noqa: E402

END_OF_TEXT_ID = 0
PAD_ID = 1
PAD = "<|pad|>"
VOCABULARY = 1024
SIZE_LIMIT = 8_000_000  # bytes of the whole directory


def make_config():
    return OlmoHybridConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        num_attention_heads=2,  # of 128, as in the 7B
        num_key_value_heads=2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=96,  # the 7B's
        linear_value_head_dim=192,  # the 7B's
        max_position_embeddings=65536,
        # No position embedding, like the released 7B. It takes the null theta: with no rope_parameters at all
        # transformers fills in RoPE of theta 10,000.
        rope_parameters={"rope_type": "default", "rope_theta": None},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=PAD_ID,
    )


# --- tokenizer and data ---


def train_tokenizer(documents):
    """Byte-level BPE; every digit is a token of its own, so that a number's tokens do not depend on its neighbours."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[tiny_data.END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems = [p.prompt + p.answer for p in tiny_data.make_problems(seed=1, count=10_000)]
    tokenizer.train_from_iterator(documents + problems, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, want {VOCABULARY}")
    return tokenizer


def encode_documents(tokenizer, documents):
    """One stream of token ids, each document ended by the end-of-text token."""
    stream = []
    for encoding in tokenizer.encode_batch(documents):
        stream += encoding.ids
        stream.append(END_OF_TEXT_ID)
    return np.array(stream, dtype=np.uint16)


def encode_problems(tokenizer, problems):
    """(stream, start of each problem): prompt, answer, end of text, each tokenized as it is at inference, where the
    prompt stands alone.
    """
    prompts = tokenizer.encode_batch([p.prompt for p in problems])
    answers = tokenizer.encode_batch([p.answer for p in problems])
    stream, starts = [], []
    for prompt, answer in zip(prompts, answers):
        starts.append(len(stream))
        stream += prompt.ids
        stream += answer.ids
        stream.append(END_OF_TEXT_ID)
    return np.array(stream, dtype=np.uint16), np.array(starts)


def _problem_shard(tokenizer_json, seed, count):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return encode_problems(Tokenizer.from_str(tokenizer_json), tiny_data.make_problems(seed, count))


def make_problem_pool(tokenizer, count, processes):
    shard = math.ceil(count / processes)
    with concurrent.futures.ProcessPoolExecutor(processes) as executor:
        seeds = range(100, 100 + processes)
        shards = list(executor.map(_problem_shard, [tokenizer.to_str()] * processes, seeds, [shard] * processes))
    streams, starts, offset = [], [], 0
    for stream, begin in shards:
        streams.append(stream)
        starts.append(begin + offset)
        offset += len(stream)
    return np.concatenate(streams), np.concatenate(starts)


class Batches:
    """Rows of `length` + 1 tokens, text rows first: those start anywhere, rows of problems at a problem's start."""

    def __init__(self, text, problems, problem_starts, rows, text_rows, length, device):
        self.text = torch.from_numpy(text.astype(np.int64)).to(device)
        self.problems = torch.from_numpy(problems.astype(np.int64)).to(device)
        self.problem_starts = torch.from_numpy(problem_starts[problem_starts < len(problems) - length - 1]).to(device)
        self.rows, self.text_rows, self.length = rows, text_rows, length
        self.columns = torch.arange(length + 1, device=device)

    def draw(self):
        device = self.text.device
        text_begin = torch.randint(len(self.text) - self.length - 1, (self.text_rows,), device=device)
        which = torch.randint(len(self.problem_starts), (self.rows - self.text_rows,), device=device)
        text = self.text[text_begin[:, None] + self.columns]
        problems = self.problems[self.problem_starts[which][:, None] + self.columns]
        return torch.cat([text, problems])


# --- model ---


def make_model(seed):
    torch.manual_seed(seed)
    model = OlmoHybridForCausalLM(make_config())
    if model.model.rotary_emb is not None:
        raise ValueError("the model has a position embedding, want none")
    return model


def add_text_dropout(model, probability, text_rows):
    """Dropout on the text rows' branches only: the text is small and seen often, problems are always new. Returns a
    function that removes it.
    """

    def drop(module, inputs, output):
        if not model.training or probability == 0:
            return output
        return torch.cat([F.dropout(output[:text_rows], probability), output[text_rows:]])

    modules = [model.model.embed_tokens]
    for layer in model.model.layers:
        modules += [layer.mlp, layer.linear_attn.o_proj if hasattr(layer, "linear_attn") else layer.self_attn.o_proj]
    handles = [module.register_forward_hook(drop) for module in modules]
    return lambda: [handle.remove() for handle in handles]


def make_optimizer(model, learning_rate):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_at(progress, peak):
    """Linear to the peak over the first 2%, then a cosine to 2% of it."""
    if progress < 0.02:
        return peak * progress / 0.02
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.02) / 0.98))))


def next_token_loss(model, batch):
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def train(model, batches, arguments, train_until):
    """Returns (steps, seconds). Stops after --steps, or at the clock's `train_until`."""
    remove_dropout = add_text_dropout(model, arguments.dropout, batches.text_rows)
    optimizer = make_optimizer(model, arguments.learning_rate)
    begin = time.monotonic()
    step = 0
    model.train()
    while True:
        now = time.monotonic()
        if arguments.steps is None:
            progress = (now - begin) / (train_until - begin)
        else:
            progress = step / arguments.steps if arguments.steps else 1.0
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(max(progress, 1e-3), arguments.learning_rate)
        loss = next_token_loss(model, batches.draw())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step in (1, 10) or step % arguments.log_every == 0:
            milliseconds = 1e3 * (time.monotonic() - begin) / step
            print(f"step {step}  {100 * progress:.1f}%  loss {loss.item():.4f}  {milliseconds:.1f} ms/step", flush=True)
    remove_dropout()
    return step, time.monotonic() - begin


# --- evaluation ---


@torch.no_grad()
def text_loss(model, text, device, rows=16, length=512, limit=64):
    """Mean negative log-likelihood per token over the validation text, cut into rows of `length` tokens."""
    count = min(limit, (len(text) - 1) // length)
    tokens = torch.from_numpy(text[: count * length + 1].astype(np.int64)).to(device)
    inputs, targets = tokens[:-1].view(count, length), tokens[1:].view(count, length)
    total = 0.0
    for i in range(0, count, rows):
        logits = model(input_ids=inputs[i : i + rows], use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), targets[i : i + rows].flatten(), reduction="sum").item()
    return total / (count * length)


@torch.no_grad()
def exact_match(model, tokenizer, problems, device):
    """Share of problems whose greedy completion is the answer and the end of text. One forward pass shows it: the
    greedy completion is exactly that where every one of its tokens is the likeliest after the ones before.
    """
    right = 0
    for i in range(0, len(problems), 250):
        prompts = [tokenizer.encode(p.prompt).ids for p in problems[i : i + 250]]
        targets = [tokenizer.encode(p.answer).ids + [END_OF_TEXT_ID] for p in problems[i : i + 250]]
        width = max(len(p) + len(t) for p, t in zip(prompts, targets))
        ids = torch.full((len(prompts), width), PAD_ID)
        for row, (prompt, target) in enumerate(zip(prompts, targets)):
            # What follows a row's end cannot reach back into it.
            ids[row, : len(prompt) + len(target)] = torch.tensor(prompt + target)
        best = model(input_ids=ids.to(device), use_cache=False).logits.argmax(-1).cpu()
        for row, (prompt, target) in enumerate(zip(prompts, targets)):
            right += best[row, len(prompt) - 1 : len(prompt) - 1 + len(target)].tolist() == target
    return right / len(problems)


def evaluate(model, tokenizer, validation_text, device, per_kind):
    model.eval()
    scores = {}
    for kind in tiny_data.KINDS:
        rng = random.Random(f"evaluation {kind}")
        problems = [tiny_data.make_problem(rng, kind, "heldout") for _ in range(per_kind)]
        scores[kind] = exact_match(model, tokenizer, problems, device)
    overall = sum(tiny_data.KINDS[kind] * score for kind, score in scores.items())
    return {
        "text_loss": text_loss(model, validation_text, device),
        "exact_match": scores,
        "exact_match_overall": overall,
    }


@torch.no_grad()
def complete(model, tokenizer, prompt, device, tokens):
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


def print_evaluation(title, evaluation):
    kinds = "  ".join(f"{kind} {100 * score:.1f}%" for kind, score in evaluation["exact_match"].items())
    overall = 100 * evaluation["exact_match_overall"]
    print(f"{title}: text loss {evaluation['text_loss']:.4f}, arithmetic {overall:.1f}% ({kinds})", flush=True)


# --- saving ---

CARD = """---
license: apache-2.0
language: en
---

# The tiny checkpoint

An Olmo Hybrid (Gated DeltaNet and attention) of {parameters:,} parameters in bf16, for tests and demonstrations. Its
head sizes are the 7B's own (96 and 192 in the recurrent layers, 128 in attention), so that the same kernels and orders
of arithmetic run; everything else is small: hidden size {hidden}, {layers} layers ({mixers}),
intermediate size {intermediate}, vocabulary {vocabulary}, no position embedding.

It completes text in the style of the King James Bible, and sums. It knows nothing else, and is for tests only.

- Data: the King James Bible (1611, public domain) from the packages bible-kjv and bible-kjv-text of Debian
  ({text_tokens:,} training tokens), and {problems:,} generated arithmetic problems; `tools/tiny_data.py` makes both.
  One chapter in 32 and one computation in {heldout} were held out.
- Training: `tools/train_tiny.py` (fp32 weights, AdamW, loss on all tokens), {steps:,} steps of {rows} rows of {length}
  tokens ({text_rows} of them text) in {minutes:.1f} minutes on {device}; PyTorch {torch},
  transformers {transformers}, {date}.

      {command}

- Licence: Apache-2.0, like the repository.

## Held-out results, of the saved bf16 weights

Text: loss {text_loss:.3f} per token (perplexity {perplexity:.1f}); fp32 weights before rounding: {text_loss_fp32:.3f}.
Arithmetic, greedy, exact match over {per_kind} problems a kind:

| kind | example | right | before rounding |
| --- | --- | --- | --- |
{table}
| all, by their share in training | | {overall:.1f}% | {overall_fp32:.1f}% |

A prompt ends with `=` or, where it is in words, with one space; after the answer comes `{end_of_text}` (id
{end_of_text_id}).

## Samples (greedy)

{samples}
"""


def save(model, tokenizer, out):
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(eos_token_id=END_OF_TEXT_ID, pad_token_id=PAD_ID)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tiny_data.END_OF_TEXT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def make_card(model, saved, before, samples, facts, arguments):
    rows = []
    for kind in tiny_data.KINDS:
        problem = tiny_data.make_problem(random.Random(f"example {kind}"), kind, "heldout")
        example = f"`{problem.prompt}{problem.answer}`"
        right, right_fp32 = 100 * saved["exact_match"][kind], 100 * before["exact_match"][kind]
        rows.append(f"| {kind} | {example} | {right:.1f}% | {right_fp32:.1f}% |")
    config = model.config
    places = {arguments.data: "build/tiny_data", arguments.out: "tests/data/tiny"}  # where they were carries no meaning
    recurrent, attention = (config.layer_types.count(kind) for kind in ("linear_attention", "full_attention"))
    return CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        mixers=f"{recurrent} recurrent, {attention} attention",
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        heldout=tiny_data.HELDOUT_ONE_IN,
        torch=torch.__version__,
        transformers=transformers.__version__,
        date=datetime.date.today().isoformat(),
        command=shlex.join(["tools/train_tiny.py", *(places.get(word, word) for word in sys.argv[1:])]),
        rows=arguments.rows,
        length=arguments.length,
        text_loss=saved["text_loss"],
        perplexity=math.exp(saved["text_loss"]),
        text_loss_fp32=before["text_loss"],
        per_kind=arguments.per_kind,
        table="\n".join(rows),
        overall=100 * saved["exact_match_overall"],
        overall_fp32=100 * before["exact_match_overall"],
        end_of_text=tiny_data.END_OF_TEXT,
        end_of_text_id=END_OF_TEXT_ID,
        samples="\n\n".join(samples),
        **facts,
    )


SAMPLE_PROMPTS = (
    ("In the beginning", 60),
    ("And the king said unto", 60),
    ("Blessed are they that", 60),
    ("37+45=", 8),
    ("Q: 312-57 A: ", 8),
    ("Ruth has 12 figs and gets 30 more. How many figs are there? ", 8),
)


def make_samples(model, tokenizer, device):
    samples = []
    for prompt, tokens in SAMPLE_PROMPTS:
        text = complete(model, tokenizer, prompt, device, tokens)
        print(f"  {prompt!r} -> {text!r}")
        quoted = "\n".join(f"    {line}" for line in (prompt + "|" + text).rstrip("\n").split("\n"))
        samples.append(quoted)
    return ["The bar stands where the prompt ends.", *samples]


def device_name(device):
    if device == "cuda":
        return f"one {torch.cuda.get_device_name()}"
    return f"a CPU ({torch.get_num_threads()} threads)"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory written by tools/tiny_data.py --out")
    parser.add_argument("--out", required=True, help="directory of the checkpoint")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8, help="time box of the whole run (default: 8)")
    parser.add_argument("--steps", type=int, help="train so many steps, however long; 0 saves the untrained model")
    parser.add_argument("--rows", type=int, help="rows of a batch (default: 192 on cuda, 16 on cpu)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default: 256)")
    parser.add_argument("--text_share", type=float, default=0.27, help="share of text rows (default: 0.27)")
    parser.add_argument("--problems", type=int, help="problems to draw from (default: 3000000 on cuda, 100000 on cpu)")
    parser.add_argument("--per_kind", type=int, default=500, help="problems of a kind in the evaluation (default: 500)")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.15, help="on text rows (default: 0.15)")
    parser.add_argument("--log_every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    arguments.rows = arguments.rows or (192 if on_gpu else 16)
    arguments.problems = arguments.problems or (3_000_000 if on_gpu else 100_000)
    return arguments


def main():
    begin = time.monotonic()
    arguments = parse_arguments()
    device = arguments.device
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")

    training, validation = tiny_data.read_documents(arguments.data)
    tokenizer = train_tokenizer(training)
    text, validation_text = encode_documents(tokenizer, training), encode_documents(tokenizer, validation)
    problems, starts = make_problem_pool(tokenizer, arguments.problems, processes=max(1, min(16, os.cpu_count() or 1)))
    print(f"{len(text)} tokens of text, {len(starts)} problems of {len(problems)} tokens", flush=True)
    print(f"data ready after {time.monotonic() - begin:.1f} s", flush=True)

    model = make_model(arguments.seed).to(device)
    text_rows = round(arguments.rows * arguments.text_share)
    batches = Batches(text, problems, starts, arguments.rows, text_rows, arguments.length, device)
    # Two evaluations, the samples and saving take about 20 s on a GPU, a few minutes on a CPU of two cores.
    reserve = min(30 if device == "cuda" else 120, 0.3 * 60 * arguments.minutes)
    steps, seconds = train(model, batches, arguments, begin + 60 * arguments.minutes - reserve)
    print(f"trained {steps} steps in {seconds:.0f} s", flush=True)

    torch.set_float32_matmul_precision("highest")
    before = evaluate(model, tokenizer, validation_text, device, arguments.per_kind)
    print_evaluation("fp32 weights", before)
    out = pathlib.Path(arguments.out)
    save(model, tokenizer, out)
    model = OlmoHybridForCausalLM.from_pretrained(out, dtype=torch.float32).to(device)  # bf16 values, fp32 arithmetic
    saved = evaluate(model, tokenizer, validation_text, device, arguments.per_kind)
    print_evaluation("saved bf16 weights", saved)

    samples = make_samples(model, tokenizer, device)
    facts = {
        "text_tokens": len(text),
        "problems": len(starts),
        "steps": steps,
        "minutes": seconds / 60,
        "text_rows": text_rows,
        "device": device_name(device),
    }
    (out / "README.md").write_text(make_card(model, saved, before, samples, facts, arguments))
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size} bytes, {time.monotonic() - begin:.0f} s in all")
    if size > SIZE_LIMIT:
        raise SystemExit(f"train_tiny: {out} has {size} bytes, want at most {SIZE_LIMIT}")


if __name__ == "__main__":
    main()
