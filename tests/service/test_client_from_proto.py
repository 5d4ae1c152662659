"""The client in python/examples: nothing but grpcio and the .proto."""

import re
import subprocess
import sys

from streams import collect


def run_client(repo_root, target):
    client = repo_root / "python" / "examples" / "minimal_client.py"
    lines = [line for line in client.read_text().splitlines() if line.strip() and not line.startswith('"""')]
    assert len(lines) <= 22, "it is meant to be read at a glance"
    done = subprocess.run([sys.executable, client, target, "1", "2", "3"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(pb, stub, output):
    sampling = pb.SamplingParams(temperature=0.8, seed=1, max_tokens=16, clamp=True)
    options = pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_TEMPERATURE])
    want = collect(stub.Generate(pb.GenerateRequest(prompt_token_ids=[1, 2, 3], n=2, sampling=sampling, logprobs=options)))
    for index, sample in want.samples.items():
        shown = re.findall(rf"^sample {index} token (\d+) logprob (\S+)$", output, re.M)
        assert [int(token) for token, _ in shown] == sample.tokens
        assert [text for _, text in shown] == [f"{x:.6f}" for x in sample.logprobs["temperature"]]
        name = pb.FinishReason.Name(sample.done.finish_reason)
        assert f"sample {index} {name} after {len(sample.tokens)}" in output


def test_against_the_fake_worker(start_fake, repo_root, pb):
    worker = start_fake()
    check(pb, worker.stub, run_client(repo_root, worker.data))


def test_against_the_worker(worker, repo_root, pb):
    check(pb, worker.stub, run_client(repo_root, worker.data))
