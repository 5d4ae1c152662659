"""What a build or a bundle holds, which commit it is of, and what every measurement says of itself."""

import datetime
import json
import pathlib
import platform
import shlex
import subprocess
import sys

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


def measurement(program, device, versions=None):
    """What a measurement's JSON begins with. program: the __file__ of what measured; device: the text that names it."""
    path = pathlib.Path(program).resolve().relative_to(ROOT)
    return {
        "commit": commit_text(),
        "command": shlex.join([str(path), *sys.argv[1:]]),
        "device": device,
        "versions": {"python": platform.python_version()} | (versions or {}),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
