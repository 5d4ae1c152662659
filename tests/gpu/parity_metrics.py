"""How far two lists of log-probabilities are apart, counted in bits first. Needs numpy alone."""

import dataclasses

import numpy


def same_bits(a, b):
    """Per element: are the bits equal? -0 and 0 differ; a NaN equals itself."""
    a, b = numpy.ascontiguousarray(a), numpy.ascontiguousarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        raise ValueError(f"{a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}")
    kind = {2: numpy.int16, 4: numpy.int32, 8: numpy.int64}[a.dtype.itemsize]
    return a.view(kind) == b.view(kind)


@dataclasses.dataclass
class Difference:
    """Summed up over sequences by add()."""

    tokens: int = 0
    differing: int = 0
    total: float = 0.0  # of |difference|
    max: float = 0.0
    first: dict | None = None  # the first differing token: sequence, position, both values
    nan: int = 0

    def add(self, ours, theirs, sequence=None, position=0):
        """`position` is that of element 0; `sequence` names the sequence."""
        ours, theirs = numpy.asarray(ours, numpy.float32), numpy.asarray(theirs, numpy.float32)
        equal = same_bits(ours, theirs)
        distance = numpy.abs(ours.astype(numpy.float64) - theirs.astype(numpy.float64))
        distance[equal] = 0.0
        bad = numpy.isnan(distance)
        self.nan += int(bad.sum())
        distance[bad] = numpy.inf
        self.tokens += equal.size
        self.differing += int((~equal).sum())
        self.total += float(distance.sum())
        if equal.size:
            self.max = max(self.max, float(distance.max()))
        if self.first is None and not equal.all():
            at = int(numpy.flatnonzero(~equal.ravel())[0])
            self.first = {
                "sequence": sequence,
                "position": position + at,
                "ours": float(ours.ravel()[at]),
                "theirs": float(theirs.ravel()[at]),
            }
        return self

    @property
    def mean(self):
        return self.total / self.tokens if self.tokens else 0.0

    @property
    def bit_equal(self):
        """Share of tokens equal in bits."""
        return (self.tokens - self.differing) / self.tokens if self.tokens else 0.0


def table(titles, rows):
    """Lines of right-aligned columns."""
    cells = [list(titles)] + [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(titles))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)
