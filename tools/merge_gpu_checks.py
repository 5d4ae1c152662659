#!/usr/bin/env python3
"""Puts the measurements of several runs of tools/gpu_check into one file.

    tools/merge_gpu_checks.py RUN.json ... --out docs/measurements/gpu_check.json

For a GPU that is to be had for minutes at a time. Every row keeps the run it is of: `run` is its index in `runs`, which
hold what was run, of which commit, on which device; the file's own commit, command and device are the last run's.
"""

import argparse
import json
import pathlib
import sys

RUN_FIELDS = ("commit", "command", "device", "versions", "date", "stages")
ROW_FIELDS = ("parity", "decode", "kernels", "prefill", "serving")


def merge(measurements):
    """One measurement of several, in their order."""
    merged = {field: measurements[-1].get(field) for field in RUN_FIELDS if field != "stages"}
    merged["runs"] = [{field: m[field] for field in RUN_FIELDS if field in m} for m in measurements]
    merged["invariance"] = {
        field: sum(m.get("invariance", {}).get(field, 0) for m in measurements) for field in ("tokens", "differing")
    }
    for field in ROW_FIELDS:
        rows = [{**row, "run": run} for run, m in enumerate(measurements) for row in m.get(field, [])]
        if rows:
            merged[field] = rows
    return merged


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    merged = merge([json.loads(path.read_text()) for path in arguments.runs])
    arguments.out.write_text(json.dumps(merged, indent=1) + "\n")
    print(f"{arguments.out}: {len(merged['runs'])} runs, {sum(len(merged.get(f, [])) for f in ROW_FIELDS)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
