"""The command `lockstep`; also `python -m lockstep`."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import traceback
from collections.abc import Sequence

from ._channel import read_token
from .errors import LockstepError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep", description="Lockstep's learner-side tools.")
    commands = parser.add_subparsers(dest="command", required=True)
    parity = commands.add_parser(
        "parity",
        help="compare a running worker with a transformers model",
        description="Generates at a worker, recomputes with transformers, and prints how far they are apart and why. "
        "Exit status: 0 within the thresholds; 1 not; 2 could not run.",
    )
    parity.add_argument(
        "--worker", required=True, action="append", metavar="HOST:PORT", help="data plane; may be repeated"
    )
    parity.add_argument("--model", required=True, metavar="DIR", help="the trainer's checkpoint")
    parity.add_argument("--control", metavar="HOST:PORT", help="control plane: also compare the weights by digest")
    parity.add_argument("--token_file", metavar="FILE", help="its first line is the workers' token")
    parity.add_argument("--control_token_file", metavar="FILE", help="the same for the control plane")
    parity.add_argument("--tls_ca", metavar="FILE", help="PEM: whom to trust; without it, no TLS")
    parity.add_argument("--layouts", default="unpadded", help="comma-separated: unpadded,packed,left_padded")
    parity.add_argument("--device", help="of the trainer; default: cuda if there is one")
    parity.add_argument("--dtype", default="auto", help="of the trainer; default: the checkpoint's")
    parity.add_argument(
        "--align", action="store_true", help="apply lockstep.trainer.align() first and print its findings"
    )
    parity.add_argument("--prompts", type=int, default=16, metavar="N", help="random prompts (default 16)")
    parity.add_argument("--prompt_file", metavar="FILE", help="prompts as text, one a line, instead of random ones")
    parity.add_argument("--max_tokens", type=int, default=128, help="generated for each prompt (default 128)")
    parity.add_argument("--temperature", type=float, default=1.0)
    parity.add_argument("--trainer_temperature", type=float, help="default: the same")
    parity.add_argument("--seed", type=int, default=0)
    parity.add_argument("--max_mean", type=float, default=0.02, help="largest mean |difference| (default 0.02)")
    parity.add_argument("--max_abs", type=float, help="largest |difference| of a token (default: any)")
    parity.add_argument("--bits", action="store_true", help="every token must be equal in bits")
    parity.add_argument("--json", metavar="FILE")
    parity.add_argument("--html", metavar="FILE")
    parity.add_argument("--png", metavar="FILE", help="needs matplotlib")
    top = commands.add_parser(
        "top",
        help="what workers are doing now",
        description="A table of workers that renews itself, until Ctrl-C. Exit status: 0; with --once 1 if a worker did not "
        "answer; 2 could not run.",
    )
    top.add_argument(
        "--worker", required=True, action="append", metavar="HOST:PORT", help="data plane; may be repeated"
    )
    top.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="default 2")
    top.add_argument("--check", metavar="FILE", help="of lockstep parity --json: shown below, with its age")
    top.add_argument("--once", action="store_true", help="one table, after one interval")
    top.add_argument("--token_file", metavar="FILE", help="its first line is the workers' token")
    top.add_argument("--tls_ca", metavar="FILE", help="PEM: whom to trust; without it, no TLS")
    return parser


def _top(arguments: argparse.Namespace) -> int:
    from . import top

    token = read_token(arguments.token_file) if arguments.token_file else None
    return top.run(
        arguments.worker,
        interval_s=arguments.interval,
        check=arguments.check,
        once=arguments.once,
        token=token,
        tls_ca=arguments.tls_ca,
    )


def _write(path: str, text: str) -> None:
    """Whole or not at all: `lockstep top --check` may be reading the file."""
    target = pathlib.Path(path).resolve()
    if target.exists() and not target.is_file():  # a pipe, a terminal
        target.write_text(text)
        return
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(text)
    partial.replace(target)


def _parity(arguments: argparse.Namespace) -> int:
    from . import parity, parity_report, text
    from .client import RolloutClient
    from .sampling import SamplingParams

    try:
        from .hf import TransformersTrainer
        from .trainer import align
    except ImportError as error:
        raise LockstepError(
            f"parity needs {error.name}: pip install './python[torch]' in the project's folder"
        ) from None

    directory = pathlib.Path(arguments.model)
    tokenizer = text.load_tokenizer(directory) if (directory / "tokenizer.json").exists() else None
    prompts = None
    if arguments.prompt_file:
        if tokenizer is None:
            raise LockstepError(f"--prompt_file needs {directory / 'tokenizer.json'}")
        lines = pathlib.Path(arguments.prompt_file).read_text().splitlines()
        prompts = text.encode(tokenizer, [line for line in lines if line])
    temperature = arguments.temperature if arguments.trainer_temperature is None else arguments.trainer_temperature
    sampling = SamplingParams(
        max_tokens=arguments.max_tokens, temperature=arguments.temperature, ignore_eos=True, seed=arguments.seed
    )
    token = read_token(arguments.token_file) if arguments.token_file else None
    control_token = read_token(arguments.control_token_file) if arguments.control_token_file else None
    with RolloutClient(arguments.worker, token=token, tls_ca=arguments.tls_ca) as client:
        trainer = TransformersTrainer(
            directory, device=arguments.device, dtype=arguments.dtype, temperature=temperature
        )
        if arguments.align:
            print(align(trainer.model, next(iter(client.info().values()))))
        report = parity.check(
            client,
            trainer,
            prompts=prompts,
            sampling=sampling,
            layouts=arguments.layouts.split(","),
            thresholds=parity.Thresholds(arguments.max_mean, arguments.max_abs, arguments.bits),
            tokenizer=tokenizer,
            control=arguments.control,
            control_token=control_token,
            tls_ca=arguments.tls_ca,
            count=arguments.prompts,
            seed=arguments.seed,
        )
    print(report)
    if arguments.json:
        _write(arguments.json, json.dumps(parity_report.as_json(report), indent=1) + "\n")
    if arguments.html:
        _write(arguments.html, parity_report.as_html(report))
    if arguments.png:
        parity_report.write_png(report, arguments.png)
    return report.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return {"parity": _parity, "top": _top}[arguments.command](arguments)
    except (LockstepError, OSError) as error:
        print(f"lockstep {arguments.command}: {error}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    return 2


if __name__ == "__main__":
    sys.exit(main())
