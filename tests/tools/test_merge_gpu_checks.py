"""tools/merge_gpu_checks.py: rows keep the run they are of, counts add up."""

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
