#!/usr/bin/env python3
"""Weight updates over NCCL between two GPUs: the worker serves on the first while the learner sends from the second.

    tests/gpu/check_weights_nccl.py --old DIR --new DIR --binary build/cuda/bin/lockstep-worker

--old, --new: checkpoints of one shape. Under load: updates with several numbers of NCCL's thread blocks, then --updates
of them with the chosen one, some by a sender that gathers shard by shard; then --kills learners killed with SIGKILL in
mid-broadcast, through which the old version must serve (direct: or stand still, and serve again once it is restored);
then one more update, after which the worker must compute what a worker started from the new weights computes, in bits.
All of it once for each of --modes, which are values of the worker's --weights_receive. Needs the lockstep package, torch
and two GPUs.

With --one_gpu both are on one (one_gpu.py), which shows the same of NCCL's code path, of deaths and of bits; rates,
pauses and the slowdown are then recorded, but are not those of two GPUs.

Exit status: 0 every bit and digest is equal, every kill was survived and left no memory behind; 1 not; 2 it could not
run.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
import traceback

import grpc
import numpy
import one_gpu
import torch
from check_weights import Load, Sender, answers, spread
from lockstep_client import ROOT, Worker

import lockstep

sys.path.append(str(ROOT / "tools"))
from build_tree import measurement  # noqa: E402

# Children begin with torch imported, no CUDA and no gRPC threads: a learner is there in a second.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["torch", "lockstep", "check_weights"])
WORKER_GPU = 0
SETTLE_S = 0.4
# For the learner's next result; sockets and turns on one GPU may take minutes for 15 GB.
RESULT_S = {1: 500, 2: 120}
LEAK_MIB = 64
LEAK_WAIT_S = 5
PIECE_BYTES = 1 << 30
PAUSE_GOAL_MS = {"staged": 20, "direct": 100}  # for which an update stops generation, at most


def torch_nccl():
    """The library that this process has: ranks of two versions do not come together."""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:  # no wheel of nvidia's at all
        spec = None
    folders = spec.submodule_search_locations if spec else []
    return next(
        (str(p) for f in folders for p in [pathlib.Path(f) / "lib" / "libnccl.so.2"] if p.exists()), "libnccl.so.2"
    )


def load_tensors(directory, device, names=None):
    """By name; `names`: those alone."""
    from safetensors import safe_open

    tensors = {}
    for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="pt", device=str(device)) as file:
            here = file.keys() if names is None else names & set(file.keys())
            tensors |= {name: file.get_tensor(name) for name in here}
    return tensors


def nccl_rank(rank, port, out):
    """NCCL's own rate: broadcasts of 1 GiB from the learner's GPU, the best of three times fifteen."""
    torch.cuda.set_device(1 if rank == 0 else WORKER_GPU)
    torch.distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    data = torch.zeros(PIECE_BYTES, dtype=torch.uint8, device="cuda")
    torch.distributed.broadcast(data, 0)
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(15):
            torch.distributed.broadcast(data, 0)
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end))
    if rank == 0:
        out.put(15 * PIECE_BYTES / best * 1e-6)
    torch.distributed.destroy_process_group()


def nccl_rate():
    out = FORK.Queue()
    ranks = [FORK.Process(target=nccl_rank, args=(rank, 29531, out)) for rank in range(2)]
    for process in ranks:
        process.start()
    rate = out.get(timeout=120)
    for process in ranks:
        process.join(30)
    return rate


def run_load(address, count, vocab_size, pipe):
    """In a process of its own, so that its Python takes no time from the learner's. Answers each message with all
    arrivals so far."""
    load = Load(Worker(address), count, 200, vocab_size)
    while pipe.recv():
        pipe.send(list(load.arrivals))
    os._exit(0)  # its streams end with it


class Arrivals:
    """The load's tokens: when they came."""

    def __init__(self, worker, count, vocab_size):
        self.pipe, other = FORK.Pipe()
        self.process = FORK.Process(target=run_load, args=(worker.address, count, vocab_size, other), daemon=True)
        self.process.start()

    def between(self, begin, end):
        self.pipe.send(True)
        return sorted((t, n) for t, n in self.pipe.recv() if n and begin <= t < end)

    def rate(self, begin, end):
        return sum(n for _, n in self.between(begin, end)) / (end - begin)

    def longest_gap_ms(self, begin, end):
        times = [t for t, _ in self.between(begin, end)]
        return 1000 * max((b - a for a, b in zip(times, times[1:])), default=1e9)

    def end(self):
        self.pipe.send(False)
        self.process.join(30)


def gathered(tensors):
    """As a sharded learner's iterator: each tensor is put together from eight shards as it is asked for."""
    for name, tensor in tensors.items():
        yield name, torch.cat(tensor.chunk(8)) if tensor.dim() > 1 else tensor.clone()


def enter_learner(arguments):
    if arguments.one_gpu:
        one_gpu.enter("learner")
    torch.cuda.set_device(learner_gpu(arguments))


def learner_gpu(arguments):
    return 0 if arguments.one_gpu else 1


def learner(arguments, control, jobs, results):
    """The learner's process: publishes what `jobs` says. Its failure is its last result."""
    try:
        enter_learner(arguments)
        publish_jobs(arguments, control, jobs, results)
    except Exception:
        results.put(traceback.format_exc())


def publish_jobs(arguments, control, jobs, results):
    sets = [load_tensors(directory, f"cuda:{learner_gpu(arguments)}") for directory in (arguments.old, arguments.new)]
    manifest = [(name, tensor.dtype, tensor.shape) for name, tensor in sets[0].items()]
    publishers = {}
    while (job := jobs.get()) is not None:
        which, step, ctas, gather = job
        if ctas not in publishers:
            for old in publishers.values():
                old.close()
            publishers = {
                ctas: lockstep.WeightPublisher(control, manifest_from=manifest, transport="nccl", max_ctas=ctas)
            }
        tensors = sets[which]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        report = publishers[ctas].publish(step, gathered(tensors) if gather else tensors.items(), policy="keep")
        results.put((begin, time.perf_counter(), report.bytes, report.workers[0]))
    for publisher in publishers.values():
        publisher.close()
    results.put(None)


def victim(arguments, control, manifest, step, ready):
    """A learner that dies in mid-broadcast. Its tensors are whatever the memory holds: they must never serve."""
    enter_learner(arguments)

    def tensors():
        for i, (name, dtype, shape) in enumerate(manifest):
            yield name, torch.empty(shape, dtype=dtype, device="cuda")
            if i == len(manifest) // 2:
                ready.send(True)

    lockstep.WeightPublisher(control, manifest_from=manifest, transport="nccl").publish(step, tensors())


def memory_used():
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", str(WORKER_GPU)]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def memory_after(before):
    """In use once what died has given back its own, or after LEAK_WAIT_S."""
    deadline = time.monotonic() + LEAK_WAIT_S
    while (used := memory_used()) > before + LEAK_MIB and time.monotonic() < deadline:
        time.sleep(0.1)
    return used


def leaked(used):
    """`used`: MiB before the first death and after each."""
    return used[-1] > used[0] + LEAK_MIB


def gpus(arguments):
    return 1 if arguments.one_gpu else 2


class Check:
    def __init__(self, arguments, mode, worker, nccl_gb_s):
        self.arguments, self.mode, self.worker, self.nccl_gb_s = arguments, mode, worker, nccl_gb_s
        self.vocab_size = worker.info().model.vocab_size
        self.jobs, self.results = FORK.Queue(), FORK.Queue()
        self.process = FORK.Process(target=learner, args=(arguments, worker.control, self.jobs, self.results))
        self.process.start()
        self.step = 0
        self.which = 0
        self.load = Arrivals(worker, arguments.load, self.vocab_size)

    def result(self):
        result = self.results.get(timeout=RESULT_S[gpus(self.arguments)])
        if isinstance(result, str):
            raise RuntimeError(f"the learner failed: {result}")
        return result

    def update(self, ctas, gather):
        self.step += 1
        self.which ^= 1
        time.sleep(SETTLE_S)
        self.jobs.put((self.which, (0, self.step), ctas, gather))
        begin, end, size, report = self.result()
        time.sleep(0.15)
        receiving = begin + report.begin_s, begin + report.begin_s + report.push_s
        first = next((t for t, _ in self.load.between(end, end + 0.15)), float("inf"))
        row = {f"{stage}_ms": 1000 * getattr(report, f"{stage}_s") for stage in ("begin", "push", "verify", "commit")}
        row |= {"pause_ms": report.pause_ms, "wait_ms": report.wait_ms}
        row["begin_to_first_token_ms"] = 1000 * (first - begin)
        row["longest_gap_ms"] = self.load.longest_gap_ms(end - report.commit_s - 0.05, end + 0.1)
        row["tok_s_before"] = self.load.rate(begin - 0.3, begin)
        row["tok_s_while_receiving"] = self.load.rate(*receiving)
        row["broadcast_gb_s"] = size / report.push_s * 1e-9
        self.bytes = size
        return row

    def series(self, count, ctas, gather=False):
        """Updates in one group; the first, which makes it, does not count."""
        rows = [self.update(ctas, gather) for _ in range(count + 1)][1:]
        result = {
            "transport": "nccl",
            "mode": self.mode,
            "gpus": gpus(self.arguments),
            "shape": self.arguments.shape,
            "bytes": self.bytes,
        }
        result |= {"updates": count, "max_ctas": ctas, "sender": "gathers shards" if gather else "has whole tensors"}
        result |= {"load": self.arguments.load, "nccl_gb_s": self.nccl_gb_s}
        result |= {key: spread([row[key] for row in rows]) for key in rows[0]}
        before, during = (sum(row[key] for row in rows) for key in ("tok_s_before", "tok_s_while_receiving"))
        result["slowdown_while_receiving"] = 1 - during / before
        # Of decoding, in all: what the slowdown costs while bytes arrive, and the pause.
        result["lost_ms"] = (
            result["slowdown_while_receiving"] * result["push_ms"]["median"] + result["pause_ms"]["median"]
        )
        if not self.arguments.one_gpu:
            result["pause_goal_ms"] = PAUSE_GOAL_MS[self.mode]
            result["pause_goal_met"] = result["pause_ms"]["max"] <= PAUSE_GOAL_MS[self.mode]
        print(
            ", ".join(f"{k} {v['median']:.4g}" if isinstance(v, dict) else f"{k} {v}" for k, v in result.items()),
            flush=True,
        )
        return result

    def stop_learner(self):
        self.jobs.put(None)
        self.result()
        self.process.join(60)
        if self.process.exitcode is None:
            raise RuntimeError("the learner did not end within 60 s")

    def kills(self, count):
        """Learners killed in mid-broadcast; what the worker says and does meanwhile."""
        sender = Sender(self.worker)
        manifest = [
            (t.name, {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}[t.dtype], tuple(t.shape))
            for t in sender.stubs[0].GetDigests(sender.m.GetDigestsRequest(), timeout=300).tensors
        ]
        before, memory = sender.digests(), memory_used()
        survived, recovery_ms, gaps_ms, used = 0, [], [], [memory]
        for k in range(count):
            ready, other = FORK.Pipe()
            child = FORK.Process(target=victim, args=(self.arguments, self.worker.control, manifest, (1 + k, 0), other))
            child.start()
            began = time.perf_counter()
            if not ready.poll(60):
                raise RuntimeError("the learner that was to be killed never came to its broadcasts")
            time.sleep(0.003 * (k % 5))
            os.kill(child.pid, signal.SIGKILL)
            killed = time.perf_counter()
            child.join(30)
            # It held the update; its connection's end must have ended the receive, so Rollback is prompt.
            version = {"epoch": 1 + k, "step": 0}
            sender.stubs[0].Rollback(sender.m.RollbackRequest(version=version), timeout=30)
            status = sender.stubs[0].GetStatus(sender.m.GetStatusRequest(), timeout=30)
            recovered = time.perf_counter()
            recovery_ms.append(1000 * (recovered - killed))
            time.sleep(0.3)
            gaps_ms.append(self.load.longest_gap_ms(began, recovered + 0.25))
            serving = (status.weight_version.epoch, status.weight_version.step)
            used.append(memory_after(memory))
            survived += serving == (0, self.step) and status.state == sender.m.UPDATE_STATE_SERVING
        same = sender.digests() == before
        return {
            "kills": count,
            "survived": survived,
            "digests_as_before": same,
            "recovery_ms": spread(recovery_ms),
            "longest_gap_ms": spread(gaps_ms),
            "device_memory_mib": used,  # before, and after each
        }


def run_mode(arguments, mode, rate):
    flags = [*shlex.split(arguments.worker_flags), "--cuda_device", str(WORKER_GPU)]
    flags += ["--nccl_library", arguments.nccl_library, "--weights_receive", mode]
    environment = None
    if arguments.one_gpu:
        flags += one_gpu.WORKER_FLAGS
        environment = one_gpu.environment("worker")
    rows = []
    with Worker.start(arguments.binary, arguments.old, flags, environment=environment) as worker:
        check = Check(arguments, mode, worker, rate)
        for ctas in arguments.ctas:
            rows.append(check.series(5, ctas))
        rows.append(check.series(arguments.updates, arguments.max_ctas))
        rows.append(check.series(arguments.gathered, arguments.max_ctas, gather=True))
        check.stop_learner()
        kills = check.kills(arguments.kills)
        print(kills, flush=True)
        check.load.end()
        # The next update succeeds, and is the new weights'.
        last = Check(arguments, mode, worker, rate)
        last.load.end()
        last.jobs.put((1, (100, 0), arguments.max_ctas, False))
        last.result()
        last.stop_learner()
        tokens, logprobs = answers(worker, check.vocab_size)
        digests = Sender(worker).digests()
    with Worker.start(arguments.binary, arguments.new, flags) as fresh:
        want_tokens, want_logprobs = answers(fresh, check.vocab_size)
        want_digests = Sender(fresh).digests()
        device = fresh.info().build.device
    bits = {
        "logprobs": len(logprobs),
        "logprobs_differing": int((logprobs.view(numpy.uint32) != want_logprobs.view(numpy.uint32)).sum()),
        "tokens_differ": tokens != want_tokens,
        "digests_differing": sum(digests[name] != want_digests[name] for name in want_digests),
    }
    return device, rows, kills, bits


def write(path, device, found, arguments):
    versions = {
        "grpcio": grpc.__version__,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }
    header = measurement(__file__, f"{gpus(arguments)} x {device}", versions)
    note = {"note": one_gpu.NOTE} if arguments.one_gpu else {}
    pathlib.Path(path).write_text(json.dumps(header | note | found, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True)
    parser.add_argument("--new", required=True)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--worker_flags", default="--backend cuda")
    parser.add_argument("--nccl_library", default=torch_nccl(), help="the worker's (default: that of torch's wheel)")
    parser.add_argument("--shape", required=True, help="its name in the table")
    parser.add_argument("--modes", nargs="+", default=["staged"], choices=tuple(PAUSE_GOAL_MS))
    parser.add_argument("--one_gpu", action="store_true", help="learner and worker share GPU 0")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--gathered", type=int, default=4, help="updates from shards (default: 4)")
    parser.add_argument("--ctas", type=int, nargs="*", default=[0, 4, 8, 16], help="numbers of thread blocks to try")
    parser.add_argument("--max_ctas", type=int, default=0, help="for the --updates")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--load", type=int, default=32, help="samples in flight (default: 32)")
    parser.add_argument("--json", help="where the result goes")
    arguments = parser.parse_args()
    try:
        rate = None
        if not arguments.one_gpu:
            rate = nccl_rate()
            print(f"NCCL's own broadcasts: {rate:.1f} GB/s", flush=True)
        rows, kills, bits = [], {}, {}
        for mode in arguments.modes:
            device, more, kills[mode], bits[mode] = run_mode(arguments, mode, rate)
            rows += more
            if arguments.json:
                write(arguments.json, device, {"results": rows, "kills": kills, "bits": bits}, arguments)
    except Exception:
        traceback.print_exc()
        return 2
    print(json.dumps({"kills": kills, "bits": bits}, indent=1))
    broken = False
    for mode in arguments.modes:
        if bits[mode]["logprobs_differing"] or bits[mode]["tokens_differ"] or bits[mode]["digests_differing"]:
            print(f"BROKEN ({mode}): the updated worker is not the worker started from the new weights")
            broken = True
        if kills[mode]["survived"] < kills[mode]["kills"] or not kills[mode]["digests_as_before"]:
            print(f"BROKEN ({mode}): a learner's death touched what serves")
            broken = True
        if leaked(kills[mode]["device_memory_mib"]):
            print(f"BROKEN ({mode}): memory of the dead is still held: {kills[mode]['device_memory_mib']} MiB")
            broken = True
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
