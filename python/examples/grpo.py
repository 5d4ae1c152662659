#!/usr/bin/env python3
"""GRPO on the tiny checkpoint, a worker beside the learner: generate, loss, step, publish, every step.

    python/examples/grpo.py                                  # starts build/cpu/bin/lockstep-worker; about a minute
    python/examples/grpo.py --worker HOST:PORT --control HOST:PORT
    python/examples/grpo.py --noise 0.5                      # what mismatch costs: perturbs the behaviour logprobs

The task: "What is 25+58? " wants "83" and the end of the text. The checkpoint knows sums in other words and answers this
question wrongly most of the time. Reward 1 or 0. Problems with (7 a + b) mod 5 = 0 are held out: never trained on.

Loss: REINFORCE with advantages within each group, weighted by min(trainer / behaviour, --truncate) per token (truncated
importance sampling), the behaviour's log-probabilities as the worker returned them.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import pathlib
import platform
import random
import re
import subprocess
import sys
import time

import numpy as np
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]
with contextlib.suppress(ImportError):
    pass  # installed
if "lockstep" not in sys.modules:
    sys.path.insert(0, str(ROOT / "python"))

from lockstep import RolloutClient, SamplingParams, WeightPublisher, text  # noqa: E402
from lockstep.trainer import logprobs  # noqa: E402


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "tests/data/tiny"))
    parser.add_argument("--worker", help="data plane of a running worker; needs --control")
    parser.add_argument("--control", help="its control plane")
    parser.add_argument(
        "--binary", default=str(ROOT / "build/cpu/bin/lockstep-worker"), help="started without --worker"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=24, help="groups a step")
    parser.add_argument("--group", type=int, default=16, help="samples of each prompt")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--truncate", type=float, default=2.0)
    parser.add_argument("--heldout", type=int, default=200, help="unseen problems, answered greedily before and after")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation added to behaviour logprobs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="append the run to this file (docs/measurements/grpo.json)")
    arguments = parser.parse_args(argv)
    if bool(arguments.worker) != bool(arguments.control):
        parser.error("--worker and --control go together")
    return arguments


@contextlib.contextmanager
def running_worker(arguments):
    """(data, control) addresses; a worker that was started here ends with the block."""
    if arguments.worker:
        yield arguments.worker, arguments.control
        return
    command = [arguments.binary, "--model", arguments.model, "--numerics", "fp32"]
    command += ["--listen", "127.0.0.1:0", "--control_listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        ready = re.match(r"lockstep-worker ready data=(\S+) control=(\S+)", process.stdout.readline())
        if ready is None:
            raise RuntimeError(f"{' '.join(command)}\n{process.communicate()[1][-2000:]}")
        yield ready.groups()
    finally:
        process.kill()
        process.communicate()


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


class Learner:
    def __init__(self, arguments, client, publisher_of):
        self.arguments, self.client = arguments, client
        self.tokenizer = text.load_tokenizer(arguments.model)
        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.publisher = publisher_of(self.model)
        self.epoch = next(iter(client.info().values())).weight_version.epoch + 1

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
        batch = type(batch)(*(getattr(batch, f.name)[useful] for f in dataclasses.fields(batch)))
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        new = logprobs(logits[:, :-1], batch.input_ids[:, 1:])
        mask, behaviour = batch.completion_mask[:, 1:], batch.logprobs[:, 1:]
        difference = (new.detach() - behaviour)[mask].abs()
        if a.noise:
            behaviour = behaviour + a.noise * torch.randn(behaviour.shape)
        weight = (new.detach() - behaviour).exp().clamp(max=a.truncate)
        advantage = torch.from_numpy(advantages.reshape(-1, 1)[useful])
        loss = -(weight * advantage * new)[mask].sum() / sum(map(len, rollouts.tokens))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        trained = time.perf_counter()
        report = self.publish(number + 1)
        return {
            "step": number,
            "reward": float(rewards.mean()),
            "mismatch_mean": float(difference.mean()),
            "mismatch_max": float(difference.max()),
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
            f"step {row['step']:3d}  reward {row['reward']:.3f}  {'#' * round(40 * row['reward']):40s}  "
            f"|dlogp| mean {row['mismatch_mean']:.1e} max {row['mismatch_max']:.1e}  staleness {row['staleness']}  "
            f"generate {row['generate_s']:.2f} s  train {row['train_s']:.2f} s  publish {row['publish_s']:.3f} s"
        )

    return show


def train(arguments):
    """One run; the record that --json writes. reward_first, reward_last: means over the first 3 and the last 5 steps."""
    torch.manual_seed(arguments.seed)
    begin = time.perf_counter()
    show, sums = make_printer(), Sums(arguments.seed)
    with running_worker(arguments) as (data, control), RolloutClient(data) as client, contextlib.ExitStack() as stack:
        learner = Learner(
            arguments, client, lambda model: stack.enter_context(WeightPublisher(control, manifest_from=model))
        )
        learner.publish(0)  # the learner's fp32 weights, whatever the worker had
        heldout = Sums(1234).draw(arguments.heldout, heldout=True)
        first = learner.accuracy(heldout)
        print(f"held-out accuracy before: {first:.3f}", flush=True)
        rows = []
        for number in range(arguments.steps):
            rows.append(learner.step(number, sums.draw(arguments.prompts, heldout=False)))
            show(rows[-1])
        last = learner.accuracy(heldout)
        print(f"held-out accuracy after: {last:.3f}", flush=True)
    rewards = [row["reward"] for row in rows]
    return {
        "device": platform.processor() or platform.machine(),
        "seed": arguments.seed,
        "steps": arguments.steps,
        "noise": arguments.noise,
        "reward_first": float(np.mean(rewards[:3])),
        "reward_last": float(np.mean(rewards[-5:])),
        "heldout_first": first,
        "heldout_last": last,
        "mismatch_mean": float(np.mean([row["mismatch_mean"] for row in rows])),
        "mismatch_max": max(row["mismatch_max"] for row in rows),
        "seconds": time.perf_counter() - begin,
        "rewards": [round(reward, 4) for reward in rewards],
    }


def write_json(path, run, command):
    """Adds the run to the file; the header is that of the last run."""
    path = pathlib.Path(path)
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    record = {
        "commit": git.stdout.strip(),
        "command": command,
        "device": run["device"],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": datetime.date.today().isoformat(),
        "runs": [*runs, run],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(argv=None):
    arguments = parse_arguments(argv)
    run = train(arguments)
    print(
        f"reward {run['reward_first']:.3f} -> {run['reward_last']:.3f}, held-out {run['heldout_first']:.3f} -> {run['heldout_last']:.3f}, "
        f"mismatch mean {run['mismatch_mean']:.1e} max {run['mismatch_max']:.1e}, {run['seconds']:.0f} s"
    )
    if arguments.json:
        write_json(
            arguments.json, run, " ".join(["python/examples/grpo.py", *(sys.argv[1:] if argv is None else argv)])
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
