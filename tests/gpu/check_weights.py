#!/usr/bin/env python3
"""Weight updates of a worker under load: afterwards it computes what a worker started from the new weights computes, in
bits; and how long each phase takes.

    tests/gpu/check_weights.py --old DIR --new DIR --binary build/cuda/bin/lockstep-worker --worker_flags "--backend cuda"

--old, --new: checkpoints of one shape. The worker starts from --old and is updated to --new and back, over the stream
transport, while samples are generated; a second worker, started from --new once the first has ended, gives the numbers
to compare with.

Exit status: 0 every bit and digest is equal; 1 not; 2 it could not run.
"""

import argparse
import concurrent.futures
import importlib.util
import itertools
import json
import mmap
import pathlib
import shlex
import sys
import threading
import time
import traceback

import grpc
import numpy
from lockstep_client import ROOT, WEIGHTS_PROTO, Worker, load_messages

sys.path.append(str(ROOT / "tools"))
from build_tree import measurement  # noqa: E402

# By its file: the package itself wants generated stubs.
_spec = importlib.util.spec_from_file_location("lockstep_digest", ROOT / "python" / "lockstep" / "_digest.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
digest = _module.digest

DTYPES = {"F32": 1, "BF16": 2, "F16": 3}
CHUNK = 1 << 20
STREAMS = 6


class Checkpoint:
    """The tensors of a directory, mapped: a list of (name, dtype, shape, bytes)."""

    def __init__(self, directory):
        self.tensors = []
        for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
            with open(path, "rb") as file:
                data = numpy.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), numpy.uint8)
            size = int(data[:8].view(numpy.uint64)[0])
            for name, t in json.loads(bytes(data[8 : 8 + size])).items():
                if name != "__metadata__":
                    begin, end = t["data_offsets"]
                    self.tensors.append((name, t["dtype"], t["shape"], data[8 + size + begin : 8 + size + end]))
        self.bytes = sum(data.size for *_, data in self.tensors)


class Sender:
    def __init__(self, worker):
        self.m = load_messages(WEIGHTS_PROTO)
        options = [("grpc.max_send_message_length", 64 << 20), ("grpc.use_local_subchannel_pool", 1)]
        # A connection a stream: each is one thread of gRPC.
        self.stubs = [self.m.stub(grpc.insecure_channel(worker.control, options)) for _ in range(STREAMS)]

    def digests(self):
        response = self.stubs[0].GetDigests(self.m.GetDigestsRequest(), timeout=300)
        return {t.name: t.digest for t in response.tensors}

    def update(self, step, checkpoint, digests, policy):
        """The milliseconds of each phase, and Commit's answer."""
        m, stub = self.m, self.stubs[0]
        times = {}

        def timed(name, call):
            begin = time.perf_counter()
            result = call()
            times[name] = 1000 * (time.perf_counter() - begin)
            return result

        version = {"epoch": 0, "step": step}
        manifest = {
            "tensors": [{"name": n, "dtype": DTYPES[d], "shape": shape} for n, d, shape, _ in checkpoint.tensors]
        }
        timed("begin_ms", lambda: stub.Begin(m.BeginRequest(version=version, manifest=manifest), timeout=60))

        def chunks(indices):
            first = version
            for i in indices:
                data = checkpoint.tensors[i][3]
                for offset in range(0, data.size, CHUNK):
                    chunk = data[offset : offset + CHUNK].tobytes()
                    yield m.PushRequest(version=first, tensor=i, offset=offset, data=chunk)
                    first = None

        # The tensors in order, dealt out: few are partly received at any time.
        parts = [range(k, len(checkpoint.tensors), STREAMS) for k in range(STREAMS)]

        def push():
            with concurrent.futures.ThreadPoolExecutor(STREAMS) as executor:
                list(executor.map(lambda k: self.stubs[k].Push(chunks(parts[k]), timeout=300), range(STREAMS)))

        timed("push_ms", push)
        timed("verify_ms", lambda: stub.Verify(m.VerifyRequest(version=version, digests=digests), timeout=60))
        commit = m.CommitRequest(version=version, policy=policy)
        answer = timed("commit_ms", lambda: stub.Commit(commit, timeout=60))
        return times, answer


class Load:
    """Samples generated all the time; when each token came, and under which version."""

    def __init__(self, worker, count, prompt_tokens, vocab_size):
        self.worker, self.stop = worker, False
        self.arrivals = []
        self.aborts = 0
        rng = numpy.random.default_rng(3)
        prompts = rng.integers(0, vocab_size, (count, prompt_tokens)).tolist()
        self.threads = [threading.Thread(target=self.run, args=(p,), daemon=True) for p in prompts]
        for thread in self.threads:
            thread.start()

    def run(self, prompt):
        m = self.worker.messages
        for seed in itertools.count():
            request = m.GenerateRequest(
                prompt_token_ids=prompt,
                sampling=m.SamplingParams(max_tokens=2000, seed=seed, ignore_eos=True, temperature=1.0),
                stream_interval=1,
            )
            call = self.worker.rollout.Generate(request, timeout=600)
            for response in call:
                if self.stop:
                    call.cancel()
                    return
                self.arrivals.append((time.perf_counter(), len(response.token_ids)))

    def rate(self, begin, end):
        """Tokens a second."""
        return sum(n for t, n in list(self.arrivals) if begin <= t < end) / (end - begin)

    def longest_gap(self, begin, end):
        """Milliseconds in which no token came."""
        times = sorted(t for t, n in list(self.arrivals) if n and begin <= t < end)
        return 1000 * max((b - a for a, b in zip(times, times[1:])), default=0.0)

    def end(self):
        self.stop = True
        for thread in self.threads:
            thread.join(timeout=30)


def answers(worker, vocab_size):
    """Samples with log-probabilities, and scores."""
    rng = numpy.random.default_rng(5)
    prompts = [rng.integers(0, vocab_size, n).tolist() for n in rng.integers(5, 600, 12)]
    generated = worker.in_flight(lambda i: worker.generate(prompts[i], 64, seed=i, temperature=1.0), range(len(prompts)))
    scores = worker.in_flight(lambda p: worker.score(p), prompts)
    return [g.tokens for g in generated], numpy.concatenate(
        [g.logprobs for g in generated] + [s.logprobs for s in scores]
    )


def spread(values):
    return {"median": float(numpy.median(values)), "max": float(numpy.max(values))}


def run(arguments):
    old, new = Checkpoint(arguments.old), Checkpoint(arguments.new)
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        sent = {c: list(executor.map(lambda t: digest(t[3]), c.tensors)) for c in (old, new)}
    flags = shlex.split(arguments.worker_flags)
    rows = []
    with Worker.start(arguments.binary, arguments.old, flags) as worker:
        vocab_size = worker.info().model.vocab_size
        sender = Sender(worker)
        load = Load(worker, arguments.load, 200, vocab_size)
        time.sleep(arguments.settle)
        for step in range(1, arguments.updates + 1):
            calm = load.rate(time.perf_counter() - arguments.settle * 0.6, time.perf_counter())
            begin = time.perf_counter()
            checkpoint = new if step % 2 else old
            times, answer = sender.update(step, checkpoint, sent[checkpoint], sender.m.IN_FLIGHT_POLICY_KEEP)
            end = time.perf_counter()
            during = load.rate(begin + times["begin_ms"] / 1000, end - (times["commit_ms"] + times["verify_ms"]) / 1000)
            time.sleep(0.6)
            gap = load.longest_gap(end - times["commit_ms"] / 1000 - 0.2, end + 0.5)
            rows.append(times | {
                "pause_ms": answer.pause_ms,
                "wait_ms": answer.wait_ms,
                "kept": answer.kept,
                "longest_gap_ms": gap,
                "tok_s_before": calm,
                "tok_s_while_receiving": during,
                "push_gb_s": checkpoint.bytes / times["push_ms"] * 1e-6,
            })
            print(f"update {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
            time.sleep(arguments.settle)
        load.end()
        if arguments.updates % 2 == 0:
            raise ValueError("--updates: want an odd number, so that --new serves at the end")
        tokens, logprobs = answers(worker, vocab_size)
        digests = sender.digests()
    with Worker.start(arguments.binary, arguments.new, flags) as fresh:
        want_tokens, want_logprobs = answers(fresh, vocab_size)
        want_digests = Sender(fresh).digests()
        device = fresh.info().build.device
    differing = int((logprobs.view(numpy.uint32) != want_logprobs.view(numpy.uint32)).sum())
    result = {
        "transport": "stream",
        "mode": "staged",
        "gpus": 1,
        "shape": arguments.shape or pathlib.Path(arguments.new).name,
        "device": device,
        "bytes": new.bytes,
        "updates": len(rows),
        "load": arguments.load,
        "logprobs": len(logprobs),
        "logprobs_differing": differing,
        "tokens_differ": tokens != want_tokens,
        "digests_differing": sum(digests[name] != want_digests[name] for name in want_digests),
        "broadcast_gb_s": spread([row["push_gb_s"] for row in rows]),
        "nccl_gb_s": None,
    }
    for key in rows[0]:
        if key.endswith("_ms") or key.startswith("tok_s"):
            result[key] = spread([row[key] for row in rows])
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True)
    parser.add_argument("--new", required=True)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--worker_flags", default="--backend cuda")
    parser.add_argument("--shape", help="its name in the table (default: the directory's)")
    parser.add_argument("--updates", type=int, default=3, help="odd (default: 3)")
    parser.add_argument("--load", type=int, default=32, help="samples in flight (default: 32)")
    parser.add_argument("--settle", type=float, default=2.0, help="seconds before and between updates")
    parser.add_argument("--json", help="where the result goes")
    arguments = parser.parse_args()
    try:
        result = run(arguments)
    except Exception:
        traceback.print_exc()
        return 2
    print(json.dumps(result, indent=1))
    if arguments.json:
        found = measurement(__file__, result["device"], {"grpcio": grpc.__version__}) | {"results": [result]}
        pathlib.Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    broken = result["logprobs_differing"] or result["tokens_differ"] or result["digests_differing"]
    if broken:
        print("BROKEN: the updated worker is not the worker started from the new weights")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
