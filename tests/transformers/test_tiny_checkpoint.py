"""The checkpoint in tests/data/tiny is what its model card says, and its problems have the answers they should."""

import json
import random
import re

import pytest
import tiny_data
import torch
import train_tiny
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import OlmoHybridForCausalLM


def evaluate(problem):
    """The answer, computed from the prompt's text alone."""
    numbers = [int(number) for number in re.findall(r"\d+", problem.prompt)]
    if "more, " in problem.prompt:
        return max(numbers)
    if "*" in problem.prompt:
        return numbers[0] * numbers[1]
    if "-" in problem.prompt or "away" in problem.prompt or "lost" in problem.prompt:
        return numbers[0] - numbers[1]
    return sum(numbers)


@pytest.mark.parametrize("kind", tiny_data.KINDS)
def test_problems(kind):
    rng = random.Random(kind)
    train = [tiny_data.make_problem(rng, kind) for _ in range(2000)]
    heldout = [tiny_data.make_problem(rng, kind, "heldout") for _ in range(2000)]
    for problem in train + heldout:
        assert int(problem.answer) == evaluate(problem) >= 0, problem
        assert tiny_data.check(problem.answer + "<|endoftext|>And", problem.answer)
        assert tiny_data.check(problem.answer + "\nmore", problem.answer)
        assert not tiny_data.check(problem.answer + "0", problem.answer)
    assert not {problem.prompt for problem in train} & {problem.prompt for problem in heldout}


def test_size_and_format(tiny_model):
    assert sum(path.stat().st_size for path in tiny_model.iterdir()) <= 8_000_000
    config = json.loads((tiny_model / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] is None
    heads = ("linear_key_head_dim", "linear_value_head_dim", "hidden_size", "num_attention_heads")
    assert [config[name] for name in heads] == [96, 192, 256, 2]
    with safe_open(tiny_model / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}


def test_prompts_tokenize_as_in_training(tiny_model):
    """A prompt alone and a prompt with its answer begin with the same tokens, and every digit is a token."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    for problem in tiny_data.make_problems(7, 500, "heldout"):
        prompt, answer = tokenizer.encode(problem.prompt), tokenizer.encode(problem.answer)
        assert tokenizer.encode(problem.prompt + problem.answer).ids == prompt.ids + answer.ids
        assert len(answer.ids) == len(problem.answer)
        assert tokenizer.decode(prompt.ids) == problem.prompt


@torch.no_grad()
def test_what_it_learned(tiny_model):
    """English and sums, with something left to learn."""
    model = OlmoHybridForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    problems = tiny_data.make_problems(11, 500, "heldout")
    right = train_tiny.exact_match(model, tokenizer, problems, "cpu")
    print(f"{100 * right:.1f}% of {len(problems)} held-out problems right")
    assert 0.5 <= right <= 0.95

    text = "And the LORD spake unto Moses, saying, Speak unto the children of Israel, and say unto them"
    ids = torch.tensor([tokenizer.encode(text).ids])
    loss = float(model(input_ids=ids, labels=ids).loss)
    print(f"loss {loss:.2f} per token of {text!r}")
    assert loss < 2.5
