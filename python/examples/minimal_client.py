"""A whole client: grpcio, grpcio-tools (for the stubs) and proto/lockstep/v1/rollout.proto. Usage: minimal_client.py HOST:PORT TOKEN_ID..."""

import pathlib  # noqa: E401
import sys

import grpc

sys.path.append(str(pathlib.Path(__file__).parents[2] / "proto"))
pb, services = grpc.protos_and_services("lockstep/v1/rollout.proto")

target, *prompt = sys.argv[1:]
stub = services.RolloutStub(grpc.insecure_channel(target))
request = pb.GenerateRequest(
    prompt_token_ids=[int(t) for t in prompt],
    n=2,
    sampling=pb.SamplingParams(temperature=0.8, seed=1, max_tokens=16, clamp=True),
    logprobs=pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_TEMPERATURE]),
    stream_interval=4,
)
for message in stub.Generate(request, timeout=60):
    for token, logprob in zip(message.token_ids, message.logprobs.temperature):
        print(f"sample {message.sample_index} token {token} logprob {logprob:.6f}")
    if message.HasField("done"):
        print(
            f"sample {message.sample_index} {pb.FinishReason.Name(message.done.finish_reason)} after {message.done.end_offset}"
        )
