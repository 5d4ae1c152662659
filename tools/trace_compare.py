#!/usr/bin/env python3
"""Names the first operation and row at which two traces differ in bits (docs/trace.md).

    tools/trace_compare.py OURS THEIRS

Exit status: 0 no bit differs, 1 some do, 2 there is nothing to compare.
"""

import argparse
import dataclasses
import sys

import numpy
from trace_format import read


@dataclasses.dataclass
class Comparison:
    layer: int
    name: str
    rows: int
    differing_rows: int
    elements: int
    differing: int
    max: float  # largest |difference|; infinity where one side is NaN
    first: tuple | None  # (position, column's name, ours, theirs)

    @property
    def operation(self):
        return self.name if self.layer < 0 else f"layer {self.layer} {self.name}"


def compare_tensors(ours, theirs):
    """Over the positions that both have."""
    common = [p for p in ours.positions if p in set(theirs.positions)]
    mine = numpy.array([ours.positions.index(p) for p in common], int)
    other = numpy.array([theirs.positions.index(p) for p in common], int)
    integers = numpy.uint16 if ours.dtype == "bf16" else numpy.uint32
    differs = ours.rows[mine].view(integers) != theirs.rows[other].view(integers)
    a = ours.values()[mine].astype(numpy.float64)
    b = theirs.values()[other].astype(numpy.float64)
    distance = numpy.where(differs, numpy.abs(a - b), 0.0)
    distance[numpy.isnan(distance)] = numpy.inf
    first = None
    if differs.any():
        row = int(numpy.flatnonzero(differs.any(1))[0])
        column = int(numpy.flatnonzero(differs[row])[0])
        first = (common[row], ours.part(column), float(a[row, column]), float(b[row, column]))
    return Comparison(
        layer=ours.layer,
        name=ours.name,
        rows=len(common),
        differing_rows=int(differs.any(1).sum()),
        elements=int(differs.size),
        differing=int(differs.sum()),
        max=float(distance.max(initial=0.0)),
        first=first,
    )


def compare_traces(ours, theirs):
    """(comparisons in the order of computation, remarks on what could not be compared)."""
    others = {(tensor.layer, tensor.name): tensor for tensor in theirs}
    comparisons, remarks = [], []
    for tensor in ours:
        other = others.pop((tensor.layer, tensor.name), None)
        label = f"layer {tensor.layer} {tensor.name}"
        if other is None:
            remarks.append(f"{label}: only in the first trace")
        elif (tensor.dtype, tensor.width) != (other.dtype, other.width):
            shapes = f"{tensor.dtype} x {tensor.width} against {other.dtype} x {other.width}"
            remarks.append(f"{label}: {shapes}")
        elif not set(tensor.positions) & set(other.positions):
            remarks.append(f"{label}: no position in common")
        else:
            comparisons.append(compare_tensors(tensor, other))
    remarks += [f"layer {layer} {name}: only in the second trace" for layer, name in others]
    return comparisons, remarks


def report(comparisons, remarks, limit):
    """Lines of text."""
    differing = [c for c in comparisons if c.differing]
    elements = sum(c.elements for c in comparisons)
    lines = [f"{len(comparisons)} operations, {elements} elements compared; {len(differing)} operations differ"]
    lines += [f"not compared: {remark}" for remark in remarks[:limit]]
    if len(remarks) > limit:
        lines.append(f"not compared: {len(remarks) - limit} more")
    if not differing:
        return [*lines, "no bit differs"]
    lines.append(f"{'operation':28} {'rows':>11} {'elements':>19} {'max |d|':>9}  first: position, column, values")
    for c in differing[:limit]:
        position, column, a, b = c.first
        rows, counts = f"{c.differing_rows}/{c.rows}", f"{c.differing}/{c.elements}"
        lines.append(f"{c.operation:28} {rows:>11} {counts:>19} {c.max:9.3g}  {position}, {column}, {a!r}, {b!r}")
    if len(differing) > limit:
        lines.append(f"... {len(differing) - limit} more")
    first = differing[0]
    lines.append(
        f"FIRST DIFFERENCE: {first.operation}, position {first.first[0]} "
        f"({first.differing_rows} of {first.rows} rows, {first.differing} of {first.elements} elements)"
    )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours")
    parser.add_argument("theirs")
    parser.add_argument("--limit", type=int, default=20, help="operations to list (default: 20)")
    arguments = parser.parse_args()
    try:
        our_tokens, _, ours = read(arguments.ours)
        their_tokens, _, theirs = read(arguments.theirs)
    except (OSError, ValueError, KeyError) as error:
        print(f"trace_compare: {error}", file=sys.stderr)
        return 2
    if our_tokens != their_tokens:
        print("trace_compare: the traces are of different tokens", file=sys.stderr)
        return 2
    comparisons, remarks = compare_traces(ours, theirs)
    if not comparisons:
        print("trace_compare: the traces have no operation in common", file=sys.stderr)
        return 2
    print("\n".join(report(comparisons, remarks, arguments.limit)))
    return 1 if any(c.differing for c in comparisons) else 0


if __name__ == "__main__":
    sys.exit(main())
