"""tools/lockstep-generate as a user runs it."""

import re
import subprocess
import sys

from streams import collect


def run(repo_root, worker, *arguments, stdin=None):
    command = [sys.executable, repo_root / "tools" / "lockstep-generate", "--target", worker.data, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, input=stdin)


def test_ids_with_logprobs(start_fake, repo_root, pb):
    worker = start_fake()
    done = run(repo_root, worker, "--ids", "5,6,7", "--seed", 3, "--max_tokens", 9, "--ignore_eos", "--logprobs")
    assert done.returncode == 0, done.stderr
    options = pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_TEMPERATURE])
    sampling = pb.SamplingParams(seed=3, max_tokens=9, ignore_eos=True)
    want = collect(worker.stub.Generate(pb.GenerateRequest(prompt_token_ids=[5, 6, 7], sampling=sampling, logprobs=options)))
    *lines, last = done.stdout.splitlines()
    assert [line.split() for line in lines] == [
        [str(t), f"{x:.6f}"] for t, x in zip(want.samples[0].tokens, want.samples[0].logprobs["temperature"])
    ]
    assert re.fullmatch(r"\[LENGTH \(MAX_TOKENS\); 9 tokens in [\d.]+ s, [\d.]+ tok/s; seed 3\]", last)


def test_errors_are_one_line(start_fake, repo_root):
    worker = start_fake()
    for arguments, named in (
        (["--ids", "5", "--top_p", 2], "sampling.top_p"),
        (["--prompt", "x"], "--model"),
        (["--prompt", "x", "--model", "/nonexistent"], "tokenizer.json"),
    ):
        done = run(repo_root, worker, *arguments)
        assert done.returncode == 1
        assert named in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_text(worker, repo_root, tiny_model, pb):
    from tokenizers import Tokenizer

    done = run(repo_root, worker, "--model", tiny_model, "--temperature", 0, "--max_tokens", 24, stdin="The ")
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    sampling = pb.SamplingParams(temperature=0, max_tokens=24)
    want = collect(worker.stub.Generate(pb.GenerateRequest(prompt_token_ids=tokenizer.encode("The ").ids, sampling=sampling)))
    text, _, last = done.stdout.rstrip("\n").rpartition("\n")
    assert text == tokenizer.decode(want.samples[0].tokens)
    assert "tok/s" in last

    several = run(repo_root, worker, "--model", tiny_model, "--prompt", "The ", "--n", 3, "--max_tokens", 8)
    assert several.returncode == 0 and several.stdout.count("--- sample") == 3
