#!/usr/bin/env python3
"""What a worker serves over gRPC, beside what its engine could do at the same work.

    tests/gpu/bench_serving.py --model DIR --binary build/cuda/bin/lockstep-worker --worker_flags "--backend cuda"
    tests/gpu/bench_serving.py --worker HOST:PORT --load 128x2048+1024:256

--load AT_ONCE x PROMPT + NEW : REQUESTS (may be given again): REQUESTS samples of random prompts of PROMPT tokens, NEW
tokens each, at most AT_ONCE in flight; each caller sends its next request when its last is done. Reported for each:

tok_s        new tokens a second, from the first request sent to the last token received
engine_tok_s the same tokens over the time in which the device had a step: what the engine does at this work
share        tok_s / engine_tok_s
host_us      time a step in which the device waited for the host between two steps (GetLoad's host_ms)
first_ms     from the submission of a request to its first token, median and largest

Before the loads: the first token of a prompt of --first_prompt tokens on the idle worker, median of five. Nothing here
is a promise: the exit status is 0 unless a call fails.
"""

import argparse
import json
import pathlib
import re
import shlex
import statistics
import sys
import time

import numpy
from lockstep_client import ROOT, Worker

sys.path.append(str(ROOT / "tools"))
from build_tree import measurement  # noqa: E402

LOAD = re.compile(r"^(\d+)x(\d+)\+(\d+):(\d+)$")


def parse_load(text):
    match = LOAD.match(text)
    if match is None or "0" in match.groups():
        raise argparse.ArgumentTypeError(f"{text!r}; want AT_ONCE x PROMPT + NEW : REQUESTS, such as 128x2048+1024:256")
    return tuple(map(int, match.groups()))


def first_token_ms(worker, rng, vocab_size, prompt_tokens):
    times = []
    for _ in range(6):
        prompt = rng.integers(0, vocab_size, prompt_tokens).tolist()
        begin = time.perf_counter()
        worker.generate(prompt, 1)
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[1:])  # the first one warms up


def first_ms(worker, prompt, new_tokens, seed):
    """Milliseconds to the first token of one request, once it is done."""
    counters = worker.generate(prompt, new_tokens, seed, timeout=1800, stream_interval=64).done.counters
    return counters.queue_ms + counters.prefill_ms


def run_load(worker, rng, vocab_size, load):
    at_once, prompt_tokens, new_tokens, requests = load
    prompts = rng.integers(0, vocab_size, (requests, prompt_tokens)).tolist()
    before = worker.rollout.GetLoad(worker.messages.GetLoadRequest(), timeout=60)
    begin = time.perf_counter()
    first = worker.in_flight(
        lambda i: first_ms(worker, prompts[i], new_tokens, i), range(requests), at_once=at_once
    )
    seconds = time.perf_counter() - begin
    after = worker.rollout.GetLoad(worker.messages.GetLoadRequest(), timeout=60)
    steps = after.steps - before.steps
    host = (after.host_ms - before.host_ms) / 1e3
    device = (after.steps_ms - before.steps_ms) / 1e3 - host
    tokens = requests * new_tokens
    row = {"at_once": at_once, "prompt": prompt_tokens, "new": new_tokens, "requests": requests, "seconds": seconds}
    row |= {"tok_s": tokens / seconds, "engine_tok_s": tokens / device, "share": device / seconds, "steps": steps}
    row |= {"host_us": host / steps * 1e6, "step_ms": device / steps * 1e3}
    row |= {"first_ms": statistics.median(first), "first_ms_max": max(first)}
    row["preemptions"] = after.preemptions - before.preemptions
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint directory")
    parser.add_argument("--binary", help="lockstep-worker to start")
    parser.add_argument("--worker_flags", default="--backend cuda", help="default: --backend cuda")
    parser.add_argument("--worker", help="HOST:PORT of a running worker instead")
    parser.add_argument("--load", type=parse_load, action="append", help="default: 128x2048+1024:256")
    parser.add_argument("--first_prompt", type=int, default=2048, help="default: 2048")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    if bool(arguments.worker) == bool(arguments.model and arguments.binary):
        parser.error("want either --worker, or --model and --binary")
    if arguments.worker:
        worker = Worker(arguments.worker)
    else:
        worker = Worker.start(arguments.binary, arguments.model, shlex.split(arguments.worker_flags))
    rng = numpy.random.default_rng(1)
    with worker:
        info = worker.info()
        found = measurement(__file__, info.build.device)
        found |= {"model": info.model.name, "profile": info.numerics.profile, "serving": []}
        vocab_size = info.model.vocab_size
        found["first_token_ms"] = first_token_ms(worker, rng, vocab_size, arguments.first_prompt)
        print(f"first token of {arguments.first_prompt} on an idle worker: {found['first_token_ms']:.1f} ms", flush=True)
        for load in arguments.load or [(128, 2048, 1024, 256)]:
            row = run_load(worker, rng, vocab_size, load)
            found["serving"].append(row)
            print(
                f"{row['at_once']} at once, {row['prompt']} in, {row['new']} out, {row['requests']} requests: "
                f"{row['tok_s']:.0f} tok/s, {row['share']:.1%} of the engine's {row['engine_tok_s']:.0f}; "
                f"{row['steps']} steps of {row['step_ms']:.2f} ms and {row['host_us']:.0f} us of the host between; first "
                f"token {row['first_ms']:.0f} ms, at most {row['first_ms_max']:.0f}; {row['preemptions']} preempted",
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
