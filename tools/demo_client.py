#!/usr/bin/env python3
"""The client part of tools/demo: prompts, completions and their log-probabilities, from a running worker."""

import argparse
import json
import pathlib
import time

import grpc
import lockstep_stubs
import tokenizers

TEXT_PROMPTS = ("In the beginning", "Blessed are they that")
SUMS = (("37+45=", "82"), ("6*38=", "228"), ("What is 25+58? ", "83"))


def complete(stub, pb, tokenizer, prompt, **sampling):
    """Returns (text, tokens, log-probabilities, finish reason)."""
    request = pb.GenerateRequest(
        prompt_token_ids=tokenizer.encode(prompt).ids,
        sampling=pb.SamplingParams(**sampling),
        logprobs=pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_TEMPERATURE]),
    )
    tokens, logprobs, finish = [], [], ""
    for message in stub.Generate(request, timeout=60):
        tokens.extend(message.token_ids)
        logprobs.extend(message.logprobs.temperature)
        if message.HasField("done"):
            finish = pb.FinishReason.Name(message.done.finish_reason).removeprefix("FINISH_REASON_")
    return tokenizer.decode(tokens), tokens, logprobs, finish


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, help="HOST:PORT of the worker's data port")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="checkpoint directory, for its tokenizer.json")
    args = parser.parse_args()

    stubs = lockstep_stubs.load()
    pb = stubs.pb
    tokenizer = tokenizers.Tokenizer.from_file(str(args.model / "tokenizer.json"))
    with grpc.insecure_channel(args.target) as channel:
        stub = stubs.grpc.RolloutStub(channel)
        info = stub.GetInfo(pb.GetInfoRequest(), timeout=10)
        print(f"\nmodel {info.model.name}: {info.model.type}, {info.model.parameter_count:,} parameters, numerics {info.numerics.profile}")

        print("\n== text, temperature 0.7")
        begin, generated = time.monotonic(), 0
        for prompt in TEXT_PROMPTS:
            text, tokens, logprobs, finish = complete(stub, pb, tokenizer, prompt, max_tokens=48, temperature=0.7, seed=1)
            generated += len(tokens)
            print(f"\n{prompt}|{text.rstrip()}\n   [{len(tokens)} tokens, {finish}, mean log-probability {sum(logprobs) / len(logprobs):.4f}]")

        print("\n== arithmetic, greedy; every token with its log-probability")
        for prompt, answer in SUMS:
            text, tokens, logprobs, finish = complete(stub, pb, tokenizer, prompt, max_tokens=12, temperature=0)
            generated += len(tokens)
            shown = "  ".join(f"{json.dumps(tokenizer.id_to_token(t))} {p:.6f}" for t, p in zip(tokens, logprobs))
            print(f"{prompt}{text}   [{'right' if text.strip() == answer else 'wrong, it is ' + answer}]\n   {shown}")
        print(f"\n{generated} tokens, one request at a time, in {time.monotonic() - begin:.2f} s")


if __name__ == "__main__":
    main()
