"""The jobs of tools/gpu_check: commands with a time limit, and what their output says."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import time


@dataclasses.dataclass
class Job:
    name: str
    command: list
    json: pathlib.Path | None = None  # a file the command writes
    read: object = None  # read(job, result): what to put into the measurement; raises ValueError if it cannot tell
    environment: dict = dataclasses.field(default_factory=dict)
    # A promise fails if the job takes too long: it was not shown. A timing does not.
    promise: bool = True


@dataclasses.dataclass
class Result:
    name: str
    seconds: float
    status: int | None  # None: it ran past its limit, or was never started
    output: str
    broken: str = ""  # why a promise does not hold; empty if it does
    summary: str = ""
    found: dict = dataclasses.field(default_factory=dict)  # lists and counts to add to the measurement

    def record(self):
        fields = {"name": self.name, "seconds": round(self.seconds, 2), "status": self.status}
        fields |= {"broken": self.broken, "summary": self.summary}
        if self.broken:
            fields["output_tail"] = self.output[-3000:]
        return fields


_running = set()  # processes of run_job


def kill_running():
    """Ends every job under way, with what it has started."""
    for process in list(_running):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def run_job(job, limit, log):
    """Runs the command for at most `limit` seconds; its processes end with it. `log`: a file for its output."""
    begin = time.perf_counter()
    if limit <= 0:
        return finish(job, Result(job.name, 0.0, None, "", summary="not started: no time left"))
    try:
        process = subprocess.Popen(
            [str(part) for part in job.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | job.environment,
            start_new_session=True,
        )
    except OSError as error:
        return Result(job.name, 0.0, None, str(error), broken=str(error))
    _running.add(process)
    try:
        output, _ = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = None
    _running.discard(process)
    result = Result(job.name, time.perf_counter() - begin, status, output)
    if status is None:
        result.summary = f"stopped after {limit:.0f} s"
    log.write(f"=== {job.name}: {' '.join(map(str, job.command))}\n{output}\n=== {result.status}\n")
    log.flush()
    return finish(job, result)


def finish(job, result):
    """Reads what the command found, and decides whether a promise is broken."""
    stopped = result.summary if result.status is None else ""
    try:
        # A program that was stopped may have written what it had found.
        if job.read and (not stopped or (job.json and job.json.exists())):
            job.read(job, result)
    except (ValueError, KeyError, OSError) as error:
        refused = next((line for line in result.output.splitlines() if "device memory: " in line), "")
        if not job.promise and refused:
            result.summary = f"not measured: {refused}"
            return result
        result.broken = f"cannot tell: {error}"
    if stopped:
        result.summary = stopped if result.summary == stopped else f"{stopped}; {result.summary}"
        if job.promise:
            result.broken = result.broken or stopped
    elif result.status:
        result.broken = result.broken or f"exit status {result.status}"
    return result


def read_gtest(job, result):
    """Counts of --gtest_output=json; a skipped test shows nothing."""
    report = json.loads(job.json.read_text())
    tests = [test for suite in report["testsuites"] for test in suite["testsuite"]]
    failed = [f"{test['classname']}.{test['name']}" for test in tests if test.get("failures")]
    skipped = [f"{test['classname']}.{test['name']}" for test in tests if test.get("result") == "SKIPPED"]
    passed = len(tests) - len(failed) - len(skipped)
    result.summary = f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped"
    if failed:
        result.broken = f"failed: {', '.join(failed[:5])}"
    elif skipped:
        result.broken = f"skipped: {', '.join(skipped[:5])}"
    elif not passed:
        result.broken = "no tests"


def read_sanitizer(job, result):
    """compute-sanitizer's last line."""
    match = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", result.output)
    if match is None:
        raise ValueError(f"no summary in the output: {result.output[-300:]!r}")
    tool, _, test = job.name.partition(" ")
    result.found = {"sanitizer": [{"tool": tool, "test": test, "errors": int(match[1])}]}
    result.summary = f"{match[1]} errors"
    if match[1] != "0":
        result.broken = f"{match[1]} errors"


_PARITY_TOTAL = re.compile(r"^all\s+(\d+) tokens\s+(\d+) differ\s+(\d+) logprobs differ", re.MULTILINE)


def read_invariance(job, result):
    """The last line of lockstep-parity's table."""
    match = _PARITY_TOTAL.search(result.output)
    if match is None:
        raise ValueError(f"no total in the output: {result.output[-300:]!r}")
    tokens, other_tokens, other_bits = map(int, match.groups())
    result.found = {"invariance": {"tokens": tokens, "differing": other_tokens + other_bits}}
    result.summary = f"{tokens} tokens, {other_tokens + other_bits} differ"
    if other_tokens or other_bits:
        result.broken = f"not invariant: {other_tokens} tokens and {other_bits} log-probabilities of {tokens} differ"


def read_parity(job, result):
    """check_parity.py's rows."""
    found = json.loads(job.json.read_text())
    result.found = {"parity": found["parity"], "invariance": found["invariance"], "versions": found["versions"]}
    rows = [f"{row['mode']}: {row['tokens'] - row['differing']}/{row['tokens']} equal" for row in found["parity"]]
    result.summary = "; ".join(rows)
    broken = [row["broken"] for row in found["parity"] if row["broken"]]
    if found["invariance"]["differing"]:
        broken.append(f"Generate differs from Score at {found['invariance']['differing']} tokens")
    result.broken = "; ".join(broken)


def read_kernels(job, result):
    """Rows that a kernel check wrote, if it writes any; its exit status is the verdict."""
    if job.json is None or not job.json.exists():
        return
    found = json.loads(job.json.read_text())
    rows = next((found[key] for key in ("kernels", "timings", "results") if isinstance(found.get(key), list)), [])
    result.found = {"kernels": rows}
    result.summary = f"{len(rows)} timings"


def read_bench(job, result):
    """lockstep-bench's rows, as decode steps and as prefill, each with its kernels where they were recorded."""
    rows = json.loads(job.json.read_text())["results"]
    if not rows:
        raise ValueError("no rows")
    prefill = []
    for row in rows:
        prefill.append({key: row[key] for key in ("model", "batch", "context", "prefill_tok_s")})
        if "prefill_kernels" in row:
            prefill[-1]["kernels"] = row["prefill_kernels"]
    decode = [{key: value for key, value in row.items() if not key.startswith("prefill_")} for row in rows]
    result.found = {"decode": decode, "prefill": prefill}
    ratios = [row["ratio"] for row in rows]
    result.summary = f"{len(rows)} points, {min(ratios):.2f} to {max(ratios):.2f} times the floor"
    left_out = re.search(r"^profile: left out: .*", result.output, re.MULTILINE)
    if left_out:
        result.summary += f"; {left_out[0]}"


def read_rl(job, result):
    """lockstep-bench --rl's rows, of one model."""
    rows = json.loads(job.json.read_text())["rl"]
    result.found = {"rl": rows}
    result.summary = ", ".join(f"{row['response_tokens']}: {row['tok_s']:.0f} tok/s" for row in rows)


def read_last_line(job, result):
    """Of a program that writes a measurement of its own."""
    lines = result.output.strip().splitlines()
    result.summary = lines[-1][:200] if lines else ""


def merge(measurement, found):
    """Adds a job's findings: lists grow, counts add up."""
    for key, value in found.items():
        if isinstance(value, list):
            measurement.setdefault(key, []).extend(value)
        elif key == "invariance":
            total = measurement.setdefault(key, {"tokens": 0, "differing": 0})
            total["tokens"] += value["tokens"]
            total["differing"] += value["differing"]
        else:
            measurement.setdefault(key, {}).update(value)
