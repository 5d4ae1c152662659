#!/usr/bin/env python3
"""The learner's side as users have it, lockstep.trainer.align: bits in every layout, gradients, and what it costs.

    tests/gpu/check_trainer.py --model DIR --binary build/cuda/bin/lockstep-worker --json OUT

1. parity     A worker scores random sequences and is stopped. The trainer computes the same tokens unpadded, packed and
              left-padded, stock and aligned. Promise: aligned, every token is equal in bits in all three layouts. Stock
              is reported, with the fault that lockstep.parity names.
2. gradients  Of a mean token loss, every parameter: |g - g_stock| / |g_stock| (L2), g_stock the stock model's over a
              batch. Noise is the stock model's own at two other batch shapes: 64 tokens more behind each sequence,
              which the loss leaves out, and one sequence at a time. Promise: median and 99th percentile over the
              parameters, of the aligned model over the batch and over the same sequences packed, are at most
              --noise_allowance times the larger of noise's.
3. cost       Forward, and forward with backward, aligned over stock on one batch, unpadded and packed. Reported only.

Where fla refuses its backward pass (Hopper with Triton 3.4 to 3.7.0), fla_backward.py stands in for one of its kernels.

Exit status: 0 every promise holds; 1 one is broken (on a CPU, where no bits are promised, with an fp32 worker: a mean
|difference| above 1e-5, or a 99th percentile of gradients' errors above 1e-3); 2 it could not run.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import shlex
import statistics
import sys
import threading
import time
import traceback

import numpy
from check_parity import choose_lengths, parse_lengths
from lockstep_client import ROOT, Worker
from parity_metrics import Difference, table

sys.path.append(str(ROOT / "tools"))
if importlib.util.find_spec("lockstep") is None:
    sys.path.append(str(ROOT / "python"))
from build_tree import measurement  # noqa: E402

PARTS = ("parity", "gradients", "cost")
LAYOUTS = ("unpadded", "packed", "left_padded")
MODES = ("stock", "aligned")
# fp32 on both sides: a program that differs is off by 1e-2 and more (docs/parity.md).
CPU_MEAN, CPU_GRADIENT = 1e-5, 1e-3


def import_trainer():
    """A dozen seconds the first time: done beside the worker's work."""
    import torch  # noqa: F401
    import trainer  # noqa: F401
    import transformers  # noqa: F401


def scored(arguments):
    """(info, sequences, log-probabilities of each) of a worker that has ended since."""
    with Worker.start(arguments.binary, arguments.model, shlex.split(arguments.worker_flags)) as worker:
        info = worker.info()
        generator = numpy.random.default_rng(arguments.seed)
        lengths = []
        if "parity" in arguments.parts:  # a sequence's first token has no log-probability
            lengths = [n + 1 for n in choose_lengths([n - 1 for n in arguments.lengths], arguments.tokens)]
        sequences = [generator.integers(0, info.model.vocab_size, n) for n in lengths]
        begin = time.perf_counter()
        try:
            scores = worker.in_flight(lambda tokens: worker.score(tokens.tolist()).logprobs, sequences)
        except BaseException:
            print(worker.log()[-4000:], file=sys.stderr)
            raise
        seconds = time.perf_counter() - begin
    count = sum(len(s) for s in scores)
    print(f"worker, profile {info.numerics.profile}: {count} log-probabilities in {seconds:.1f} s", flush=True)
    return info, sequences, scores


class Modes:
    """The model, stock or aligned."""

    def __init__(self, model, info):
        self.model, self.info = model, info
        self.report = None

    def set(self, mode):
        import lockstep.trainer

        if mode == "aligned":
            self.report = lockstep.trainer.align(self.model, self.info)
        else:
            lockstep.trainer.unalign(self.model)


# Parity


def layouts_of(trained, sequences, rows):
    """Yields (layout, tags, values of each sequence, seconds)."""
    for layout in LAYOUTS:
        begin = time.perf_counter()
        if layout == "unpadded":
            tagged = [(0, trained(sequence)) for sequence in sequences]
        else:
            tagged = list(getattr(trained, layout)(sequences, rows))
        yield layout, [tag for tag, _ in tagged], [value for _, value in tagged], time.perf_counter() - begin


def broken_parity(mode, difference, device, dtype):
    """What a row fails to keep; empty if it keeps all."""
    if difference.nan:
        return f"{difference.nan} log-probabilities are NaN"
    if mode == "stock":
        return ""
    if device == "cuda" and difference.differing:
        return f"aligned: {difference.differing} of {difference.tokens} tokens differ in bits"
    if device != "cuda" and dtype == "float32" and difference.mean > CPU_MEAN:
        return f"aligned: mean |difference| {difference.mean:.3g}, want at most {CPU_MEAN:g}"
    return ""


def parity_rows(arguments, modes, sequences, scores):
    from lockstep.hf import TransformersTrainer
    from lockstep.parity import layout_fault

    trained = TransformersTrainer(modes.model)
    for mode in MODES:
        modes.set(mode)
        alone = None
        for layout, tags, values, seconds in layouts_of(trained, sequences, arguments.rows):
            alone = alone or values
            difference = Difference()
            for i, (ours, theirs) in enumerate(zip(scores, values)):
                difference.add(ours, theirs, f"random {i}", 1)
            row = {"shape": arguments.shape, "layout": layout, "mode": mode, "tokens": difference.tokens}
            row |= {"bit_equal": difference.bit_equal, "differing": difference.differing, "mean": difference.mean}
            row |= {"max": difference.max, "first_differing": difference.first}
            row["found"] = layout_fault(layout, tags, values, alone) if layout != "unpadded" else []
            row |= {"rows": 1 if layout == "unpadded" else arguments.rows, "seconds": seconds}
            row["broken"] = broken_parity(mode, difference, arguments.device, arguments.dtype)
            yield row


# Gradients


@dataclasses.dataclass
class Batch:
    """Sequences of one length as the model takes them. loss: of its logits, the mean over B x (T - 1) tokens."""

    inputs: dict
    loss: object


def as_batch(ids):
    """[B, T], each sequence a row."""
    import lockstep.trainer

    def loss(logits):
        return -lockstep.trainer.logprobs(logits[:, : ids.shape[1] - 1], ids[:, 1:]).mean()

    return Batch({"input_ids": ids, "use_cache": False}, loss)


def with_tail(ids, vocab_size, count=64):
    """The same loss: no token sees the `count` more behind it."""
    import torch

    tail = torch.randint(0, vocab_size, (len(ids), count), generator=torch.Generator().manual_seed(7)).to(ids)
    return Batch({"input_ids": torch.cat([ids, tail], 1), "use_cache": False}, as_batch(ids).loss)


def as_packed(ids):
    """The same sequences one behind the other in one row, with boundaries."""
    import torch

    count, length = ids.shape
    ends = torch.arange(count + 1, dtype=torch.int32, device=ids.device) * length
    inputs = {
        "input_ids": ids.reshape(1, -1),
        "position_ids": torch.arange(length, device=ids.device).repeat(count)[None],
    }
    inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}
    loss = as_batch(ids).loss
    return Batch(inputs | {"use_cache": False}, lambda logits: loss(logits.view(count, length, -1)))


@contextlib.contextmanager
def taking_gradients(model, take):
    """take(name, gradient) as each parameter's is whole; then it is dropped, so that not all are there at once."""

    def hook(name):
        def taken(parameter):
            take(name, parameter.grad)
            parameter.grad = None

        return taken

    hooks = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in model.named_parameters()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
        model.zero_grad(set_to_none=True)


def backward(model, batches, take):
    """take(name, gradient), of the mean of the batches' losses."""
    for batch in batches[:-1]:
        (batch.loss(model(**batch.inputs).logits) / len(batches)).backward()
    with taking_gradients(model, take):
        last = batches[-1]
        (last.loss(model(**last.inputs).logits) / len(batches)).backward()


def relative_errors(model, batches, reference):
    """{name: |g - reference| / |reference|}, by parameter."""
    found = {}

    def take(name, gradient):
        want = reference[name].to(gradient.device).float()
        error, size = (gradient.float() - want).norm().item(), want.norm().item()
        found[name] = error / size if size else (0.0 if error == 0 else float("inf"))

    backward(model, batches, take)
    missing = sorted(set(reference) - set(found))
    if missing:
        raise RuntimeError(f"no gradient for {len(missing)} parameters: {missing[:5]}")
    return found


def spread_of(errors):
    """Of {parameter: relative error}. A NaN counts as infinite."""
    values = numpy.nan_to_num(numpy.array(list(errors.values())), nan=numpy.inf)
    worst = max(errors, key=lambda name: numpy.nan_to_num(errors[name], nan=numpy.inf))
    found = {"parameters": len(errors), "median": float(numpy.median(values))}
    ordered = numpy.sort(values)
    found["p99"] = float(ordered[int(numpy.ceil(0.99 * len(ordered))) - 1])
    return found | {"max": float(ordered[-1]), "worst": worst}


def broken_gradients(row, noises, allowance, device, dtype):
    """What an aligned row fails to keep, against the rows of noise; empty if it keeps all."""
    if device != "cuda":
        if dtype == "float32" and not row["p99"] <= CPU_GRADIENT:
            return f"{row['comparison']}: 99th percentile {row['p99']:.3g}, want at most {CPU_GRADIENT:g}"
        return ""
    for figure in ("median", "p99"):
        most = allowance * max(noise[figure] for noise in noises)
        if not row[figure] <= most:
            return f"{row['comparison']}: {figure} {row[figure]:.3g}, want at most {most:.3g}"
    return ""


def gradient_rows(arguments, modes, ids):
    model, vocab_size = modes.model, modes.info.model.vocab_size
    modes.set("stock")
    reference = {}
    whole = as_batch(ids)
    backward(model, [whole], lambda name, gradient: reference.update({name: gradient.to("cpu", copy=True)}))
    comparisons = [
        ("stock", "noise: 64 tokens more behind", [with_tail(ids, vocab_size)]),
        ("stock", "noise: one sequence at a time", [as_batch(one) for one in ids.split(1)]),
        ("aligned", "aligned", [whole]),
        ("aligned", "aligned, packed", [as_packed(ids)]),
    ]
    noises = []
    for mode, name, batches in comparisons:
        modes.set(mode)
        begin = time.perf_counter()
        row = {
            "shape": arguments.shape,
            "comparison": name,
            "mode": mode,
            "sequences": len(ids),
            "length": ids.shape[1],
        }
        row |= spread_of(relative_errors(model, batches, reference))
        row["seconds"] = time.perf_counter() - begin
        if mode == "stock":
            noises.append(row)
            row["broken"] = ""
        else:
            row["broken"] = broken_gradients(row, noises, arguments.noise_allowance, arguments.device, arguments.dtype)
        yield row


# Cost


def milliseconds(function, device):
    import torch

    if device != "cuda":
        begin = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - begin)
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def cost_rows(arguments, modes, ids):
    """Stock and aligned by turns, so that a card that warms up slows both."""
    import torch

    model = modes.model

    @torch.no_grad()
    def forward(batch):
        return batch.loss(model(**batch.inputs).logits)

    def both(batch):
        backward(model, [batch], lambda name, gradient: None)

    for layout, batch in (("unpadded", as_batch(ids)), ("packed", as_packed(ids))):
        for what, run in (("forward", forward), ("forward and backward", both)):
            taken = {mode: [] for mode in MODES}
            for repeat in range(arguments.repeats + 1):
                for mode in MODES if repeat % 2 else MODES[::-1]:
                    modes.set(mode)
                    one = milliseconds(lambda run=run, batch=batch: run(batch), arguments.device)
                    if repeat:  # the first warms up
                        taken[mode].append(one)
            row = {"shape": arguments.shape, "layout": layout, "what": what, "tokens": ids.numel()}
            row |= {f"{mode}_ms": statistics.median(taken[mode]) for mode in MODES}
            row |= {f"{mode}_all_ms": taken[mode] for mode in MODES}
            yield row | {"ratio": row["aligned_ms"] / row["stock_ms"]}


# All of it


TITLES = {
    "parity": ("layout", "mode", "tokens", "bit_equal", "differing", "mean", "max", "seconds"),
    "gradients": ("comparison", "parameters", "median", "p99", "max", "worst", "seconds"),
    "cost": ("layout", "what", "tokens", "stock_ms", "aligned_ms", "ratio"),
}


def show(part, row):
    cells = [f"{row[title]:.5g}" if isinstance(row[title], float) else row[title] for title in TITLES[part]]
    print(f"{part}\n{table(TITLES[part], [cells])}", flush=True)
    for text in row.get("found", []):
        print(f"  {text}", flush=True)


def load(arguments, info):
    """The model, and what fla's backward pass is."""
    import torch
    import trainer

    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.dtype = info.numerics.weights_dtype
    begin = time.perf_counter()
    model = trainer.load(arguments.model, arguments.device, getattr(torch, arguments.dtype))
    kernel, backward_of = trainer.gdn_kernel(model), ""
    if arguments.device == "cuda" and kernel:
        import fla_backward

        if not arguments.fla_autotune:
            trainer.pin_fla_configurations(backward=True)
        backward_of = fla_backward.install()
    print(f"trainer loaded in {time.perf_counter() - begin:.1f} s{', ' if kernel else ''}{kernel}", flush=True)
    return model, {"gdn": kernel, "gdn_backward": backward_of} if kernel else {}


def run(arguments):
    importing = threading.Thread(target=import_trainer)
    importing.start()
    info, sequences, scores = scored(arguments)
    importing.join()
    import torch
    import trainer

    model, kernels = load(arguments, info)
    modes = Modes(model, info)
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.batch, arguments.batch_length)
    ids = torch.randint(0, info.model.vocab_size, shape, generator=generator).to(model.device)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    found = measurement(__file__, device, trainer.versions() | kernels)
    found |= {"profile": info.numerics.profile, "dtype": arguments.dtype}
    rows_of = {
        "parity": lambda: parity_rows(arguments, modes, sequences, scores),
        "gradients": lambda: gradient_rows(arguments, modes, ids),
        "cost": lambda: cost_rows(arguments, modes, ids),
    }
    for part in arguments.parts:
        found[part] = []
        if arguments.device == "cuda":
            torch.cuda.empty_cache()  # of blocks in other sizes
        for row in rows_of[part]():
            found[part].append(row)
            show(part, row)
            if modes.report is not None:
                found["align"] = str(modes.report).splitlines()
            if arguments.json:  # what is known so far, should time run out
                pathlib.Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    if modes.report is not None:
        print(modes.report, flush=True)
    return found


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--shape", help="its name in the rows (default: the directory's)")
    parser.add_argument("--binary", required=True, help="lockstep-worker to start")
    parser.add_argument(
        "--worker_flags", default="--backend cuda --numerics hf", help="its flags (default: %(default)s)"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument(
        "--lengths", type=parse_lengths, default=(512, 777, 1024, 1531, 2048, 3000), help="of sequences"
    )
    parser.add_argument("--tokens", type=int, default=50000, help="to compare, at least (default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=4, help="documents of a packed row, rows of a padded batch (default: 4)"
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences of gradients and timings (default: 4)")
    parser.add_argument("--batch_length", type=int, default=768, help="tokens of each (default: 768, for 80 GB)")
    parser.add_argument("--noise_allowance", type=float, default=1.5, help="default: 1.5")
    parser.add_argument("--repeats", type=int, default=5, help="of a timing (default: 5)")
    parser.add_argument("--fla_autotune", action="store_true", help="let fla search its kernels' configurations")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="of the trainer (default: cuda if there)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="where the result goes")
    arguments = parser.parse_args(argv)
    arguments.parts = arguments.parts.split(",")
    if set(arguments.parts) - set(PARTS):
        parser.error(f"--parts {','.join(arguments.parts)}: want some of {', '.join(PARTS)}")
    if arguments.batch < 2 or arguments.batch_length < 2:
        parser.error(f"--batch {arguments.batch} --batch_length {arguments.batch_length}: want 2 of each at least")
    arguments.shape = arguments.shape or pathlib.Path(arguments.model).name
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    try:
        found = run(arguments)
    except Exception:
        traceback.print_exc()
        return 2
    broken = [row["broken"] for part in ("parity", "gradients") for row in found.get(part, []) if row["broken"]]
    for text in broken:
        print(f"BROKEN: {text}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
