"""tools/merge_gpu_checks.py: rows keep the run they are of, counts add up."""

import json

import merge_gpu_checks


def run(commit, **found):
    return {"commit": commit, "command": "tools/gpu_check", "device": "GPU", "versions": {}, "date": "today", **found}


def test_rows_keep_their_run_and_counts_add_up():
    merged = merge_gpu_checks.merge(
        [
            run("a", parity=[{"shape": "x"}], invariance={"tokens": 10, "differing": 1}),
            run("b", parity=[{"shape": "y"}], decode=[{"batch": 1}], invariance={"tokens": 5, "differing": 0}),
        ]
    )
    assert [r["commit"] for r in merged["runs"]] == ["a", "b"] and merged["commit"] == "b"
    assert merged["parity"] == [{"shape": "x", "run": 0}, {"shape": "y", "run": 1}]
    assert merged["decode"] == [{"batch": 1, "run": 1}]
    assert merged["invariance"] == {"tokens": 15, "differing": 1}
    assert "serving" not in merged


def test_a_merged_file_is_taken_apart_again(tmp_path):
    first, second = run("a", parity=[{"shape": "x"}], invariance={"tokens": 10, "differing": 0}), run("b", decode=[{"batch": 1}])
    path = tmp_path / "merged.json"
    path.write_text(json.dumps(merge_gpu_checks.merge([first, second])))
    assert merge_gpu_checks.read(str(path))[0] == first
    only = merge_gpu_checks.read(f"{path}:1")
    assert len(only) == 1 and only[0]["commit"] == "b" and only[0]["decode"] == [{"batch": 1}]
    again = merge_gpu_checks.merge(merge_gpu_checks.read(str(path)))
    assert again["invariance"] == {"tokens": 10, "differing": 0} and again["parity"] == [{"shape": "x", "run": 0}]


def test_older_files_say_their_tokens_in_the_jobs(tmp_path):
    stages = [{"stage": "invariance", "jobs": [{"summary": "41472 tokens, 0 differ"}, {"summary": "stopped after 5 s"}]}]
    old = {"runs": [run("a", stages=stages)], "invariance": {"tokens": 41472, "differing": 0}}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    assert merge_gpu_checks.read(str(path))[0]["invariance"] == {"tokens": 41472, "differing": 0}
