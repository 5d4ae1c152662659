"""Calls that the tests of this folder make to a worker, through the stubs that tests/conftest.py generates from the
.proto.
"""

import concurrent.futures

import lockstep_stubs
import torch

pb = lockstep_stubs.load().pb


def score(worker, tokens, timeout=600):
    """Log-probabilities (kind RAW) of tokens 1 .. end, in fp32."""
    request = pb.ScoreRequest(prompt_token_ids=tokens, logprobs=pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_RAW]))
    values, next_position, done = [], 1, None
    for response in worker.stub.Score(request, timeout=timeout):
        if response.logprobs.raw:
            assert response.offset == next_position, f"offset is {response.offset}, want {next_position}"
            values.extend(response.logprobs.raw)
            next_position += len(response.logprobs.raw)
        if response.HasField("done"):
            done = response.done
    assert done is not None and done.finish_reason == pb.FINISH_REASON_SCORED, f"done is {done}"
    assert len(values) == len(tokens) - 1, f"{len(values)} log-probabilities, want {len(tokens) - 1}"
    return torch.tensor(values, dtype=torch.float32)


def score_all(worker, sequences):
    """score() of every sequence, all in flight at once."""
    with concurrent.futures.ThreadPoolExecutor(len(sequences)) as executor:
        return list(executor.map(lambda tokens: score(worker, tokens), sequences))


def generate(worker, prompt, max_tokens, timeout=600, **sampling):
    """One sample: (token ids, their RAW log-probabilities, done)."""
    request = pb.GenerateRequest(
        prompt_token_ids=prompt,
        sampling=pb.SamplingParams(max_tokens=max_tokens, **sampling),
        logprobs=pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_RAW]),
    )
    tokens, logprobs, done = [], [], None
    for response in worker.stub.Generate(request, timeout=timeout):
        tokens.extend(response.token_ids)
        logprobs.extend(response.logprobs.raw)
        if response.HasField("done"):
            done = response.done
    assert done is not None, "the stream ended without a done"
    assert len(logprobs) == len(tokens), f"{len(logprobs)} log-probabilities for {len(tokens)} tokens"
    return tokens, torch.tensor(logprobs, dtype=torch.float32), done
