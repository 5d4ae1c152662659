import numpy
import pytest
from parity_metrics import Difference, same_bits, table


def test_bits_not_values():
    a = numpy.array([0.0, numpy.nan, 1.0], numpy.float32)
    b = numpy.array([-0.0, numpy.nan, 1.0], numpy.float32)
    assert same_bits(a, b).tolist() == [False, True, True]


def test_shapes_and_types_must_agree():
    with pytest.raises(ValueError, match="float32"):
        same_bits(numpy.zeros(2, numpy.float32), numpy.zeros(2, numpy.float64))
    with pytest.raises(ValueError):
        same_bits(numpy.zeros(2, numpy.float32), numpy.zeros(3, numpy.float32))


def test_sums_over_sequences():
    d = Difference()
    d.add([-1.0, -2.0], [-1.0, -2.0], "a", position=1)
    assert (d.tokens, d.differing, d.bit_equal, d.first) == (2, 0, 1.0, None)
    d.add([-1.0, -2.0, -3.0], [-1.0, -2.5, -3.25], "b", position=10)
    assert (d.tokens, d.differing, d.max) == (5, 2, 0.5)
    assert d.mean == pytest.approx(0.75 / 5)
    assert d.bit_equal == pytest.approx(3 / 5)
    assert d.first == {"sequence": "b", "position": 11, "ours": -2.0, "theirs": -2.5}


def test_one_ulp_counts():
    x = numpy.float32(-3.0)
    d = Difference().add([x], [numpy.nextafter(x, numpy.float32(0))])
    assert d.differing == 1 and 0 < d.max < 1e-6


def test_a_nan_on_one_side_is_no_small_difference():
    d = Difference().add([numpy.nan, -1.0], [-1.0, -1.0])
    assert d.nan == 1 and d.max == numpy.inf and d.differing == 1
    # Both NaN with the same bits: equal, and no NaN is counted as a difference.
    d = Difference().add([numpy.nan], [numpy.nan])
    assert (d.nan, d.differing) == (0, 0)


def test_nothing_compared_is_not_equality():
    assert Difference().bit_equal == 0.0


def test_table_columns_line_up():
    lines = table(("a", "long title"), [(1, "x"), (1000, "y")]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[0].endswith("long title")
