"""Greedy generation on the tiny checkpoint equals transformers' greedy generation, token for token, over 50 prompts
(both in fp32).
"""

import concurrent.futures
import random

import tiny_data
import torch
from scoring import generate
from tokenizers import Tokenizer
from transformers import OlmoHybridForCausalLM

NEW_TOKENS = 64
# Where the two best logits are closer than this, two correct fp32 programs may choose differently; from there on the
# texts are different prompts.
TIE = 1e-5

TEXT_PROMPTS = """\
In the beginning|And the LORD said unto|Blessed are|And it came to pass|The king of Egypt|Thus saith the LORD|Genesis 1
Behold, I will|And the children of Israel|Then Moses went|Now the sons of|And David said|Hear, O Israel|Psalms 23
The words of the wise|O give thanks|Jesus answered and said|For as the heavens|Take heed|And there was a famine|Woe unto
The house of the LORD|He that hath an ear|Wherefore|And""".replace("\n", "|").split("|")


def make_prompts(tokenizer):
    rng = random.Random("greedy")
    problems = [tiny_data.make_problem(rng, kind, "heldout").prompt for kind in list(tiny_data.KINDS) * 3]
    prompts = TEXT_PROMPTS + problems[: 50 - len(TEXT_PROMPTS)]
    assert len(prompts) == 50
    return [tokenizer.encode(prompt).ids for prompt in prompts]


def top_two_gap(model, tokens):
    with torch.no_grad():
        best = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def test_greedy_equals_transformers(start_worker, tiny_model):
    model = OlmoHybridForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    prompts = make_prompts(Tokenizer.from_file(str(tiny_model / "tokenizer.json")))
    worker = start_worker(tiny_model, "--numerics", "fp32")
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as executor:
        ours = list(executor.map(lambda prompt: generate(worker, prompt, NEW_TOKENS, temperature=0)[0], prompts))

    compared, ties = 0, 0
    for prompt, tokens in zip(prompts, ours):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        theirs = out[0, len(prompt) :].tolist()
        if tokens == theirs:
            compared += len(tokens)
            continue
        first = next((i for i, (a, b) in enumerate(zip(tokens, theirs)) if a != b), min(len(tokens), len(theirs)))
        gap = top_two_gap(model, prompt + theirs[:first])
        assert gap < TIE, (
            f"prompt {prompt}: Lockstep has {tokens[: first + 1]}, transformers {theirs[: first + 1]}; "
            f"at the last of them the two best logits are {gap:.2e} apart"
        )
        compared += first
        ties += 1
    print(f"{compared} tokens of {len(prompts)} prompts are equal; {ties} prompts were compared only up to a near-tie")
    assert ties <= 1
