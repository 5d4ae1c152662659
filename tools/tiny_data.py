#!/usr/bin/env python3
"""Data of the tiny checkpoint: public-domain text from a distribution package, and generated arithmetic with checkable
answers.

    tools/tiny_data.py --out DIR      writes DIR/text.txt (about 4 MB) and DIR/SOURCE.txt

The text is the King James Bible (1611) of Debian's and Ubuntu's package bible-kjv-text, read with the program of
package bible-kjv. Both are downloaded with apt-get and unpacked beside, not installed. One chapter is one document: its
title, then one verse a line; documents are separated by one form feed.

The arithmetic is generated, never stored. A problem is a prompt and its answer (a non-negative integer); a completion
is right when its text up to the first line end or end-of-text token is the answer. About one problem in 20 is held out,
by a hash of what is computed (so 12+7, 7+12 and a story about 12 and 7 apples are held out together): training draws
from split "train", evaluation from split "heldout".
"""

import argparse
import hashlib
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

END_OF_TEXT = "<|endoftext|>"
DOCUMENT_SEPARATOR = "\f"
HELDOUT_ONE_IN = 20


class Problem(NamedTuple):
    prompt: str
    answer: str


# Kind -> share of the training problems. The hard kinds (add4, mul2, sum3) get little, so that there is something left
# to learn.
KINDS = {
    "add2": 0.17,  # one or two digits each
    "add3": 0.14,  # three digits each
    "add4": 0.05,  # four digits each
    "sub2": 0.14,
    "sub3": 0.10,
    "mul1": 0.11,  # one digit times one or two
    "mul2": 0.06,  # two digits times two
    "sum3": 0.07,  # three terms of one or two digits
    "max": 0.06,  # the larger of two numbers
    "word": 0.10,  # a story of one addition or subtraction
}

_NAMES = ("Adam", "Anna", "David", "Eve", "Jacob", "Mary", "Peter", "Ruth", "Sarah", "Thomas")
_THINGS = ("apples", "books", "coins", "figs", "fishes", "lambs", "loaves", "pearls", "sheep", "stones")
_MORE = (
    "{name} has {a} {thing} and gets {b} more. How many {thing} are there? ",
    "There are {a} {thing} here and {b} there. How many {thing} are there? ",
)
_LESS = (
    "{name} has {a} {thing} and gives {b} away. How many {thing} are left? ",
    "There were {a} {thing} and {b} are lost. How many {thing} are left? ",
)


def is_heldout(operation, *operands):
    """Whether this computation is kept from training. Operands of a commutative operation count in any order."""
    if operation in ("+", "*", "max"):
        operands = sorted(operands)
    digest = hashlib.blake2b(f"{operation} {' '.join(map(str, operands))}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELDOUT_ONE_IN == 0


def _symbolic(rng, expression):
    return f"{expression}=" if rng.random() < 0.7 else f"Q: {expression} A: "


def _short_number(rng):
    return rng.randrange(10) if rng.random() < 0.3 else rng.randrange(10, 100)


def _draw(rng, kind):
    """(operation, operands, prompt, answer)"""
    if kind in ("add2", "add3", "add4", "sub2", "sub3"):
        digits = int(kind[3])
        a, b = (_short_number(rng) if digits == 2 else rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        if kind.startswith("add"):
            return "+", (a, b), _symbolic(rng, f"{a}+{b}"), a + b
        a, b = max(a, b), min(a, b)
        return "-", (a, b), _symbolic(rng, f"{a}-{b}"), a - b
    if kind == "mul1":
        a, b = rng.randrange(2, 10), rng.randrange(2, 100)
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return "*", (a, b), _symbolic(rng, f"{a}*{b}"), a * b
    if kind == "mul2":
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        return "*", (a, b), _symbolic(rng, f"{a}*{b}"), a * b
    if kind == "sum3":
        a, b, c = (_short_number(rng) for _ in range(3))
        return "+", (a, b, c), _symbolic(rng, f"{a}+{b}+{c}"), a + b + c
    if kind == "max":
        limit = 10 ** rng.randrange(1, 5)
        a = rng.randrange(limit)
        b = rng.randrange(limit)
        return "max", (a, b), f"Which is more, {a} or {b}? ", max(a, b)
    if kind == "word":
        a, b = _short_number(rng), _short_number(rng)
        name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
        if rng.random() < 0.5:
            return "+", (a, b), rng.choice(_MORE).format(name=name, thing=thing, a=a, b=b), a + b
        a, b = max(a, b), min(a, b)
        return "-", (a, b), rng.choice(_LESS).format(name=name, thing=thing, a=a, b=b), a - b
    raise ValueError(f"kind is {kind!r}, want one of {', '.join(KINDS)}")


def make_problem(rng, kind, split="train"):
    """A Problem(prompt, answer) of `kind`; rng is a random.Random. split: "train", "heldout" or "any"."""
    if split not in ("train", "heldout", "any"):
        raise ValueError(f"split is {split!r}, want 'train', 'heldout' or 'any'")
    while True:
        operation, operands, prompt, answer = _draw(rng, kind)
        if split == "any" or is_heldout(operation, *operands) == (split == "heldout"):
            return Problem(prompt, str(answer))


def make_problems(seed, count, split="train"):
    """`count` problems, kinds drawn by their share in KINDS."""
    rng = random.Random(seed)
    kinds = rng.choices(list(KINDS), weights=list(KINDS.values()), k=count)
    return [make_problem(rng, kind, split) for kind in kinds]


def check(completion, answer):
    """Whether the text generated after a prompt gives the answer."""
    return completion.split(END_OF_TEXT)[0].split("\n")[0].strip() == answer


# --- text ---

_PACKAGES = ("bible-kjv", "bible-kjv-text")
_VERSE = re.compile(r"^  \d+ (.+)$")


def _unpack_packages(into):
    for package in _PACKAGES:
        subprocess.run(["apt-get", "download", package], cwd=into, check=True, stdout=subprocess.DEVNULL)
        (deb,) = pathlib.Path(into).glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", str(deb), str(into)], check=True)
    return sorted(deb.name for deb in pathlib.Path(into).glob("*.deb"))


def _read_chapters(root):
    """{"Genesis 1": [verses]}. -l: no verse is broken over lines; a verse starts with two spaces and its number, a
    title stands alone.
    """
    command = [str(root / "usr/bin/bible"), "-l100000", "-p", str(root / "usr/lib"), "gen1:1-rev22:21"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, encoding="ascii").stdout.splitlines()
    chapters, verses = {}, []
    for line in filter(None, lines):
        if match := _VERSE.match(line):
            verses.append(match[1])
        else:
            verses = chapters.setdefault(line, [])
    found = (len(chapters), sum(map(len, chapters.values())))
    if found != (1189, 31102):
        raise ValueError(f"read {found[0]} chapters and {found[1]} verses, want the King James Bible's 1189 and 31102")
    return chapters


def prepare_text(out):
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for program in ("apt-get", "dpkg"):
        if not shutil.which(program):
            raise SystemExit(f"tiny_data: {program} is not there; this needs Debian or Ubuntu")
    with tempfile.TemporaryDirectory() as unpacked:
        root = pathlib.Path(unpacked)
        os.chmod(root, 0o755)
        debs = _unpack_packages(root)
        chapters = _read_chapters(root)
        licence = (root / "usr/share/doc/bible-kjv-text/copyright").read_text()
    documents = ["\n".join([title, *verses]) + "\n" for title, verses in chapters.items()]
    (out / "text.txt").write_text(DOCUMENT_SEPARATOR.join(documents))
    origin = f"text.txt was made from {', '.join(debs)}. The copyright file of bible-kjv-text says:"
    (out / "SOURCE.txt").write_text(f"{origin}\n\n{licence}")
    print(f"{out}/text.txt: {len(documents)} chapters, {(out / 'text.txt').stat().st_size} bytes")


def read_documents(directory):
    """(training documents, validation documents): every 32nd chapter is for validation."""
    documents = (pathlib.Path(directory) / "text.txt").read_text().split(DOCUMENT_SEPARATOR)
    validation = documents[16::32]
    training = [document for i, document in enumerate(documents) if i % 32 != 16]
    return training, validation


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="directory for text.txt and SOURCE.txt")
    parser.add_argument("--problems", type=int, default=0, help="print this many held-out problems, and stop")
    arguments = parser.parse_args()
    if arguments.problems:
        for problem in make_problems(0, arguments.problems, "heldout"):
            print(f"{problem.prompt}{problem.answer}")
    elif arguments.out:
        prepare_text(arguments.out)
    else:
        parser.error("--out or --problems is needed")


if __name__ == "__main__":
    sys.exit(main())
