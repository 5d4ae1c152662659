#!/usr/bin/env python3
"""Puts the measurements of several runs of tools/gpu_check into one file.

    tools/merge_gpu_checks.py RUN.json ... --out docs/measurements/gpu_check.json
    tools/merge_gpu_checks.py docs/measurements/gpu_check.json:1,3 NEW.json --out docs/measurements/gpu_check.json

A file that this tool has written may be one of them: all its runs, or with FILE:N,... those that are named. For a GPU that is to be had for minutes at a time. Every row keeps the run it is of: `run` is its index in `runs`, which
hold what was run, of which commit, on which device; the file's own commit, command and device are the last run's.
"""

import argparse
import json
import pathlib
import re
import sys

RUN_FIELDS = ("commit", "command", "device", "versions", "date", "stages")
KEPT_FIELDS = (*RUN_FIELDS, "invariance")  # of each run
ROW_FIELDS = ("parity", "decode", "kernels", "prefill", "serving", "sanitizer", "rl")


def merge(measurements):
    """One measurement of several, in their order."""
    merged = {field: measurements[-1].get(field) for field in RUN_FIELDS if field != "stages"}
    merged["runs"] = [{field: m[field] for field in KEPT_FIELDS if field in m} for m in measurements]
    merged["invariance"] = {
        field: sum(m.get("invariance", {}).get(field, 0) for m in measurements) for field in ("tokens", "differing")
    }
    for field in ROW_FIELDS:
        rows = [{**row, "run": run} for run, m in enumerate(measurements) for row in m.get(field, [])]
        if rows:
            merged[field] = rows
    return merged


def summed(stages):
    """Invariance as the jobs of a run's stages say it, for files that hold the sum of all runs alone."""
    found = [re.search(r"(\d+) tokens, (\d+) differ$", job["summary"]) for stage in stages for job in stage["jobs"]]
    counts = [tuple(map(int, match.groups())) for match in found if match]
    return {"tokens": sum(c[0] for c in counts), "differing": sum(c[1] for c in counts)}


def read(argument):
    """The measurements that FILE or FILE:N,... holds."""
    path, _, wanted = argument.partition(":")
    measurement = json.loads(pathlib.Path(path).read_text())
    if "runs" not in measurement:
        return [measurement]
    runs = []
    for index in [int(n) for n in wanted.split(",")] if wanted else range(len(measurement["runs"])):
        run = dict(measurement["runs"][index])
        run.setdefault("invariance", summed(run.get("stages", [])))
        for field in ROW_FIELDS:
            rows = [row for row in measurement.get(field, []) if row["run"] == index]
            if rows:
                run[field] = [{key: value for key, value in row.items() if key != "run"} for row in rows]
        runs.append(run)
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="FILE[:N,...]")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    merged = merge([run for argument in arguments.runs for run in read(argument)])
    arguments.out.write_text(json.dumps(merged, indent=1) + "\n")
    print(f"{arguments.out}: {len(merged['runs'])} runs, {sum(len(merged.get(f, [])) for f in ROW_FIELDS)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
