"""lockstep top: against a real worker, and one that is not there."""

import json
import re
import socket
import threading
import time

import pytest

from lockstep import cli, top
from lockstep.cli import main
from lockstep.client import RolloutClient
from lockstep.errors import LockstepError
from lockstep.sampling import SamplingParams


@pytest.fixture
def nobody():
    """The address of a port that is bound and never listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")


def test_once_shows_a_worker_at_work_and_one_that_does_not_answer(worker, nobody, capsys, monkeypatch, tmp_path):
    wide(monkeypatch)
    check = tmp_path / "parity.json"
    metrics = {"vllm_vs_local_logprob_diff_mean": 1.5e-7, "vllm_vs_local_logprob_diff_max": 3e-6}
    check.write_text(json.dumps({"layouts": [{"layout": "packed", "metrics": metrics}]}))
    with RolloutClient([worker.data]) as client:
        running = threading.Thread(
            target=client.generate, args=([[1, 2, 3]] * 4, SamplingParams(max_tokens=1500, ignore_eos=True))
        )
        running.start()
        status = main(
            ["top", "--once", "--interval", "0.3", "--worker", worker.data, "--worker", nobody, "--check", str(check)]
        )
        running.join()
    shown = capsys.readouterr().out
    assert status == 1, "one does not answer"
    (line,) = (line for line in shown.splitlines() if worker.data in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    by_name = dict(zip(top.COLUMNS, cells, strict=True))
    assert int(by_name["tok/s"].replace(",", "")) > 100
    assert by_name["running"] == "4" and by_name["waiting"] == "0" and by_name["weights"] == "0.0"
    assert re.fullmatch(r"4 of \d+", by_name["state slots"]) and not by_name["KV pages"].startswith("0 of")
    assert float(by_name["step, ms"]) > 0
    assert re.search(rf"{nobody}.*UNAVAILABLE", shown)
    assert "2 workers" in shown and "1 not answering" in shown
    assert "packed mean 1.5e-07, largest 3e-06" in shown


def test_rates_are_of_two_answers_of_one_run(worker):
    with top.Poller([worker.data]) as poller:
        (first,) = poller.poll().values()
        time.sleep(0.05)
        (second,) = poller.poll().values()
    assert top.rate(first, second, "steps") >= 0
    assert top.rate(None, second, "steps") is None
    assert top.rate(top.Sample(0.0, error="UNAVAILABLE"), second, "steps") is None
    first.load.steps = second.load.steps + 1  # as if it had started anew
    assert top.rate(first, second, "steps") is None


def test_versions_that_differ_are_named():
    def sample(step):
        load = top.pb.GetLoadResponse()
        load.weight_version.step = step
        return top.Sample(1.0, load=load)

    assert "2 versions of the weights: 0.3, 0.4" in top.footer({}, {"a": sample(4), "b": sample(3)})
    assert "versions" not in top.footer({}, {"a": sample(4), "b": sample(4)})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (190, "3 min 10 s"), (5 * 3600 + 125, "5 h 2 min"), (2 * 86400 + 4 * 3600, "2 d 4 h")],
)
def test_durations(seconds, text):
    assert top.duration(seconds) == text


def test_bad_input_is_named(worker, tmp_path, capsys):
    assert main(["top", "--once", "--worker", worker.data, "--interval", "nan"]) == 2
    assert "--interval: nan" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(LockstepError, match=r"--check .*bad.json: KeyError"):
        top.check_line(tmp_path / "bad.json")
    assert top.check_line(tmp_path / "none.json").startswith("last check: none yet")


def test_a_check_in_the_making_does_not_end_the_table(worker, tmp_path, monkeypatch):
    """The file is half written for a while; the table says so and goes on."""
    check = tmp_path / "parity.json"
    shown = []

    def render(before, now, line):
        shown.append(line)
        check.write_text('{"layouts"' if len(shown) < 3 else '{"layouts": []}')
        if len(shown) == 5:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(top, "render", render)
    assert main(["top", "--interval", "0.1", "--worker", worker.data, "--check", str(check)]) == 0
    assert shown[0].startswith("last check: none yet")
    assert all(re.match(r"--check .*parity.json: JSONDecodeError", line) for line in shown[1:3])
    assert all(line.startswith("last check, 0") for line in shown[3:])


def test_a_written_file_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "parity.json"
    cli._write(str(path), "old")
    monkeypatch.setattr(cli.pathlib.Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli._write(str(path), "new")
    assert path.read_text() == "old"
