"""What a build or a bundle holds, and which commit it is of."""

import json
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
MANIFEST = ROOT / "bundle.json"  # in a bundle only


def cuda_tests(build):
    """Names of the build's tests with the label cuda."""
    result = subprocess.run(
        ["ctest", "--test-dir", str(build), "-L", "^cuda$", "--show-only=json-v1"],
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(test["name"] for test in json.loads(result.stdout)["tests"])


def commit_text():
    """The commit, with "+changes" where tracked files differ from it."""
    if MANIFEST.exists():
        return json.loads(MANIFEST.read_text())["commit"]

    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("+changes" if changed else "")
