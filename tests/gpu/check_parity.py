#!/usr/bin/env python3
"""A worker's log-probabilities against the trainer's own forward over the same tokens, in bits.

    tests/gpu/check_parity.py --model DIR --binary build/cuda/bin/lockstep-worker --worker_flags "--backend cuda"
    tests/gpu/check_parity.py --model DIR --worker HOST:PORT --modes nosplit --lengths 512,2048

1. The worker generates sequences and scores them and random ones, many at once. Generate = Score, in bits: invariance.
2. The trainer (transformers, on a GPU with fla's kernels) computes the same tokens, each sequence alone and unpadded:
   fp32 log_softmax of its bf16 logits. With --top_k also the log-probabilities of the worker's k best tokens.
   mode `stock`: PyTorch's defaults; `nosplit`: the two settings that stop cuBLAS from splitting k.
3. self_noise: the trainer against itself at other batch shapes (a prefix; the sequence among three others), of each
   sequence the shape that is further off: cuBLAS splits k for some numbers of rows and not for others, and where the
   sequence alone is split and the worker is not, only a shape that is not split shows what that is worth.

4. Where `nosplit` differs, --trace_binary (lockstep-trace) and the trainer dump what they compute up to the first such
   token, and the first operation that differs is named (docs/trace.md).

--variant NAME:FLAGS runs all of it with another trainer and the worker's flags for it. NAME: the attention backend, cudnn
or flash; cudnn-masked: sequences as long as the window of the model's sliding layers and longer, where transformers
passes a mask, as cudnn are the shorter ones; cudnn-autocast, cudnn-autocast-masked: fp32 weights under autocast. A
worker that was started here is stopped before the trainer is loaded.

Exit status: 0 every promise holds; 1 one is broken (`nosplit`: every token equal in bits; `stock`: no worse than its
own noise; Generate = Score); 2 it could not run.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import numpy
from lockstep_client import ROOT, Worker
from parity_metrics import Difference, table

sys.path.append(str(ROOT / "tools"))

VARIANTS = ("cudnn", "cudnn-masked", "cudnn-autocast", "cudnn-autocast-masked", "flash")
DEFAULT_LENGTHS = (512, 777, 1024, 1531, 2048, 3000, 4096, 6001, 8192)
# A mean over tokens that depend on each other is itself noisy.
NOISE_ALLOWANCE = 1.25


def choose_lengths(lengths, tokens):
    """The lengths, over and over until they add up to `tokens`."""
    chosen = list(lengths)
    while sum(chosen) < tokens:
        chosen.append(lengths[len(chosen) % len(lengths)])
    return chosen


def ask_worker(worker, arguments, vocab_size):
    """Generates and scores; returns the sequences, the worker's log-probabilities of them, and the invariance found."""
    rng = numpy.random.default_rng(arguments.seed)
    random = [rng.integers(0, vocab_size, n).tolist() for n in choose_lengths(arguments.lengths, arguments.tokens)]
    prompt_lengths = rng.integers(1, arguments.prompt_tokens + 1, arguments.generate_sequences)
    prompts = [rng.integers(0, vocab_size, n).tolist() for n in prompt_lengths]

    begin = time.perf_counter()
    jobs = [("generate", i) for i in range(len(prompts))] + [("score", i) for i in range(len(random))]
    # Generation and scoring beside each other: the batches change all the time.
    rng.shuffle(jobs)

    def run(job):
        kind, i = job[0], int(job[1])
        if kind == "generate":
            return kind, i, worker.generate(prompts[i], arguments.generate_tokens, seed=i, temperature=1.0)
        return kind, i, worker.score(random[i], arguments.top_k)

    results = {(kind, i): result for kind, i, result in worker.in_flight(run, jobs, arguments.at_once)}
    generated = [results["generate", i] for i in range(len(prompts))]
    sampled = [prompt + result.tokens for prompt, result in zip(prompts, generated)]
    rescored = worker.in_flight(lambda tokens: worker.score(tokens, arguments.top_k), sampled, arguments.at_once)
    seconds = time.perf_counter() - begin

    invariance = Difference()
    for i, (prompt, result, score) in enumerate(zip(prompts, generated, rescored)):
        invariance.add(result.logprobs, score.logprobs[len(prompt) - 1 :], f"sampled {i}", len(prompt))
    sequences = [(f"random {i}", tokens) for i, tokens in enumerate(random)]
    sequences += [(f"sampled {i}", tokens) for i, tokens in enumerate(sampled)]
    scores = [results["score", i] for i in range(len(random))] + rescored
    return sequences, scores, invariance, seconds


def self_noise(model, tokens, alone, shortest, batch_limit):
    """The trainer against its own log-probabilities of the sequence `alone`: as a prefix or among three others, whichever
    is further off.
    """
    from trainer import token_logprobs

    shapes = [Difference()]
    prefix = len(tokens) * 3 // 4 - 1
    if prefix >= max(2, shortest):
        shapes.append(Difference())
        shapes[-1].add(token_logprobs(model, [tokens[:prefix]])[0], alone[: prefix - 1])
    if len(tokens) <= batch_limit:
        batch = [tokens] + [tokens[k:] + tokens[:k] for k in (1, 2, 3)]
        shapes.append(Difference())
        shapes[-1].add(token_logprobs(model, batch)[0], alone)
    return max(shapes, key=lambda shape: (shape.mean, shape.tokens))


def compare(model, sequences, scores, lengths, arguments):
    """One mode and attention backend, sequences of `lengths`: (tokens compared, the k best compared, self_noise, tokens
    compared of the sequences whose self_noise was taken).
    """
    from trainer import token_logprobs

    tokens_difference, top_difference, noise, paired = Difference(), Difference(), Difference(), Difference()
    for number, ((name, tokens), score) in enumerate(zip(sequences, scores)):
        if len(tokens) not in lengths:
            continue
        wanted = score.top_ids if score.top_ids.size else None
        theirs = token_logprobs(model, [tokens], wanted)
        if wanted is not None:
            theirs, tops = theirs
            top_difference.add(score.top_logprobs.ravel(), tops.ravel(), name)
        theirs = theirs[0]
        tokens_difference.add(score.logprobs, theirs, name, position=1)
        if arguments.self_noise_every and number % arguments.self_noise_every == 0:
            one = self_noise(model, tokens, theirs, lengths.start, arguments.self_noise_batch_limit)
            noise.tokens += one.tokens
            noise.differing += one.differing
            noise.total += one.total
            noise.max = max(noise.max, one.max)
            paired.add(score.logprobs, theirs)
    return tokens_difference, top_difference, noise, paired


def broken_promise(mode, difference, top, noise, paired):
    """What the row fails to keep; empty if it keeps all. Noise is compared over the same sequences: where cuBLAS splits k
    for short ones only, a mean over others says nothing.
    """
    if difference.nan:
        return f"{difference.nan} log-probabilities are NaN"
    if mode == "nosplit" and (difference.differing or top.differing):
        return "nosplit: not every token is equal in bits"
    if mode == "stock" and noise.tokens and paired.mean > NOISE_ALLOWANCE * noise.mean:
        return f"stock: mean {paired.mean:.3g} is above the trainer's own noise of the same sequences, {noise.mean:.3g}"
    return ""


def make_row(arguments, variant, mode, difference, top, noise, paired, seconds):
    row = {
        "shape": arguments.shape or pathlib.Path(arguments.model).name,
        "layout": "unpadded",
        "mode": mode,
        "attention": variant,
        "tokens": difference.tokens,
        "mean": difference.mean,
        "max": difference.max,
        "bit_equal": difference.bit_equal,
        "differing": difference.differing,
        "first_differing": difference.first,
        "top_tokens": top.tokens,
        "top_differing": top.differing,
        "self_noise": noise.mean,
        "self_noise_max": noise.max,
        "self_noise_bit_equal": noise.bit_equal,
        "self_noise_tokens": noise.tokens,
        "mean_of_noise_sequences": paired.mean,
        "trainer_s": seconds,
    }
    row["broken"] = broken_promise(mode, difference, top, noise, paired) if arguments.device == "cuda" else ""
    if not difference.tokens and variant != "flash":  # which has no sequence long enough where there are few heads
        row["broken"] = "no sequence has a length that this variant is for"
    return row


def trace_positions(last):
    """Those up to `last` where something begins or ends: the sequence, the convolution, blocks of 16, chunks of 64."""
    chunk = last // 64 * 64
    wanted = {0, 1, 2, 3, 15, 16, 63, 64, chunk - 1, chunk, chunk + 1, last - 1, last}
    return sorted(position for position in wanted if 0 <= position <= last)


def find_operation(model, tokens, position, numerics, arguments):
    """Lines that name the first operation that differs over `tokens`, where the log-probability at `position` does."""
    import trace_compare
    import trace_format
    import trace_torch

    positions = trace_positions(position - 1)
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / "tokens.json"
        file.write_text(json.dumps(tokens))
        command = [arguments.trace_binary, "--model", arguments.model, *shlex.split(arguments.trace_flags)]
        command += ["--numerics", numerics]
        command += ["--tokens", str(file), "--positions", ",".join(map(str, positions)), "--out", f"{directory}/ours"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if result.returncode != 0:
            return [f"{shlex.join(command)}: exit status {result.returncode}: {result.stderr[-1000:]}"]
        _, _, ours = trace_format.read(f"{directory}/ours")
        theirs = trace_torch.trace(model, tokens, positions)
    return trace_compare.report(*trace_compare.compare_traces(ours, theirs), limit=12)


def parse_variant(text):
    name, _, flags = text.partition(":")
    if name not in VARIANTS:
        raise argparse.ArgumentTypeError(f"{text!r}: want one of {', '.join(VARIANTS)}, a colon and the worker's flags")
    return name, shlex.split(flags)


def parse_lengths(text):
    lengths = tuple(int(part) for part in text.split(","))
    if not lengths or min(lengths) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: want lengths of 2 tokens and more")
    return lengths


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--shape", help="its name in the table (default: the directory's)")
    parser.add_argument("--worker", help="HOST:PORT of a running worker")
    parser.add_argument("--binary", help="lockstep-worker to start instead")
    parser.add_argument("--worker_flags", default="--backend cuda", help="of every start (default: --backend cuda)")
    parser.add_argument(
        "--variant",
        type=parse_variant,
        action="append",
        help='trainer and flags for the worker, repeatable (default: "cudnn:--numerics hf")',
    )
    parser.add_argument("--modes", default="stock,nosplit", help="default: stock,nosplit")
    parser.add_argument("--lengths", type=parse_lengths, default=DEFAULT_LENGTHS, help="of random sequences")
    parser.add_argument("--tokens", type=int, default=50000, help="random tokens in all, at least (default: 50000)")
    parser.add_argument("--generate_sequences", type=int, default=24, help="default: 24")
    parser.add_argument("--generate_tokens", type=int, default=128, help="new tokens of each (default: 128)")
    parser.add_argument("--prompt_tokens", type=int, default=700, help="longest prompt (default: 700)")
    parser.add_argument("--at_once", type=int, default=64, help="requests in flight (default: 64)")
    parser.add_argument("--top_k", type=int, default=8, help="also compare the k best tokens (default: 8)")
    parser.add_argument("--max_length", type=int, default=1 << 30, help="leave longer sequences to the worker alone")
    parser.add_argument("--self_noise_batch_limit", type=int, default=2048, help="longest sequence put in a batch")
    parser.add_argument("--self_noise_every", type=int, default=1, help="one of how many sequences (default: 1; 0: none)")
    parser.add_argument("--trace_binary", help="lockstep-trace, to find the first operation that differs")
    parser.add_argument("--trace_flags", default="--backend cuda", help="its flags, but --numerics: the worker's profile")
    parser.add_argument("--fla_autotune", action="store_true", help="let fla search its kernels' configurations")
    parser.add_argument("--keep_worker", action="store_true", help="leave the worker running beside the trainer")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="of the trainer (default: cuda if there)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    if (arguments.worker is None) == (arguments.binary is None):
        parser.error("want one of --worker and --binary")
    arguments.variant = arguments.variant or [("cudnn", ["--numerics", "hf"])]
    if arguments.worker and len(arguments.variant) > 1:
        parser.error("--worker is one worker with one set of flags: want one --variant")
    arguments.modes = arguments.modes.split(",")
    if set(arguments.modes) - {"stock", "nosplit"}:
        parser.error(f"--modes {','.join(arguments.modes)}: want stock, nosplit or both")
    return arguments


def answers_of(arguments, flags):
    """(sequences, scores, invariance, worker's info) from the worker of one variant."""
    if arguments.worker:
        worker = Worker(arguments.worker)
    else:
        worker = Worker.start(arguments.binary, arguments.model, [*shlex.split(arguments.worker_flags), *flags])
    try:
        info = worker.info()
        sequences, scores, invariance, seconds = ask_worker(worker, arguments, info.model.vocab_size)
    except BaseException:
        print(worker.log()[-4000:], file=sys.stderr)
        worker.stop()
        raise
    if not arguments.keep_worker:
        worker.stop()
    worker.profile = info.numerics.profile
    tokens = sum(len(tokens) for _, tokens in sequences)
    print(
        f"worker, profile {info.numerics.profile}: {len(sequences)} sequences of {tokens} tokens in {seconds:.1f} s; "
        f"Generate = Score: {invariance.differing} of {invariance.tokens} differ",
        flush=True,
    )
    return sequences, scores, invariance, worker


def import_trainer():
    """A dozen seconds the first time: done beside the worker's work."""
    import trainer  # noqa: F401
    import transformers  # noqa: F401


def run(arguments):
    importing = threading.Thread(target=import_trainer)
    importing.start()
    answers = [(name, *answers_of(arguments, flags)) for name, flags in arguments.variant]
    importing.join()
    import torch
    import trainer

    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.device == "cuda" and not arguments.fla_autotune:
        trainer.pin_fla_configurations()
    rows, invariance, kernel = [], Difference(), ""

    def findings():
        counts = {"tokens": invariance.tokens, "differing": invariance.differing, "first_differing": invariance.first}
        versions = trainer.versions() | ({"gdn": kernel} if kernel else {})
        return {"parity": rows, "invariance": counts, "versions": versions}

    model, loaded = None, None
    for name, sequences, scores, found, worker in sorted(answers, key=lambda answer: "autocast" in answer[0]):
        attention, masked, autocast = name.split("-")[0], "masked" in name, "autocast" in name
        if loaded != autocast:
            begin, model = time.perf_counter(), None  # the other one's memory goes first
            model, loaded = trainer.load(arguments.model, arguments.device, autocast=autocast), autocast
            kernel = trainer.gdn_kernel(model)
            print(f"trainer loaded in {time.perf_counter() - begin:.1f} s{', ' if kernel else ''}{kernel}", flush=True)
        invariance.tokens += found.tokens
        invariance.differing += found.differing
        invariance.first = invariance.first or found.first
        longest = min(arguments.max_length, trainer.longest_sequence(model, masked))
        lengths = range(trainer.shortest_sequence(model, attention, masked), longest + 1)
        for mode in arguments.modes if arguments.device == "cuda" else ["stock"]:
            begin = time.perf_counter()
            with trainer.blas_mode(mode), trainer.attention_backend(attention):
                differences = compare(model, sequences, scores, lengths, arguments)
                rows.append(make_row(arguments, name, mode, *differences, time.perf_counter() - begin))
                print_rows(rows[-1:])
                first = rows[-1]["first_differing"]
                if mode == "nosplit" and first and arguments.trace_binary:
                    tokens = dict(sequences)[first["sequence"]]
                    # A masked forward stays one when it is cut to the window's length.
                    end = max(first["position"], lengths.start)
                    rows[-1]["trace"] = find_operation(model, tokens[:end], first["position"], worker.profile, arguments)
                    print("\n".join(rows[-1]["trace"]), flush=True)
            rows[-1]["lengths"] = [lengths.start, longest]
            if arguments.json:  # what is known so far, should time run out
                pathlib.Path(arguments.json).write_text(json.dumps(findings(), indent=1) + "\n")
    for *_, worker in answers:
        worker.stop()
    return findings()


TITLES = ("shape", "attention", "mode", "tokens", "equal", "differ", "mean", "max", "top-k differ", "self_noise")


def print_rows(rows):
    cells = [
        (
            row["shape"],
            row["attention"],
            row["mode"],
            row["tokens"],
            f"{row['bit_equal']:.4%}",
            row["differing"],
            f"{row['mean']:.3g}",
            f"{row['max']:.3g}",
            f"{row['top_differing']}/{row['top_tokens']}",
            f"{row['self_noise']:.3g} (max {row['self_noise_max']:.3g}, {row['self_noise_bit_equal']:.2%} equal)",
        )
        for row in rows
    ]
    print(table(TITLES, cells), flush=True)
    for row in rows:
        if row["first_differing"]:
            print(f"  first differing: {row['first_differing']}", flush=True)


def main():
    arguments = parse_arguments()
    try:
        found = run(arguments)
    except Exception:
        traceback.print_exc()
        return 2
    print()
    print_rows(found["parity"])
    broken = [row["broken"] for row in found["parity"] if row["broken"]]
    if found["invariance"]["differing"]:
        broken.append(f"Generate differs from Score: {found['invariance']}")
    for text in broken:
        print(f"BROKEN: {text}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
