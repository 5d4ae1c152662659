"""rollout.proto's Rollout service in Python, whose first stream breaks where a test says."""

import concurrent.futures

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lockstep.v1 import rollout_pb2 as pb
from lockstep.v1 import rollout_pb2_grpc

Code = grpc.StatusCode


def token(sample, position):
    return 3 + 10 * sample + position


class FakeRollout(rollout_pb2_grpc.RolloutServicer, health_pb2_grpc.HealthServicer):
    """Tokens are a function of sample and position. broken: sample -> (tokens, Done or None) of the first stream, which
    then breaks and cannot be attached to. Every message has log-probabilities, the two best tokens and one kept id."""

    def __init__(self, broken):
        self.broken = broken
        self.refusals = 0  # so many requests are accepted, wait for their version and are then refused
        self.requests = []

    def start(self):
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(8))
        rollout_pb2_grpc.add_RolloutServicer_to_server(self, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()
        return self

    def Check(self, request, context):
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    def GetLoad(self, request, context):
        return pb.GetLoadResponse()

    def Abort(self, request, context):
        return pb.AbortResponse()

    def Generate(self, request, context):
        if request.HasField("attach"):
            context.abort(Code.NOT_FOUND, "no such request")
        self.requests.append(request)
        begin, most = len(request.generated_prefix_ids), request.sampling.max_tokens
        if begin >= most:
            context.abort(Code.INVALID_ARGUMENT, f"generated_prefix_ids: {begin} tokens, want less than {most}")
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id=request.request_id))
        if self.refusals:
            self.refusals -= 1
            context.set_trailing_metadata((("retry-after-ms", "1"),))
            context.abort(Code.UNAVAILABLE, "min_weight_version: it did not come")
        broken, self.broken = self.broken, {}
        whole = pb.Done(finish_reason=pb.FINISH_REASON_LENGTH, length_reason=pb.LENGTH_REASON_MAX_TOKENS)
        for index in range(request.first_sample_index, request.first_sample_index + request.n):
            yield self._message(index, begin, *broken.get(index, (most, whole)))
        if broken:
            context.abort(Code.UNAVAILABLE, "broken on purpose")

    def _message(self, index, begin, end, done):
        ids = [token(index, position) for position in range(begin, end)]
        message = pb.GenerateResponse(sample_index=index, offset=begin, token_ids=ids)
        message.logprobs.temperature.extend(-i / 16 for i in ids)
        message.logprobs.top_k = 2
        message.logprobs.top_temperature_ids.extend(i + k for i in ids for k in (0, 1))
        message.logprobs.top_temperature_logprobs.extend(-(i + k) / 16 for i in ids for k in (0, 1))
        message.logprobs.kept_counts.extend(1 for _ in ids)
        message.logprobs.kept_ids.extend(ids)
        if done is not None:
            message.done.CopyFrom(done)
            message.done.end_offset = end
            message.done.version_spans.add(begin=begin, end=end)
        return message
