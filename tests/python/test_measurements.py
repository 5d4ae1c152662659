"""README.md's table of RL runs says what docs/measurements/grpo.json says."""

import json
import re


def test_readme_has_the_runs_of_grpo_json(repo_root):
    record = json.loads((repo_root / "docs" / "measurements" / "grpo.json").read_text())
    assert re.fullmatch("[0-9a-f]{40}", record["commit"]), "of a tree without changes"
    want = [
        f"| {run['seed']} | {run['noise']:g} | {run['truncate']:g} | {run['reward_first']:.2f} to {run['reward_last']:.2f} "
        f"| {run['heldout_first']:.3f} to {run['heldout_last']:.3f} | {run['mismatch_mean']:.1e}, {run['mismatch_max']:.1e} "
        f"| {run['seconds']:.0f} |"
        for run in record["runs"]
    ]
    table = (repo_root / "README.md").read_text().split("| seed | noise | truncated at |")[1].split("\n\n")[0]
    assert table.splitlines()[2:] == want
    assert len(want) >= 4 and len({run["steps"] for run in record["runs"]}) == 1
    for run in record["runs"]:
        assert len(run["rewards"]) == run["steps"] and run["mismatch_mean"] < 1e-5 and run["mismatch_max"] < 1e-3
