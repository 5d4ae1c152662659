#!/usr/bin/env python3
"""What a weight update with policy RECOMPUTE costs sequences of long context, beside KEEP and the prompts' first prefill.

    tests/gpu/check_recompute.py --model DIR --binary build/cuda/bin/lockstep-worker --json OUT

--sequences of them generate behind prompts of --context tokens. An update of one tensor, the final norm's, to the values
it has (a part of the weights over the version that serves), leaves all of the cost with the policy. A sequence's stall is
its longest wait for a token from the update's start on.

Exit status: 0 measured; 2 it could not run.
"""

import argparse
import json
import pathlib
import shlex
import sys
import threading
import time
import traceback

import grpc
import numpy
from check_weights import spread
from check_weights_nccl import load_tensors
from lockstep_client import ROOT, Worker

import lockstep

sys.path.append(str(ROOT / "tools"))
from build_tree import measurement  # noqa: E402

TENSOR = "model.norm.weight"
STEADY_S = 2.0
DEADLINE_S = 240


class Sequence:
    """One sample, and when its tokens came."""

    def __init__(self, worker, prompt, max_tokens, seed):
        self.arrivals = []  # seconds
        self.error = None
        m = worker.messages
        sampling = m.SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, temperature=1.0)
        request = m.GenerateRequest(prompt_token_ids=prompt, sampling=sampling, stream_interval=1)
        self.call = worker.rollout.Generate(request, timeout=DEADLINE_S)
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        try:
            for response in self.call:
                self.arrivals += [time.perf_counter()] * len(response.token_ids)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.CANCELLED:
                self.error = error

    def wait(self, count, deadline):
        """Until it has `count` tokens."""
        while len(self.arrivals) < count:
            if self.error is not None:
                raise self.error
            if not self.thread.is_alive() or time.perf_counter() > deadline:
                raise RuntimeError(f"a sequence has {len(self.arrivals)} tokens, want {count}: --max_tokens, or too slow")
            time.sleep(0.005)

    def stall_s(self, begin):
        times = [t for t in list(self.arrivals) if t >= begin]
        before = [t for t in list(self.arrivals) if t < begin]
        return float(numpy.diff(before[-1:] + times).max())


def rate(sequences, begin, end):
    """Tokens a second."""
    return sum(begin <= t < end for s in sequences for t in list(s.arrivals)) / (end - begin)


def update(worker, sequences, tensor, step, policy):
    steady = time.perf_counter()
    time.sleep(STEADY_S)
    begin = time.perf_counter()
    manifest = [(TENSOR, tensor.dtype, tensor.shape)]
    with lockstep.WeightPublisher(worker.control, manifest_from=manifest, base_version=(0, step - 1)) as publisher:
        report = publisher.publish((0, step), [(TENSOR, tensor)], policy=policy).workers[0]
    end = time.perf_counter()
    for s in sequences:
        s.wait(len(s.arrivals) + 20, begin + DEADLINE_S)
    stalls = [s.stall_s(begin) for s in sequences]
    all_again = begin + max(stalls)
    before = rate(sequences, steady, begin)
    lost = before * (all_again - begin) - sum(begin <= t < all_again for s in sequences for t in list(s.arrivals))
    return {
        "policy": policy,
        "publish_s": end - begin,
        "pause_ms": report.pause_ms,
        "stall_s": spread(stalls),
        "tok_s_before": before,
        "tokens_lost": max(0.0, lost),
    }


def run(arguments):
    tensor = load_tensors(arguments.model, "cpu", {TENSOR})[TENSOR]
    with Worker.start(arguments.binary, arguments.model, shlex.split(arguments.worker_flags)) as worker:
        info = worker.info()
        rng = numpy.random.default_rng(11)
        prompts = rng.integers(0, info.model.vocab_size, (arguments.sequences, arguments.context)).tolist()
        begin = time.perf_counter()
        sequences = [Sequence(worker, p, arguments.max_tokens, i) for i, p in enumerate(prompts)]
        for s in sequences:
            s.wait(20, begin + DEADLINE_S)
        prefill_s = max(s.arrivals[0] for s in sequences) - begin
        rows = [update(worker, sequences, tensor, i + 1, policy) for i, policy in enumerate(("keep", "recompute"))]
        version = worker.info().weight_version
        if (version.epoch, version.step) != (0, len(rows)):
            raise RuntimeError(f"the worker serves {version}, want step {len(rows)}")
        for s in sequences:
            s.call.cancel()
    return {
        **measurement(__file__, info.build.device, {"grpcio": grpc.__version__}),
        "shape": arguments.shape or pathlib.Path(arguments.model).name,
        "sequences": arguments.sequences,
        "context": arguments.context,
        "first_prefill_s": prefill_s,  # until the last sequence's first token
        "results": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--worker_flags", default="--backend cuda")
    parser.add_argument("--shape", help="its name in the table (default: the directory's)")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--context", type=int, default=32768, help="tokens of each prompt (default: 32768)")
    parser.add_argument("--max_tokens", type=int, default=8000, help="of a sample; it must not end before the check does")
    parser.add_argument("--json", help="where the result goes")
    arguments = parser.parse_args()
    try:
        found = run(arguments)
    except Exception:
        traceback.print_exc()
        return 2
    print(json.dumps(found, indent=1))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
