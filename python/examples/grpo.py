#!/usr/bin/env python3
"""GRPO on the tiny checkpoint, a worker beside the learner: generate, loss, step, publish, every step.

    python/examples/grpo.py --check                          # starts build/cpu/bin/lockstep-worker; about a minute
    python/examples/grpo.py --worker HOST:PORT --control HOST:PORT
    python/examples/grpo.py --noise 1                        # a control: perturbs the behaviour logprobs
    python/examples/grpo.py --device cuda --transport nccl --binary build/cuda/bin/lockstep-worker \\
        --worker_flags "--backend cuda --numerics hf --cuda_device 1"       # learner on GPU 0, worker on GPU 1

The task: "What is 25+58? " wants "83" and the end of the text. The checkpoint knows sums in other words and answers this
question wrongly most of the time. Reward 1 or 0. Problems with (7 a + b) mod 5 = 0 are held out: never trained on.

Loss: REINFORCE with advantages within each group, weighted by min(trainer / behaviour, --truncate) per token (truncated
importance sampling), the behaviour's log-probabilities as the worker returned them. With --device cuda the model is
bf16 and aligned (lockstep.trainer.align), fp32 masters are AdamW's, and both sides compute the same bits.

Exit status: 0; 1: --check found something wrong; 130, 143: ended by Ctrl-C or SIGTERM, with the worker it had started.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]
if importlib.util.find_spec("lockstep") is None:
    sys.path.insert(0, str(ROOT / "python"))

from lockstep import RolloutClient, SamplingParams, WeightPublisher, parity, text  # noqa: E402
from lockstep.hf import TransformersTrainer  # noqa: E402
from lockstep.metrics import same_bits  # noqa: E402
from lockstep.trainer import align, logprobs  # noqa: E402

# What --check wants: the rise of the mean reward and of held-out accuracy, and |trainer - rollout| with fp32 on both
# sides of a CPU (docs/learners.md).
RISE, HELDOUT_RISE = 0.3, 0.2
MISMATCH = parity.Thresholds(mean=1e-5, max=1e-3)
READY_S, STOP_S = 120, 10


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "tests/data/tiny"))
    parser.add_argument("--worker", help="data plane of a running worker; needs --control")
    parser.add_argument("--control", help="its control plane")
    parser.add_argument(
        "--binary", default=str(ROOT / "build/cpu/bin/lockstep-worker"), help="started without --worker"
    )
    parser.add_argument("--worker_flags", default="--numerics fp32", help="of its start (default: --numerics fp32)")
    parser.add_argument("--device", default="cpu", help="the learner's, as torch names it (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--align",
        action=argparse.BooleanOptionalAction,
        help="lockstep.trainer.align the model (default: on a GPU)",
    )
    parser.add_argument("--transport", choices=("stream", "nccl"), default="stream", help="of the weights")
    parser.add_argument("--nccl_library", help="of this process (default: torch's)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=24, help="groups a step")
    parser.add_argument("--group", type=int, default=16, help="samples of each prompt")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--truncate", type=float, default=2.0)
    parser.add_argument("--heldout", type=int, default=200, help="unseen problems, answered greedily before and after")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation added to behaviour logprobs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check", action="store_true", help="end with a parity check of the trained weights and a verdict"
    )
    parser.add_argument("--measurements", metavar="FILE", help="add the run to FILE (docs/measurements/grpo.json)")
    parser.add_argument("--tensorboard", metavar="DIR", help="log every step there; needs the package tensorboard")
    arguments = parser.parse_args(argv)
    if bool(arguments.worker) != bool(arguments.control):
        parser.error("--worker and --control go together")
    on_gpu = torch.device(arguments.device).type != "cpu"
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    arguments.align = on_gpu if arguments.align is None else arguments.align
    return arguments


@contextlib.contextmanager
def running_worker(arguments):
    """(data, control) addresses; a worker that was started here ends with the block, however that ends."""
    if arguments.worker:
        yield arguments.worker, arguments.control
        return
    command = [arguments.binary, "--model", arguments.model, *shlex.split(arguments.worker_flags)]
    command += ["--listen", "127.0.0.1:0", "--control_listen", "127.0.0.1:0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            timer = threading.Timer(READY_S, process.kill)
            timer.start()
            ready = re.match(r"lockstep-worker ready data=(\S+) control=(\S+)", process.stdout.readline())
            timer.cancel()
            if ready is None:
                status = process.wait(STOP_S)
                log.seek(0)
                raise RuntimeError(f"{' '.join(command)}\nnot ready, exit status {status}:\n{log.read()[-2000:]}")
            yield ready.groups()
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                print("the worker did not stop when told to: killed", file=sys.stderr)
            finally:
                process.kill()
                process.wait()
                process.stdout.close()


@contextlib.contextmanager
def ending_on_signals():
    """SIGTERM and Ctrl-C raise SystemExit in the block, so that everything it opened is closed."""

    def end(number, frame):
        os.write(2, f"grpo.py: ended by {signal.Signals(number).name}\n".encode())
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_tensorboard(directory):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        sys.exit("grpo.py: --tensorboard needs the package tensorboard: pip install tensorboard")
    return contextlib.closing(SummaryWriter(directory))


class Sums:
    """Problems: (prompt, answer)."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def draw(self, count, heldout):
        problems = []
        while len(problems) < count:
            a, b = self.random.randint(10, 99), self.random.randint(10, 99)
            if ((7 * a + b) % 5 == 0) == heldout:
                problems.append((f"What is {a}+{b}? ", str(a + b)))
        return problems


class MasterAdamW:
    """AdamW over fp32 masters of a model in fewer bits, whose own steps of learning_rate would be rounded away."""

    def __init__(self, model, learning_rate):
        self.parameters = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.masters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self):
        """One step with the gradients of the model, which are cleared, clipped to norm 1."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)


class Learner:
    def __init__(self, arguments, client, publisher_of):
        self.arguments, self.client = arguments, client
        self.device = torch.device(arguments.device)
        self.tokenizer = text.load_tokenizer(arguments.model)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        dtype = getattr(torch, arguments.dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        self.model = model.to(self.device).train()
        info = next(iter(client.info().values()))
        if arguments.align:
            print(align(self.model, info))
        self.optimizer = MasterAdamW(self.model, arguments.learning_rate)
        self.publisher = publisher_of(self.model)
        self.epoch = info.weight_version.epoch + 1

    def rewards(self, rollouts, problems):
        answers = text.decode(self.tokenizer, rollouts.tokens)
        return np.array(
            [
                float(sample.reason == "eos" and answer.strip() == problems[sample.prompt_index][1])
                for sample, answer in zip(rollouts, answers, strict=True)
            ],
            np.float32,
        )

    def ask(self, problems, n, **sampling):
        prompts = text.encode(self.tokenizer, [prompt for prompt, _ in problems])
        rollouts = self.client.generate(prompts, SamplingParams(max_tokens=8, **sampling), n=n, timeout=120)
        return rollouts, self.rewards(rollouts, problems)

    def accuracy(self, problems):
        """Greedy, by the worker."""
        return float(self.ask(problems, 1, temperature=0)[1].mean())

    def publish(self, step):
        return self.publisher.publish((self.epoch, step), self.model.state_dict().items())

    def step(self, number, problems):
        a = self.arguments
        begin = time.perf_counter()
        rollouts, rewards = self.ask(problems, a.group, seed=a.seed * 100_003 + number)
        versions = {tuple(span.weights) for sample in rollouts for span in sample.version_spans}
        generated = time.perf_counter()
        groups = rewards.reshape(-1, a.group)
        advantages = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-4)
        useful = np.repeat(groups.std(1) > 0, a.group)  # a group of equal rewards has no gradient
        if not useful.any():
            useful[: a.group] = True
        batch = rollouts.padded(pad_id=1, framework="torch")
        batch = type(batch)(*(getattr(batch, f.name)[useful].to(self.device) for f in dataclasses.fields(batch)))
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        new = logprobs(logits[:, :-1], batch.input_ids[:, 1:])
        mask, behaviour = batch.completion_mask[:, 1:], batch.logprobs[:, 1:]
        difference = (new.detach() - behaviour)[mask].abs()
        equal = same_bits(new.detach()[mask].cpu().numpy(), behaviour[mask].cpu().numpy())
        if a.noise:
            behaviour = behaviour + a.noise * torch.randn(behaviour.shape).to(self.device)
        weight = (new.detach() - behaviour).exp().clamp(max=a.truncate)
        advantage = torch.from_numpy(advantages.reshape(-1, 1)[useful]).to(self.device)
        loss = -(weight * advantage * new)[mask].sum() / sum(map(len, rollouts.tokens))
        loss.backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        trained = time.perf_counter()
        report = self.publish(number + 1)
        return {
            "step": number,
            "reward": float(rewards.mean()),
            "mismatch_mean": float(difference.mean()),
            "mismatch_max": float(difference.max()),
            "tokens": int(equal.size),
            "bit_equal": float(equal.mean()),
            "versions": sorted(versions),
            "staleness": max(number - version[1] for version in versions) if number else 0,
            "generate_s": generated - begin,
            "train_s": trained - generated,
            "publish_s": report.seconds,
            "pause_ms": max(worker.pause_ms for worker in report.workers),
        }


def make_printer():
    """print(step): a line, in colour where rich is installed."""
    try:
        from rich.console import Console

        out = Console(highlight=True, soft_wrap=True).print
    except ImportError:
        out = print

    def show(row):
        out(
            f"step {row['step']:3d}  reward {row['reward']:.3f}  |dlogp| mean {row['mismatch_mean']:.1e} max {row['mismatch_max']:.1e}  staleness {row['staleness']}  "
            f"generate {row['generate_s']:.2f} s  train {row['train_s']:.2f} s  publish {row['publish_s']:.3f} s"
        )

    return show


def curve(rewards, height=8):
    """The rewards as a bar for each step."""
    lines = [
        f"{level / height:6.2f} |" + "".join("##" if r > (level - 0.5) / height else "  " for r in rewards).rstrip()
        for level in range(height, 0, -1)
    ]
    return "\n".join(["reward", *lines, "       +" + "--" * len(rewards), f"        step 0 to {len(rewards) - 1}"])


def train(arguments):
    """One run: the record that --measurements writes, with --check the parity of the trained weights, and the steps.

    reward_first, reward_last: means over the first 3 and the last 5 steps.
    """
    torch.manual_seed(arguments.seed)
    begin = time.perf_counter()
    show, sums, report = make_printer(), Sums(arguments.seed), None
    with running_worker(arguments) as (data, control), RolloutClient(data) as client, contextlib.ExitStack() as stack:
        board = stack.enter_context(open_tensorboard(arguments.tensorboard)) if arguments.tensorboard else None
        learner = Learner(
            arguments, client, lambda model: stack.enter_context(make_publisher(arguments, control, model))
        )
        learner.publish(0)  # the learner's weights, whatever the worker had
        heldout = Sums(1234).draw(arguments.heldout, heldout=True)
        first = learner.accuracy(heldout)
        print(f"held-out accuracy before: {first:.3f}", flush=True)
        rows = []
        for number in range(arguments.steps):
            rows.append(learner.step(number, sums.draw(arguments.prompts, heldout=False)))
            show(rows[-1])
            sys.stdout.flush()
            if board is not None:
                for name in ("reward", "mismatch_mean", "mismatch_max", "generate_s", "train_s", "publish_s"):
                    board.add_scalar(name, rows[-1][name], number)
        last = learner.accuracy(heldout)
        print(f"held-out accuracy after: {last:.3f}", flush=True)
        seconds = time.perf_counter() - begin
        if arguments.check:
            trainer = TransformersTrainer(learner.model.eval())
            report = parity.check(client, trainer, control=control, thresholds=MISMATCH, seed=arguments.seed)
    rewards = [row["reward"] for row in rows]
    return (
        {
            "device": device_text(),
            "seed": arguments.seed,
            "steps": arguments.steps,
            "noise": arguments.noise,
            "truncate": arguments.truncate,
            "reward_first": float(np.mean(rewards[:3])),
            "reward_last": float(np.mean(rewards[-5:])),
            "heldout_first": first,
            "heldout_last": last,
            "mismatch_mean": float(np.mean([row["mismatch_mean"] for row in rows])),
            "mismatch_max": max(row["mismatch_max"] for row in rows),
            "bit_equal": float(np.average([row["bit_equal"] for row in rows], weights=[row["tokens"] for row in rows])),
            "seconds": seconds,
            "rewards": [round(reward, 4) for reward in rewards],
        },
        report,
        rows,
    )


def make_publisher(arguments, control, model):
    options = {"transport": arguments.transport}
    if arguments.transport == "nccl":
        options |= {"device": arguments.device, "nccl_library": arguments.nccl_library}
    return WeightPublisher(control, manifest_from=model, **options)


def faults(run, report):
    """What --check finds wrong with a run and the parity of its weights; empty: nothing."""
    found = []
    for what, least in (("reward", RISE), ("heldout", HELDOUT_RISE)):
        first, last = run[f"{what}_first"], run[f"{what}_last"]
        if not last >= first + least:
            found.append(f"{what}: {first:.3f} to {last:.3f}, want a rise of {least}")
    for what, most in (("mean", MISMATCH.mean), ("max", MISMATCH.max)):
        value = run[f"mismatch_{what}"]
        if not value <= most:
            found.append(f"rollout against trainer in training: {what} {value:.3g}, want at most {most:g}")
    found += [f"parity of the trained weights: {broken}" for layout in report.layouts for broken in layout.broken]
    return found + [f"parity of the trained weights: {finding}" for finding in report.findings]


def parity_table(report):
    metrics = report.layouts[0].metrics
    lines = [f"parity of the trained weights {tuple(report.weight_version)}, profile {report.profile}:"]
    lines += [f"  {name:34s} {value:.4g}" for name, value in metrics.items()]
    lines.append(
        f"  want: mean at most {MISMATCH.mean:g}, largest at most {MISMATCH.max:g} (on a CPU a tolerance, not bits)"
    )
    if not report.findings:
        lines.append("  the tensors at the worker have the digests of the trainer's")
    return "\n".join(lines)


def device_text():
    info = pathlib.Path("/proc/cpuinfo").read_text() if pathlib.Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return f"{model[1].strip() if model else platform.machine()}, {os.cpu_count()} cores"


def git(*arguments):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def header(path):
    """What all runs of a file have in common. commit: with "+changes" where tracked files but the file itself differ."""
    status = git("status", "--porcelain", "--untracked-files=no").stdout.splitlines()
    changes = [line for line in status if line[3:] != os.path.relpath(path, ROOT)]
    return {
        "commit": git("rev-parse", "HEAD").stdout.strip() + "+changes" * bool(changes),
        "device": device_text(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def read_measurements(path):
    """The file's record, begun if there is none. Exits where its runs are of another commit, device or versions."""
    common = header(path)
    if not os.path.exists(path):
        return common | {"runs": []}
    record = json.loads(pathlib.Path(path).read_text())
    for name, value in common.items():
        if record[name] != value:
            sys.exit(f"grpo.py: {path} has runs of {name} {record[name]}, this is {value}: remove it to begin anew")
    return record


def write_measurements(path, run, command):
    """Adds the run to the file, in place of one with the same settings."""
    record = read_measurements(path)
    same = ("seed", "steps", "noise", "truncate")
    runs = [old for old in record["runs"] if any(old[name] != run[name] for name in same)]
    runs.append(run | {"command": command})
    about = {"command": "; ".join(r["command"] for r in runs), "date": datetime.date.today().isoformat()}
    common = {name: record[name] for name in ("commit", "device", "versions")}
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(common | about | {"runs": runs}, indent=1) + "\n")
    partial.replace(path)


def main(argv=None):
    arguments = parse_arguments(argv)
    if arguments.measurements:
        read_measurements(arguments.measurements)
    with ending_on_signals():
        run, report, _ = train(arguments)
    print("\n" + curve(run["rewards"]))
    print(
        f"\nreward {run['reward_first']:.3f} -> {run['reward_last']:.3f}, held-out accuracy {run['heldout_first']:.3f} -> {run['heldout_last']:.3f}; "
        f"|trainer - rollout| in training: mean {run['mismatch_mean']:.1e}, largest {run['mismatch_max']:.1e}; {run['seconds']:.0f} s"
    )
    if arguments.measurements:
        threads = "".join(f"{name}={os.environ[name]} " for name in ("OMP_NUM_THREADS",) if name in os.environ)
        words = sys.argv[1:] if argv is None else argv
        write_measurements(arguments.measurements, run, " ".join([f"{threads}python/examples/grpo.py", *words]))
    if not arguments.check:
        return 0
    print("\n" + parity_table(report))
    found = faults(run, report)
    for fault in found:
        print(f"FAILED: {fault}", file=sys.stderr)
    print(
        "\ncheck "
        + ("failed" if found else "passed: the reward rose, and the worker computes what the trainer computes")
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
