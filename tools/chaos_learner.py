#!/usr/bin/env python3
"""tools/chaos's learner: a process that publishes versions with lockstep.WeightPublisher as it is told on standard
input, one JSON object a line, and says on standard output what became of it. It dies, stops or raises at a stage of the
publisher or of its iterator if the command says so.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "python")]

from chaos_weights import Versions  # noqa: E402

from lockstep import LockstepError, RollbackFailed, WeightPublisher  # noqa: E402

# In the order of an update. A call's places are passed once for each worker, "tensor" before each one.
PLACES = (
    "Begin.before",
    "Begin.after",
    "tensor",
    "iterator.end",
    "Verify.before",
    "Verify.after",
    "Commit.before",
    "Commit.after",
)


def say(**event):
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


class InjectedError(Exception):
    pass


class Fault:
    def __init__(self, spec):
        self.spec, self.hits, self.lock = spec, 0, threading.Lock()

    def at(self, place):
        if self.spec is None or place != self.spec["place"]:
            return
        with self.lock:
            self.hits += 1
            if self.hits != self.spec["hit"]:
                return
            say(event="fault", place=place, action=self.spec["action"])
        if self.spec["action"] == "raise":
            raise InjectedError(place)
        os.kill(os.getpid(), signal.SIGKILL if self.spec["action"] == "kill" else signal.SIGSTOP)


class FaultyPublisher(WeightPublisher):
    """The publisher, with places before and after each of its unary calls."""

    fault = Fault(None)

    def _call(self, worker, method, request, deadline):
        self.fault.at(f"{method}.before")
        answer = super()._call(worker, method, request, deadline)
        self.fault.at(f"{method}.after")
        return answer


class Learner:
    def __init__(self, seed, transport, nccl_library):
        self.versions = Versions(seed)
        self.transport = {"transport": transport}
        if transport == "nccl":
            self.transport |= {"nccl_library": nccl_library, "device": "cpu"}
        self.publisher, self.options = None, None

    def connect(self, workers, options):
        if self.publisher is not None and (self.publisher.workers, self.options) == (workers, options):
            return
        if self.publisher is not None:
            self.publisher.close()
        self.publisher = FaultyPublisher(
            workers, manifest_from=self.versions.manifest(), batch_bytes=2 << 20, **self.transport, **options
        )
        self.options = options

    def publish(self, command):
        self.connect(command["workers"], command["options"])
        version, fault = tuple(command["version"]), Fault(command["fault"])
        tensors = self.versions.tensors(version)

        def source():
            for item in tensors:
                fault.at("tensor")
                yield item
            fault.at("iterator.end")

        self.publisher.fault = fault
        began = time.monotonic()
        error, report, failed_in = None, None, []
        try:
            report = self.publisher.publish(version, source(), **command["policy"])
        except (LockstepError, InjectedError) as failure:
            error, report = f"{type(failure).__name__}: {failure}", getattr(failure, "report", None)
        seconds = time.monotonic() - began
        self.publisher.fault = Fault(None)
        serving = {}
        if report is not None:
            failed_in = [w.failed_in for w in report.failed]
            serving = {w.worker: w.version for w in report.workers}
        say(event="published", ok=error is None, error=error, failed_in=failed_in, seconds=seconds, serving=serving)

    def rollback(self, command):
        self.connect(command["workers"], command["options"])
        began = time.monotonic()
        try:
            dropped = self.publisher.rollback(tuple(command["version"]))
        except RollbackFailed as error:
            dropped = {w: result if isinstance(result, bool) else str(result) for w, result in error.results.items()}
        say(event="rolled_back", dropped=dropped, seconds=time.monotonic() - began)


def main():
    learner = Learner(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    say(event="ready")
    for line in sys.stdin:
        command = json.loads(line)
        getattr(learner, command["do"])(command)


if __name__ == "__main__":
    main()
