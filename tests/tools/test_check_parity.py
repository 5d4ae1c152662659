import check_parity
import pytest
from parity_metrics import Difference


@pytest.mark.parametrize("lengths,tokens,want", [((5,), 1, [5]), ((5, 7), 20, [5, 7, 5, 7]), ((5, 7), 12, [5, 7])])
def test_lengths_repeat_until_there_are_tokens_enough(lengths, tokens, want):
    assert check_parity.choose_lengths(lengths, tokens) == want


EQUAL = Difference(tokens=10)
OFF = Difference(tokens=10, differing=1, total=0.3, max=0.3)
EMPTY = Difference()


def test_nosplit_promises_every_bit():
    assert check_parity.broken_promise("nosplit", EQUAL, EQUAL, EMPTY, EQUAL) == ""
    assert "bits" in check_parity.broken_promise("nosplit", OFF, EQUAL, EMPTY, OFF)
    assert "bits" in check_parity.broken_promise("nosplit", EQUAL, OFF, EMPTY, EQUAL)


def test_stock_may_be_as_noisy_as_the_trainer_is():
    loud = Difference(tokens=10, differing=9, total=0.4, max=0.1)
    assert check_parity.broken_promise("stock", OFF, OFF, loud, OFF) == ""
    assert "noise" in check_parity.broken_promise("stock", OFF, OFF, Difference(tokens=10), OFF)
    assert check_parity.broken_promise("stock", EQUAL, EQUAL, Difference(tokens=10), EQUAL) == ""


def test_nan_is_never_kept_quiet():
    nan = Difference(tokens=10, differing=1, nan=1)
    assert "NaN" in check_parity.broken_promise("stock", nan, EQUAL, OFF, nan)


def test_positions_to_trace_end_at_the_one_that_differs():
    assert check_parity.trace_positions(0) == [0]
    assert check_parity.trace_positions(130) == [0, 1, 2, 3, 15, 16, 63, 64, 127, 128, 129, 130]
    assert check_parity.trace_positions(64) == [0, 1, 2, 3, 15, 16, 63, 64]


def test_variant():
    assert check_parity.parse_variant("flash:--numerics hf --x 'a b'") == ("flash", ["--numerics", "hf", "--x", "a b"])
    assert check_parity.parse_variant("cudnn-autocast:--numerics hf-autocast")[0] == "cudnn-autocast"
    with pytest.raises(Exception, match="cudnn-masked"):
        check_parity.parse_variant("eager:")


def test_generation_and_scoring_are_told_apart():
    """A worker whose Generate is off by one bit in one token: invariance names the sequence and the position."""
    import argparse
    import dataclasses

    import numpy
    from lockstep_client import Generated, Scored

    @dataclasses.dataclass
    class FakeWorker:
        wrong: bool

        def score(self, tokens, top_k):
            values = numpy.array([-float(t) for t in tokens[1:]], numpy.float32)
            return Scored(values, numpy.zeros((len(values), 0), numpy.int64), numpy.zeros((len(values), 0)))

        def generate(self, prompt, max_tokens, seed, temperature):
            tokens = [(seed + i) % 50 for i in range(max_tokens)]
            logprobs = numpy.array([-float(t) for t in tokens], numpy.float32)
            if self.wrong and seed == 2:
                logprobs[3] = numpy.nextafter(logprobs[3], numpy.float32(0))
            return Generated(tokens, logprobs)

        def in_flight(self, call, items, at_once):
            return [call(item) for item in items]

    arguments = argparse.Namespace(
        seed=1, lengths=(8,), tokens=16, prompt_tokens=5, generate_sequences=4, generate_tokens=6, top_k=0, at_once=4
    )
    sequences, scores, invariance, _ = check_parity.ask_worker(FakeWorker(False), arguments, 50)
    assert (len(sequences), len(scores), invariance.tokens, invariance.differing) == (6, 6, 24, 0)
    assert all(len(score.logprobs) == len(tokens) - 1 for (_, tokens), score in zip(sequences, scores))
    sequences, _, invariance, _ = check_parity.ask_worker(FakeWorker(True), arguments, 50)
    prompt_length = len(dict(sequences)["sampled 2"]) - 6
    assert invariance.differing == 1
    assert (invariance.first["sequence"], invariance.first["position"]) == ("sampled 2", prompt_length + 3)
