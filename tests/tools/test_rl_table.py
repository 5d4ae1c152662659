"""tools/rl_table.py: hybrid against dense."""

import json
import sys

import pytest
import rl_table


def row(model, response, tok_s, floor_tok_s, **fields):
    r = {"model": model, "prompts": 64, "samples": 8, "prompt_tokens": 2048, "length_sigma": 0.0}
    r |= {"response_tokens": response, "tok_s": tok_s, "floor_tok_s": floor_tok_s, "ratio": floor_tok_s / tok_s}
    r |= {"sequences_fit": 100, "mean_batch": 90.4, "gpu_hours": 0.25, "steps": 1000, "measured_steps": 70}
    return r | fields


def by_length(*rows):
    return {r["response_tokens"]: r for r in rows}


def test_the_lead_measured_and_predicted():
    hybrid = by_length(row("h", 1024, 3000.0, 4000.0), row("h", 4096, 2000.0, 2100.0), row("h", 512, 1.0, 1.0))
    dense = by_length(row("d", 1024, 1500.0, 1600.0), row("d", 4096, 2500.0, 2600.0))
    rows = rl_table.compare(hybrid, dense)
    assert [r["response_tokens"] for r in rows] == [1024, 4096]
    assert rows[0]["measured"] == 2.0 and rows[0]["predicted"] == 2.5
    assert rows[0]["gain"] == pytest.approx(1.0 / 1.5)
    # Behind, and predicted so: there is no lead to have a share of.
    assert rows[1]["measured"] < 1 and rows[1]["gain"] is None


def test_shapes_must_be_one():
    with pytest.raises(ValueError, match="samples is 8 for hybrid and 4 for dense"):
        rl_table.compare(by_length(row("h", 1024, 2.0, 2.0)), by_length(row("d", 1024, 1.0, 1.0, samples=4)))
    with pytest.raises(ValueError, match=r"hybrid has \[1024\], dense \[4096\]"):
        rl_table.compare(by_length(row("h", 1024, 2.0, 2.0)), by_length(row("d", 4096, 1.0, 1.0)))


def write(path, device, *rows):
    path.write_text(json.dumps({"device": device, "rl": rows}))
    return str(path)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["rl_table.py", *arguments])
    rl_table.main()


def test_the_table(tmp_path, monkeypatch, capsys):
    hybrid = write(
        tmp_path / "h.json", "GPU", row("hybrid-7b", 1024, 3000.0, 4000.0), row("hybrid-7b", 4096, 2000.0, 2000.0)
    )
    dense = write(
        tmp_path / "d.json", "GPU", row("dense-7b", 1024, 1500.0, 1600.0), row("dense-7b", 4096, 1000.0, 1000.0)
    )
    run(monkeypatch, "--hybrid", hybrid, "--dense", dense, "--json", str(tmp_path / "rl.json"))
    found = json.loads((tmp_path / "rl.json").read_text())
    assert {"commit", "command", "device", "date"} <= set(found) and found["rows"][0]["hybrid"]["tok_s"] == 3000.0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines[:6]}) == 1
    assert lines[2].startswith("| 1,024 | hybrid-7b | 3,000 | 4,000 | 1.33 | 100 | 90 | 0.250 | 2.00 | 2.50 | 67% |")
    assert "dense-7b" in lines[3] and "2.00 | 2.00 | 100%" in lines[4]
    assert "hybrid: 140 of 2,000 steps measured; dense: 140 of 2,000 steps measured." in lines
    assert lines[-1].endswith("at 1024")


def test_files_that_do_not_belong_together_are_refused(tmp_path, monkeypatch, capsys):
    hybrid = write(tmp_path / "h.json", "one GPU", row("h", 1024, 2.0, 2.0))
    dense = write(tmp_path / "d.json", "another", row("d", 1024, 1.0, 1.0))
    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps({"device": "GPU", "results": []}))
    for arguments, message in (
        (("--hybrid", hybrid, "--dense", dense), "want one device"),
        (("--hybrid", str(grid), "--dense", dense), "lockstep-bench --rl"),
        (("--hybrid", str(tmp_path / "gone"), "--dense", dense), "gone"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, *arguments)
        assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    hybrid = write(tmp_path / "h.json", "GPU", row("h", 1024, 2.0, 2.0))
    with pytest.raises(SystemExit):
        run(monkeypatch, "--hybrid", hybrid, "--dense", hybrid, "--plot", str(tmp_path / "x.png"))
    assert "--plot needs matplotlib" in capsys.readouterr().err
