"""weights.proto's Weights service in Python, over numpy arrays: what the publisher is tested against."""

import concurrent.futures
import threading
import time

import grpc
import numpy as np

from lockstep import digest
from lockstep.v1 import rollout_pb2, weights_pb2, weights_pb2_grpc

Code = grpc.StatusCode
WIDTH = {1: 4, 2: 2, 3: 2}


def key(version):
    return version.epoch, version.step


class FakeWeights(weights_pb2_grpc.WeightsServicer):
    """held: name -> (dtype, shape, uint8 array). fail: {"Begin" | ...: (code, times)}; times < 0: always."""

    def __init__(self, specs, chunk_bytes=1 << 16):
        self.held = {s.name: (weights_pb2.TensorDType.Value(f"TENSOR_DTYPE_{s.dtype.upper()}"), s.shape) for s in specs}
        self.weights = {s.name: np.zeros(s.bytes, np.uint8) for s in specs}
        self.chunk_bytes = chunk_bytes
        self.version = (0, 0)
        self.state = weights_pb2.UPDATE_STATE_SERVING
        self.open, self.lease_end = None, 0.0
        self.calls, self.fail, self.delay = [], {}, {}
        self.corrupt = False
        self.break_after = []  # bytes after which a Push stream is broken, one entry for each stream
        self.committed = {}
        self.pushed = 0
        self.lock = threading.RLock()

    def start(self):
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(8))
        weights_pb2_grpc.add_WeightsServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()
        return self

    def enter(self, name, context):
        self.calls.append(name)
        time.sleep(self.delay.get(name, 0))
        code, times = self.fail.get(name, (None, 0))
        if times:
            self.fail[name] = (code, times - 1)
            context.abort(code, f"{name} fails on purpose")

    def drop(self):
        self.open, self.state = None, weights_pb2.UPDATE_STATE_SERVING

    def expect_open(self, version, context):
        if self.open and time.monotonic() > self.lease_end:
            self.drop()
        if self.open is None:
            context.abort(Code.NOT_FOUND, "no update is open")
        if key(version) != self.open["version"]:
            context.abort(Code.FAILED_PRECONDITION, f"open is {self.open['version']}")
        self.lease_end = time.monotonic() + self.open["lease"]

    def Begin(self, request, context):
        self.enter("Begin", context)
        with self.lock:
            manifest = request.manifest.SerializeToString(deterministic=True)
            if self.open and time.monotonic() > self.lease_end:
                self.drop()
            lease = (request.lease_ms or 60000) / 1000
            if self.open and self.open["version"] == key(request.version) and self.open["manifest"] == manifest:
                self.lease_end = time.monotonic() + lease
                return self.begin_response()
            if self.open:
                context.abort(Code.FAILED_PRECONDITION, f"an update is open: {self.open['version']}")
            if key(request.version) <= self.version:
                context.abort(Code.FAILED_PRECONDITION, f"version {key(request.version)}, serving {self.version}")
            got = {t.name: (t.dtype, tuple(t.shape)) for t in request.manifest.tensors}
            partial = request.manifest.HasField("base_version")
            wrong = [n for n in got if got[n] != self.held.get(n)] + [
                n for n in self.held if n not in got and not partial
            ]
            if partial and key(request.manifest.base_version) != self.version:
                context.abort(Code.FAILED_PRECONDITION, f"base_version, serving {self.version}")
            if wrong:
                context.abort(Code.INVALID_ARGUMENT, f"manifest: {wrong[:10]}")
            names = [t.name for t in request.manifest.tensors]
            self.open = {
                "version": key(request.version),
                "manifest": manifest,
                "names": names,
                "lease": lease,
                "data": [np.zeros(self.weights[n].size, np.uint8) for n in names],
                "received": [0] * len(names),
            }
            self.lease_end = time.monotonic() + lease
            self.state = weights_pb2.UPDATE_STATE_RECEIVING
            return self.begin_response()

    def begin_response(self):
        received = self.open["received"]
        return weights_pb2.BeginResponse(received_bytes=received, lease_ms=60000, max_chunk_bytes=self.chunk_bytes)

    def Push(self, requests, context):
        self.enter("Push", context)
        limit = self.break_after.pop(0) if self.break_after else None
        total, version = 0, None
        for number, request in enumerate(requests):
            with self.lock:
                if (number == 0) != request.HasField("version"):
                    context.abort(Code.INVALID_ARGUMENT, "version: first message only")
                version = request.version if number == 0 else version
                self.expect_open(version, context)
                if len(request.data) > self.chunk_bytes:
                    context.abort(Code.INVALID_ARGUMENT, f"data: {len(request.data)} bytes")
                received = self.open["received"]
                if request.data:
                    width = WIDTH[self.held[self.open["names"][request.tensor]][0]]
                    if request.offset != received[request.tensor] or len(request.data) % width:
                        want = received[request.tensor]
                        context.abort(Code.INVALID_ARGUMENT, f"offset: {request.offset}, want {want}")
                    end = request.offset + len(request.data)
                    self.open["data"][request.tensor][request.offset : end] = np.frombuffer(request.data, np.uint8)
                    received[request.tensor] = end
                    total += len(request.data)
                    self.pushed += len(request.data)
                if limit is not None and total >= limit:
                    context.abort(Code.UNAVAILABLE, "the stream breaks on purpose")
        return weights_pb2.PushResponse(bytes=total, received_bytes=self.open["received"])

    def Verify(self, request, context):
        self.enter("Verify", context)
        with self.lock:
            self.expect_open(request.version, context)
            update = self.open
            if any(r != d.size for r, d in zip(update["received"], update["data"], strict=True)):
                context.abort(Code.FAILED_PRECONDITION, "RECEIVING: bytes are missing")
            if self.corrupt:
                update["data"][0][0] ^= 1
            got = [digest(d) for d in update["data"]]
            wrong = [n for n, a, b in zip(update["names"], got, request.digests, strict=True) if a != b]
            if wrong:
                self.drop()
                context.abort(Code.DATA_LOSS, f"digests differ: {wrong[:10]}")
            self.state = weights_pb2.UPDATE_STATE_VERIFIED
            return weights_pb2.VerifyResponse()

    def Commit(self, request, context):
        self.enter("Commit", context)
        with self.lock:
            if key(request.version) in self.committed:
                return self.committed[key(request.version)]
            self.expect_open(request.version, context)
            if self.state != weights_pb2.UPDATE_STATE_VERIFIED:
                context.abort(Code.FAILED_PRECONDITION, "not VERIFIED")
            self.policy = request.policy, request.finish_timeout_ms, request.fallback
            self.weights.update(zip(self.open["names"], self.open["data"], strict=True))
            self.version = self.open["version"]
            self.drop()
            self.committed = {self.version: weights_pb2.CommitResponse(pause_ms=1.5, recomputed=2)}
            return self.committed[self.version]

    def Rollback(self, request, context):
        self.enter("Rollback", context)
        with self.lock:
            dropped = self.open is not None and self.open["version"] == key(request.version)
            if dropped:
                self.drop()
            return weights_pb2.RollbackResponse(dropped=dropped)

    def GetStatus(self, request, context):
        self.enter("GetStatus", context)
        version = rollout_pb2.WeightVersion(epoch=self.version[0], step=self.version[1])
        return weights_pb2.GetStatusResponse(state=self.state, weight_version=version)

    def GetDigests(self, request, context):
        tensors = [
            weights_pb2.TensorDigest(name=n, dtype=self.held[n][0], shape=self.held[n][1], digest=digest(w))
            for n, w in self.weights.items()
            if not request.names or n in request.names
        ]
        return weights_pb2.GetDigestsResponse(tensors=tensors)
