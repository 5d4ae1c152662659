#!/usr/bin/env python3
"""Hybrid against dense: an RL step's rollouts on both models, as a Markdown table and a plot.

    build/cuda/bin/lockstep-bench --rl ... --model olmo-hybrid-7b --json hybrid.json
    build/cuda/bin/lockstep-bench --rl ... --model olmo3-7b --json dense.json
    tools/rl_table.py --hybrid hybrid.json --dense dense.json [--plot rl.png] [--json docs/measurements/rl.json]

A row for each response length that both have. Measured: hybrid's tokens a second over dense's. Predicted: the same of
the floors, that is, of the bytes that each model's steps must move. Gain: how much of the predicted lead is there,
(measured - 1) / (predicted - 1); none where hybrid is not predicted ahead. Both files must be of one device, of one
shape and of one kind of length.
"""

import argparse
import datetime
import json
import pathlib
import shlex
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from build_tree import commit_text  # noqa: E402

SHAPE = ("prompts", "samples", "prompt_tokens", "length_sigma")
# Share of the predicted lead that is wanted.
WANTED_GAIN = 0.8


def read(path):
    """(device, rows by response length) of a file that lockstep-bench --rl wrote."""
    found = json.loads(pathlib.Path(path).read_text())
    if not found.get("rl"):
        raise ValueError(f'{path}: no rows under "rl", want a file of lockstep-bench --rl --json')
    return found["device"], {row["response_tokens"]: row for row in found["rl"]}


def compare(hybrid, dense):
    """A row for each response length that both have, ascending."""
    rows = []
    for response in sorted(hybrid.keys() & dense.keys()):
        h, d = hybrid[response], dense[response]
        for field in SHAPE:
            if h[field] != d[field]:
                raise ValueError(
                    f"response {response}: {field} is {h[field]} for hybrid and {d[field]} for dense, want one"
                )
        measured, predicted = h["tok_s"] / d["tok_s"], h["floor_tok_s"] / d["floor_tok_s"]
        gain = (measured - 1) / (predicted - 1) if predicted > 1 else None
        rows.append(
            {
                "response_tokens": response,
                "hybrid": h,
                "dense": d,
                "measured": measured,
                "predicted": predicted,
                "gain": gain,
            }
        )
    if not rows:
        raise ValueError(f"no response length in both: hybrid has {sorted(hybrid)}, dense {sorted(dense)}")
    return rows


def markdown(rows):
    """The table's lines."""
    lines = [
        "| response | model | tok/s | floor, tok/s | ratio | fit | mean batch | GPU-hours | hybrid/dense | predicted | gain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        gain = "-" if row["gain"] is None else f"{row['gain']:.0%}"
        for kind in ("hybrid", "dense"):
            r = row[kind]
            first = kind == "hybrid"
            cells = [f"{row['response_tokens']:,}" if first else "", r["model"], f"{r['tok_s']:,.0f}"]
            cells += [
                f"{r['floor_tok_s']:,.0f}",
                f"{r['ratio']:.2f}",
                str(r["sequences_fit"]),
                f"{r['mean_batch']:.0f}",
            ]
            cells += [f"{r['gpu_hours']:.3f}"]
            cells += [f"{row['measured']:.2f}", f"{row['predicted']:.2f}", gain] if first else ["", "", ""]
            lines.append("| " + " | ".join(cells) + " |")
    notes = []
    for kind in ("hybrid", "dense"):
        measured, steps = (sum(row[kind][field] for row in rows) for field in ("measured_steps", "steps"))
        notes.append(f"{kind}: {measured:,} of {steps:,} steps measured")
    return [*lines, "", "; ".join(notes) + "."]


def plot(rows, device, path):
    """Tokens a second over response length, measured and at the floor."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"--plot needs matplotlib, which is no requirement of this project: {error}") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    lengths = [row["response_tokens"] for row in rows]
    for kind, color in (("hybrid", "tab:blue"), ("dense", "tab:orange")):
        name = rows[0][kind]["model"]
        axes.plot(lengths, [row[kind]["tok_s"] for row in rows], "o-", color=color, label=f"{name}, measured")
        axes.plot(
            lengths, [row[kind]["floor_tok_s"] for row in rows], "--", color=color, label=f"{name}, traffic alone"
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("response, tokens")
    axes.set_ylabel("generated tokens a second")
    r = rows[0]["hybrid"]
    axes.set_title(
        f"{r['prompts']} prompts x {r['samples']} samples, {r['prompt_tokens']:,} tokens in; {device}", fontsize=9
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hybrid", required=True, help="JSON of lockstep-bench --rl of the hybrid model")
    parser.add_argument("--dense", required=True, help="the same of the dense model")
    parser.add_argument("--plot", type=pathlib.Path, help="also a PNG; needs matplotlib")
    parser.add_argument("--json", type=pathlib.Path, help="also both runs' rows, for docs/measurements")
    arguments = parser.parse_args()
    try:
        (device, hybrid), (other, dense) = read(arguments.hybrid), read(arguments.dense)
        if device != other:
            raise ValueError(f"hybrid was measured on {device}, dense on {other}: want one device")
        rows = compare(hybrid, dense)
        print("\n".join(markdown(rows)))
        if arguments.plot:
            plot(rows, device, arguments.plot)
        if arguments.json:
            measurement = {
                "commit": commit_text(),  # run beside the programs that measured: in their bundle or build tree
                "command": shlex.join(["tools/rl_table.py", *sys.argv[1:]]),
                "device": device,
                "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
                "rows": rows,
            }
            arguments.json.write_text(json.dumps(measurement, indent=1) + "\n")
    except KeyError as error:
        parser.error(f"a row has no {error}: of another version of lockstep-bench?")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    short = [
        r["response_tokens"] for r in rows if r["measured"] <= 1 or (r["gain"] is not None and r["gain"] < WANTED_GAIN)
    ]
    if short:
        print(f"below {WANTED_GAIN:.0%} of the predicted lead, or behind: at {', '.join(map(str, short))}")


if __name__ == "__main__":
    sys.exit(main())
