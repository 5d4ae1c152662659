import io
import json
import os
import pathlib
import subprocess
import sys
import time

import gpu_check_jobs as jobs
import pytest
from gpu_check_jobs import Job, Result

ROOT = pathlib.Path(__file__).resolve().parents[2]


BENCH = {"model": "tiny", "batch": 1, "context": 64, "prefill_tok_s": 9.0, "step_ms": 2.0, "floor_ms": 1.0}
BENCH["ratio"] = 2.0


def shell(text, **fields):
    return Job("a job", ["/bin/sh", "-c", text], **fields)


def test_exit_status_is_the_verdict():
    assert jobs.run_job(shell("exit 0"), 5, io.StringIO()).broken == ""
    result = jobs.run_job(shell("echo why; exit 3"), 5, io.StringIO())
    assert result.status == 3 and "3" in result.broken and result.record()["output_tail"] == "why\n"


def test_time_limit_ends_the_job_and_its_children(tmp_path):
    alive = tmp_path / "alive"
    begin = time.monotonic()
    result = jobs.run_job(shell(f"(sleep 1.5; touch {alive}) & sleep 60"), 0.5, io.StringIO())
    assert time.monotonic() - begin < 5 and result.status is None and "stopped" in result.broken
    time.sleep(1.5)
    assert not alive.exists()


def test_a_late_timing_breaks_no_promise():
    assert jobs.run_job(shell("sleep 60", promise=False), 0.2, io.StringIO()).broken == ""
    assert jobs.run_job(shell("exit 1", promise=False), 5, io.StringIO()).broken != ""


@pytest.mark.parametrize(("promise", "says", "broken"), [(False, "device memory: 9", False), (True, "device memory: 9", True), (False, "x", True)])
def test_a_timing_that_memory_does_not_allow_breaks_no_promise(tmp_path, promise, says, broken):
    job = shell(f"echo '{says}'; exit 2", promise=promise)
    job.json, job.read = tmp_path / "none.json", jobs.read_bench
    result = jobs.run_job(job, 5, io.StringIO())
    assert bool(result.broken) == broken
    assert broken or result.summary == f"not measured: {says}"


def test_what_a_stopped_job_had_found_is_kept(tmp_path):
    report = tmp_path / "bench.json"
    text = f"echo '{json.dumps({'results': [BENCH]})}' > {report}; sleep 60"
    result = jobs.run_job(shell(text, json=report, read=jobs.read_bench), 0.5, io.StringIO())
    assert len(result.found["decode"]) == 1 and "stopped" in result.broken and "1 points" in result.summary


def test_bench_rows_keep_their_kernels_and_say_why_there_are_none(tmp_path):
    report = tmp_path / "bench.json"
    kernels, prefill_kernels = [{"kernel": "A", "us": 1.0}], [{"kernel": "B", "us": 2.0}]
    row = BENCH | {"kernels": kernels, "prefill_kernels": prefill_kernels}
    report.write_text(json.dumps({"results": [row, BENCH]}))
    text = "echo 'profile: left out: no library'"
    result = jobs.run_job(shell(text, json=report, read=jobs.read_bench), 5, io.StringIO())
    assert [row.get("kernels") for row in result.found["decode"]] == [kernels, None]
    assert [row.get("kernels") for row in result.found["prefill"]] == [prefill_kernels, None]
    assert not any("prefill_kernels" in row or "prefill_tok_s" in row for row in result.found["decode"])
    assert result.summary.endswith("times the floor; profile: left out: no library")


def test_no_time_left_is_not_shown():
    result = jobs.run_job(shell("exit 0"), 0, io.StringIO())
    assert "no time left" in result.broken and result.status is None


def test_a_missing_program_is_broken():
    assert jobs.run_job(Job("gone", ["/no/such/program"]), 5, io.StringIO()).broken


def gtest(tmp_path, results):
    tests = [
        {"classname": "Suite", "name": f"T{i}"}
        | {"failed": {"failures": [{}], "result": "COMPLETED"}, "skipped": {"result": "SKIPPED"}}.get(
            kind, {"result": "COMPLETED"}
        )
        for i, kind in enumerate(results)
    ]
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"testsuites": [{"testsuite": tests}]}))
    result = Result("t", 0, 0, "")
    jobs.read_gtest(Job("t", [], json=path), result)
    return result


def test_gtest_reports(tmp_path):
    assert gtest(tmp_path, ["ok", "ok"]).broken == ""
    assert gtest(tmp_path, ["ok", "failed"]).broken == "failed: Suite.T1"
    assert gtest(tmp_path, ["ok", "skipped"]).broken == "skipped: Suite.T1"
    assert gtest(tmp_path, []).broken == "no tests"


@pytest.mark.parametrize(
    "line,broken",
    [
        ("========= ERROR SUMMARY: 0 errors", ""),
        ("========= ERROR SUMMARY: 12 errors", "12 errors"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", ""),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", "3 errors"),
        ("no sanitizer here", "cannot tell"),
    ],
)
def test_sanitizer_output(line, broken):
    job = Job("memcheck a_test", ["/bin/echo", line], read=jobs.read_sanitizer)
    result = jobs.run_job(job, 5, io.StringIO())
    assert result.broken.startswith(broken) and bool(result.broken) == bool(broken)


LINE = "{:78} {:8d} tokens  {:6d} differ  {:6d} logprobs differ  max |d| 0\n"


@pytest.mark.parametrize("numbers,broken", [((2304, 0, 0), False), ((2304, 1, 0), True), ((2304, 0, 7), True)])
def test_invariance_output(numbers, broken):
    output = LINE.format("Score of the same tokens", 10, 0, 0) + LINE.format("all", *numbers) + "INVARIANT\n"
    result = Result("t", 0, 0, output)
    jobs.read_invariance(None, result)
    assert bool(result.broken) == broken
    assert result.found["invariance"] == {"tokens": numbers[0], "differing": numbers[1] + numbers[2]}


def test_output_without_a_total_is_not_a_pass():
    result = jobs.run_job(shell("echo nothing", read=jobs.read_invariance), 5, io.StringIO())
    assert "cannot tell" in result.broken


def test_flags_of_a_check_script(script, monkeypatch):
    flags = script("gpu_check").kernel_flags
    assert flags('add_argument("--output")', "f", False) == ["--output", "f"]
    assert flags('add_argument("--json"); add_argument("--no_timing")', "f", True) == ["--json", "f", "--no_timing"]
    assert flags('add_argument("--seconds")', "f", False)[0] == "--seconds"
    assert flags("", "f", True) == []
    monkeypatch.setenv("LOCKSTEP_CUDA_LIBRARY", "/x.so")
    assert flags("load(sys.argv[1])", "f", False) == ["/x.so"]


def test_kernel_timings_under_any_of_their_names(tmp_path):
    for key in ("kernels", "timings", "results"):
        report = tmp_path / f"{key}.json"
        report.write_text(json.dumps({"device": "x", key: [{"us": 1.0}]}))
        result = jobs.run_job(shell("exit 0", json=report, read=jobs.read_kernels), 5, io.StringIO())
        assert result.found == {"kernels": [{"us": 1.0}]} and not result.broken


def test_findings_add_up():
    measurement = {"versions": {"python": "3"}}
    jobs.merge(measurement, {"invariance": {"tokens": 5, "differing": 0}, "parity": [1]})
    jobs.merge(measurement, {"invariance": {"tokens": 7, "differing": 2, "first_differing": {}}, "parity": [2]})
    jobs.merge(measurement, {"versions": {"torch": "2"}})
    assert measurement == {
        "invariance": {"tokens": 12, "differing": 2},
        "parity": [1, 2],
        "versions": {"python": "3", "torch": "2"},
    }


@pytest.fixture
def fake_bin(tmp_path):
    """Programs whose behaviour a test chooses: fake_bin(parity="shell text", bench=...) -> their folder."""

    def make(parity, bench):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, text in (("lockstep-worker", "exit 0"), ("lockstep-parity", parity), ("lockstep-bench", bench)):
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        return folder

    return make


def gpu_check_command(tmp_path, folder, *flags):
    command = [sys.executable, str(ROOT / "tools" / "gpu_check"), "--bin", str(folder), "--out", str(tmp_path / "out.json")]
    return [*command, "--models", "tiny", "--stages", "invariance,bench", "--scratch", str(tmp_path / "scratch"), *flags]


ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "LOCKSTEP_BIN"}


def gpu_check(tmp_path, folder, *flags):
    out = tmp_path / "out.json"
    command = gpu_check_command(tmp_path, folder, *flags)
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    return result, json.loads(out.read_text()) if out.exists() else None


WRITE_BENCH = f"""while [ $# -gt 1 ]; do shift; done
echo '{json.dumps({"results": [BENCH]})}' > "$1\""""


def test_all_is_well(tmp_path, fake_bin):
    equal = f"echo '{LINE.format('all', 100, 0, 0)}'"
    result, measurement = gpu_check(tmp_path, fake_bin(equal, WRITE_BENCH))
    assert result.returncode == 0, result.stdout + result.stderr
    assert measurement["invariance"] == {"tokens": 300, "differing": 0}  # graphs on, off, shared prefixes
    assert measurement["decode"] == [{key: value for key, value in BENCH.items() if key != "prefill_tok_s"}]
    assert measurement["prefill"] == [{"model": "tiny", "batch": 1, "context": 64, "prefill_tok_s": 9.0}]
    assert {"commit", "command", "device", "versions", "date"} <= set(measurement)
    assert [stage["stage"] for stage in measurement["stages"]] == ["invariance", "bench"]


def test_a_broken_promise_shows_and_the_next_stage_runs(tmp_path, fake_bin):
    different = f"echo '{LINE.format('all', 100, 0, 3)}'; exit 1"
    result, measurement = gpu_check(tmp_path, fake_bin(different, WRITE_BENCH))
    assert result.returncode == 1
    assert measurement["invariance"]["differing"] == 9
    assert len(measurement["decode"]) == 1
    for name in ("graphs on", "graphs off", "shared prefixes"):
        assert f"BROKEN: invariance, tiny, {name}: not invariant" in result.stdout


def test_the_budget_bounds_everything(tmp_path, fake_bin):
    begin = time.monotonic()
    result, measurement = gpu_check(tmp_path, fake_bin("sleep 60", "sleep 60"), "--budget", "1")
    assert time.monotonic() - begin < 10
    assert result.returncode == 1
    assert [len(stage["jobs"]) for stage in measurement["stages"]] == [3, 1]


def test_an_rl_stage_writes_its_own_table(tmp_path, fake_bin):
    def row(model):
        r = {"model": model, "prompts": 64, "samples": 8, "prompt_tokens": 2048, "length_sigma": 0.0, "ratio": 1.2}
        r |= {"response_tokens": 1024, "tok_s": 5.0, "floor_tok_s": 6.0, "sequences_fit": 9, "mean_batch": 8.0}
        return r | {"gpu_hours": 0.5, "steps": 10, "measured_steps": 5}

    scratch = tmp_path / "scratch"
    for model in ("olmo-hybrid-7b", "olmo3-7b"):
        (scratch / model).mkdir(parents=True)
        (scratch / model / "done").touch()
    rl = json.dumps({"device": "GPU", "rl": [row("m")]})
    bench = f"while [ $# -gt 1 ]; do shift; done; echo '{rl}' > \"$1\""
    flags = ("--stages", "rl", "--models", "olmo-hybrid-7b,olmo3-7b", "--keep_weights")
    result, measurement = gpu_check(tmp_path, fake_bin("exit 0", bench), *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [job["name"] for job in measurement["stages"][0]["jobs"]] == ["rl olmo-hybrid-7b", "rl olmo3-7b", "rl table"]
    assert measurement["stages"][0]["jobs"][0]["summary"] == "1024: 5 tok/s" and len(measurement["rl"]) == 2
    assert json.loads((tmp_path / "rl.json").read_text())["rows"][0]["measured"] == 1.0


def test_sigterm_ends_the_jobs_too(tmp_path, fake_bin):
    begun, alive = tmp_path / "begun", tmp_path / "alive"
    folder = fake_bin(f"(sleep 2; touch {alive}) & touch {begun}; sleep 60", "exit 0")
    process = subprocess.Popen(gpu_check_command(tmp_path, folder), stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 20
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(10) == 143
    time.sleep(2.5)
    assert begun.exists() and not alive.exists()


def test_wrong_usage(tmp_path, fake_bin):
    result, measurement = gpu_check(tmp_path, fake_bin("exit 0", "exit 0"), "--stages", "unit,speed")
    assert result.returncode == 2 and "'speed'" in result.stderr and measurement is None
