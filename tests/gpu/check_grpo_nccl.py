#!/usr/bin/env python3
"""python/examples/grpo.py on two GPUs: the learner on the first, a worker on the second, weights by NCCL. With
--one_gpu both are on the first (one_gpu.py).

    tests/gpu/check_grpo_nccl.py --binary build/cuda/bin/lockstep-worker --json OUT

Starts the worker with the tiny checkpoint and runs the example in this process, with the aligned model. Promise: in
every step the trainer's log-probabilities of all tokens of the loss are the worker's in bits, and the mean reward rises
by --rise between the first and the last 10 steps. How long weights take is reported.

Where fla refuses its backward pass (Hopper with Triton 3.4 to 3.7.0), fla_backward.py stands in for one of its kernels.

Exit status: 0 both promises hold; 1 one is broken (with --device cpu no bits are promised: a mean |difference| of at
most 1e-5 in every step); 2 it could not run.
"""

import argparse
import importlib.util
import json
import pathlib
import shlex
import sys
import time
import traceback

import numpy
import one_gpu
from lockstep_client import ROOT, Worker

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "python" / "examples")]
if importlib.util.find_spec("lockstep") is None:
    sys.path.append(str(ROOT / "python"))
from build_tree import measurement  # noqa: E402
from check_weights import spread  # noqa: E402
from check_weights_nccl import torch_nccl  # noqa: E402

FEW = 10  # steps at either end whose mean reward counts
CPU_MEAN = 1e-5
LEARNER_GPU, WORKER_GPU = 0, 1


def prepare_fla():
    """Fewer configurations to compile, and a backward pass. Returns what that is, in words."""
    import fla_backward
    import trainer

    trainer.pin_fla_configurations(backward=True)
    return fla_backward.install()


def broken_promises(rows, rise, on_gpu):
    """What a run's steps fail to keep; empty if they keep all."""
    found = []
    for row in rows:
        if on_gpu and not (row["bit_equal"] == 1 and row["mismatch_max"] == 0):
            text = f"{row['bit_equal']:.4%} of {row['tokens']} tokens equal in bits, largest {row['mismatch_max']:.3g}"
            found.append(f"step {row['step']}: {text}")
        if not on_gpu and not row["mismatch_mean"] <= CPU_MEAN:
            found.append(f"step {row['step']}: mean |difference| {row['mismatch_mean']:.3g}, want at most {CPU_MEAN:g}")
    first, last = rewards_of(rows)
    if not last >= first + rise:
        found.append(f"reward: {first:.3f} to {last:.3f}, want a rise of {rise}")
    return found


def rewards_of(rows):
    """Means over the first and the last steps."""
    rewards = [row["reward"] for row in rows]
    few = min(FEW, len(rewards) // 2)
    return float(numpy.mean(rewards[:few])), float(numpy.mean(rewards[-few:]))


def run(arguments):
    on_gpu = arguments.device != "cpu"
    backward = prepare_fla() if on_gpu else ""
    import grpo
    import torch
    import trainer

    flags = [*shlex.split(arguments.worker_flags), "--nccl_library", arguments.nccl_library]
    environment = one_gpu.environment("worker") if arguments.one_gpu else None
    if arguments.one_gpu:
        one_gpu.enter("learner")
    with Worker.start(arguments.binary, arguments.model, flags, environment=environment) as worker:
        info = worker.info()
        example = ["--model", arguments.model, "--worker", worker.address, "--control", worker.control]
        example += ["--device", arguments.device, "--align", "--transport", "nccl", "--seed", str(arguments.seed)]
        example += ["--steps", str(arguments.steps), "--heldout", str(arguments.heldout)]
        if not on_gpu:
            example += ["--nccl_library", arguments.nccl_library]
        begin = time.perf_counter()
        try:
            result, _, rows = grpo.train(grpo.parse_arguments(example))
        except BaseException:
            print(worker.log()[-4000:], file=sys.stderr)
            raise
        seconds = time.perf_counter() - begin
    first, last = rewards_of(rows)
    versions = trainer.versions() | ({"gdn_backward": backward} if backward else {})
    if on_gpu:
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    device = f"{1 if arguments.one_gpu else 2} x {info.build.device}" if on_gpu else "cpu"
    return {
        **measurement(__file__, device, versions),
        **({"note": one_gpu.NOTE} if arguments.one_gpu else {}),
        "profile": info.numerics.profile,
        "steps": arguments.steps,
        "seconds": seconds,
        "reward_first": first,
        "reward_last": last,
        "heldout_first": result["heldout_first"],
        "heldout_last": result["heldout_last"],
        "tokens": sum(row["tokens"] for row in rows),
        "steps_bit_equal": sum(row["bit_equal"] == 1 for row in rows),
        "bit_equal": result["bit_equal"],
        "mismatch_max": result["mismatch_max"],
        "sync_ms": spread([1000 * row["publish_s"] for row in rows]),  # publish(), from call to return
        "pause_ms": spread([row["pause_ms"] for row in rows]),  # for which the worker ran no step
        "generate_ms": spread([1000 * row["generate_s"] for row in rows]),
        "train_ms": spread([1000 * row["train_s"] for row in rows]),
        "rows": rows,
        "broken": broken_promises(rows, arguments.rise, on_gpu),
    }


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True, help="lockstep-worker to start")
    parser.add_argument("--model", default=str(ROOT / "tests" / "data" / "tiny"), help="default: the tiny checkpoint")
    parser.add_argument("--worker_flags", help="default: --backend cuda --numerics hf --cuda_device N, its GPU")
    parser.add_argument("--one_gpu", action="store_true", help="learner and worker share GPU 0")
    parser.add_argument("--device", default=f"cuda:{LEARNER_GPU}", help="the learner's (default: %(default)s)")
    parser.add_argument("--nccl_library", default=torch_nccl(), help="the worker's (default: that of torch's wheel)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--heldout", type=int, default=200, help="unseen problems, before and after (default: 200)")
    parser.add_argument("--rise", type=float, default=0.3, help="of the mean reward, at least (default: 0.3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="where the result goes")
    arguments = parser.parse_args(argv)
    if arguments.worker_flags is None:
        gpu = LEARNER_GPU if arguments.one_gpu else WORKER_GPU
        arguments.worker_flags = f"--backend cuda --numerics hf --cuda_device {gpu}"
        if arguments.one_gpu:
            arguments.worker_flags += " " + shlex.join(one_gpu.WORKER_FLAGS)
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps}: want 2 at least")
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    try:
        found = run(arguments)
    except Exception:
        traceback.print_exc()
        return 2
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}, indent=1))
    for text in found["broken"]:
        print(f"BROKEN: {text}")
    return 1 if found["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
