"""tools/chaos's corruptions: bytes that change on their way, after the sender took their digests. One worker, updates
of a few tensors over the version that serves; every one must end as DATA_LOSS that names what was hit and nothing else.
"""

import random
import re

import grpc
import numpy as np

from lockstep import digest

KINDS = ("bit flip", "two tensors swapped", "rows permuted", "stale tensor", "last tensor truncated")
CHUNK = 1 << 20


class Corruptions:
    def __init__(self, campaign, control):
        from lockstep.v1 import rollout_pb2, weights_pb2, weights_pb2_grpc

        self.campaign, self.rng = campaign, random.Random(f"{campaign.seed}/corruption")
        self.pb, self.wpb = rollout_pb2, weights_pb2
        self.channel = grpc.insecure_channel(control)
        self.stub = weights_pb2_grpc.WeightsStub(self.channel)
        self.old, self.new = campaign.versions.bits((0, 0)), campaign.versions.bits((0, 1))
        self.version = rollout_pb2.WeightVersion(epoch=0, step=1)
        by_shape = {}
        for name, values in self.new.items():
            by_shape.setdefault(values.shape, []).append(name)
        self.pairs = [names for names in by_shape.values() if len(names) > 1]

    def run(self, count):
        results = {kind: {"tried": 0, "detected": 0} for kind in KINDS}
        before = self.digests()
        for trial in range(count):
            kind = KINDS[trial % len(KINDS)]
            results[kind]["tried"] += 1
            results[kind]["detected"] += self.one(kind)
        if self.digests() != before:
            self.campaign.violation("corruption", "the weights that serve are others than before")
        names = list(self.new)
        self.send(names, {name: self.new[name].tobytes() for name in names}, complete=True)
        self.stub.Commit(self.wpb.CommitRequest(version=self.version), timeout=20)
        if self.digests() == before:
            self.campaign.violation("corruption", "the good update afterwards changed nothing")
        self.channel.close()
        return results

    def digests(self):
        return {t.name: t.digest for t in self.stub.GetDigests(self.wpb.GetDigestsRequest(), timeout=20).tensors}

    def one(self, kind):
        """Whether this corruption was detected."""
        rng = self.rng
        complete = rng.random() < 0.1
        hit = rng.sample(rng.choice(self.pairs), 2) if kind == "two tensors swapped" else [rng.choice(list(self.new))]
        others = [name for name in self.new if name not in hit]
        names = hit + (others if complete else rng.sample(others, 2))
        # A convolution in parts comes with all of them.
        parts = {
            n.replace(f".{a}_conv1d.", f".{b}_conv1d.")
            for n in names
            for a in "qkv"
            for b in "qkv"
            if f".{a}_conv1d." in n
        }
        names += sorted(parts - set(names))
        rng.shuffle(names)
        if kind == "last tensor truncated":
            hit = [names[-1]]
        sent = {name: self.new[name].tobytes() for name in names}
        for name, data in self.corrupt(kind, hit).items():
            sent[name] = data
        if any(sent[name] == self.new[name].tobytes() for name in hit):
            return self.one(kind)  # equal rows, or a tail of zeros: nothing was changed
        try:
            self.send(names, sent, complete)
        except grpc.RpcError as error:
            named = set(re.findall(r"(\S+) \(digest", error.details()))
            if error.code() == grpc.StatusCode.DATA_LOSS and named == set(hit):
                return True
            self.campaign.violation("corruption", f"{kind} of {hit}: {error.code().name}: {error.details()}")
        else:
            self.stub.Rollback(self.wpb.RollbackRequest(version=self.version), timeout=10)
            self.campaign.violation("corruption", f"{kind} of {hit} was not detected")
        return False

    def corrupt(self, kind, hit):
        name = hit[0]
        values = self.new[name]
        data = bytearray(values.tobytes())
        if kind == "bit flip":
            at = self.rng.randrange(8 * len(data))
            data[at // 8] ^= 1 << at % 8
        elif kind == "two tensors swapped":
            return {hit[0]: self.new[hit[1]].tobytes(), hit[1]: self.new[hit[0]].tobytes()}
        elif kind == "rows permuted":
            rows = values.copy()
            a, b = self.rng.sample(range(len(rows)), 2)
            rows[[a, b]] = rows[[b, a]]
            data = rows.tobytes()
        elif kind == "stale tensor":
            data = self.old[name].tobytes()
        else:  # its end was never written: what a buffer holds then
            tail = 2 * self.rng.randrange(1, values.size + 1)
            data[-tail:] = bytes(tail)
        return {name: bytes(data)}

    def send(self, names, sent, complete):
        """A whole update up to Verify, `sent` on the wire under the digests of what was meant."""
        infos = [
            self.wpb.TensorInfo(name=n, dtype=self.wpb.TENSOR_DTYPE_BFLOAT16, shape=self.new[n].shape) for n in names
        ]
        base = None if complete else self.pb.WeightVersion(epoch=0, step=0)
        manifest = self.wpb.Manifest(tensors=infos, base_version=base)
        self.stub.Begin(self.wpb.BeginRequest(version=self.version, manifest=manifest), timeout=10)

        def chunks():
            for index, name in enumerate(names):
                for at in range(0, len(sent[name]), CHUNK):
                    yield self.wpb.PushRequest(
                        version=None if index or at else self.version,
                        tensor=index,
                        offset=at,
                        data=sent[name][at : at + CHUNK],
                    )

        self.stub.Push(chunks(), timeout=20)
        digests = [digest(np.ascontiguousarray(self.new[name])) for name in names]
        self.stub.Verify(self.wpb.VerifyRequest(version=self.version, digests=digests), timeout=20)
