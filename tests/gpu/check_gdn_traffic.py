#!/usr/bin/env python3
"""GDN decode's memory traffic by the hardware's counters, against the count of its layout.

The bits alone would not show a kernel that runs its chunk again from the start at every token: its traffic does. Runs
gdn_bench under ncu, which needs the right to read counters (root, or NVreg_RestrictProfilingToAdminUsers=0).

Read: dram__bytes_read of a launch whose caches ncu has emptied. Written: what the kernel writes into L2, since most of
it reaches memory only after the kernel's end.
"""

import argparse
import csv
import glob
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

BATCH = 64
HEADS = 30
POSITIONS = (0, 15, 16, 31, 47, 62, 63)  # in the chunk; 63 closes it
TOLERANCE = 0.10
READ = "dram__bytes_read.sum"
WRITTEN = "lts__t_sectors_srcunit_tex_op_write.sum"
SECTOR_BYTES = 32
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "sector": SECTOR_BYTES, "Ksector": 1e3 * SECTOR_BYTES}


def find_ncu():
    found = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    return found or next(iter(sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu"), reverse=True)), None)


def profile(ncu, program, t):
    """Bytes (read, written) of the last launch, and those that the program counts."""
    command = [ncu, "--csv", "--page", "raw", "--metrics", f"{READ},{WRITTEN}", "--clock-control", "none"]
    command += ["--target-processes", "all", "--kernel-name", "regex:GdnDecode", str(program), "once", str(BATCH), str(t)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    counted = re.search(r"counted: (\d+) bytes", run.stdout)
    table = [line for line in run.stdout.splitlines() if line.startswith('"')]
    if run.returncode or not counted or len(table) < 3:
        raise SystemExit(f"check_gdn_traffic: ncu gave no counters:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    units, *launches = csv.DictReader(io.StringIO("\n".join(table)))
    last = launches[-1]
    values = {}
    for name in (READ, WRITTEN):
        if units[name] not in UNITS:
            raise SystemExit(f"check_gdn_traffic: {name} is in {units[name]!r}, want one of {', '.join(UNITS)}")
        values[name] = float(last[name].replace(",", "")) * UNITS[units[name]]
    return values[READ], values[WRITTEN], int(counted[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=pathlib.Path, default=pathlib.Path(os.environ.get("LOCKSTEP_BIN", "build/cuda/bin")) / "gdn_bench")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    ncu = find_ncu()
    if ncu is None:
        raise SystemExit("check_gdn_traffic: no ncu (Nsight Compute) on PATH, in /usr/local/cuda/bin or /opt/nvidia")
    rows = []
    for t in POSITIONS:
        read, written, counted = profile(ncu, arguments.binary, t)
        per_head = BATCH * HEADS
        row = {"name": "gdn decode traffic", "shape": f"batch {BATCH}, row {t}", "bytes": round((read + written) / per_head)}
        row |= {"read": round(read / per_head), "written": round(written / per_head), "counted": round(counted / per_head)}
        row["ratio"] = (read + written) / counted
        rows.append(row)
        print(
            f"row {t:2} of the chunk: {row['read']:7} read + {row['written']:6} written bytes a token and head, "
            f"counted {row['counted']:7}, ratio {row['ratio']:.3f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"kernels": rows}, indent=1) + "\n")
    far = [row["shape"] for row in rows if abs(row["ratio"] - 1) > TOLERANCE]
    if far:
        print(f"more than {TOLERANCE:.0%} from the layout's count: {'; '.join(far)}")
    return int(bool(far))


if __name__ == "__main__":
    sys.exit(main())
