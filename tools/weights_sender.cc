// weights_sender: a checkpoint's tensors to running workers, again and again, as a learner would send them: for tests
// and benchmarks of weight updates, and an example of a sender in C++. One JSON line for each update.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "grpcpp/grpcpp.h"
#include "kernels/numerics.h"
#include "lockstep/v1/weights.grpc.pb.h"
#include "nlohmann/json.hpp"
#include "rollout/base/status.h"
#include "rollout/base/thread_pool.h"
#include "rollout/engine/backend.h"
#include "rollout/model/checkpoint.h"
#include "rollout/server/weight_fields.h"
#include "spdlog/spdlog.h"
#include "weights_sync/bucket_plan.h"
#include "weights_sync/digest.h"
#include "weights_sync/nccl_group.h"
#include "weights_sync/nccl_library.h"

ABSL_FLAG(std::string, checkpoint, "", "Directory of the weights to send.");
ABSL_FLAG(std::string, workers, "", "HOST:PORT of the workers' control planes, separated by commas.");
ABSL_FLAG(std::string, transport, "stream", "stream or nccl.");
ABSL_FLAG(std::string, backend, "cpu", "Where NCCL sends from: cuda, or cpu with a library that takes host memory.");
ABSL_FLAG(int32_t, cuda_device, 0, "The GPU of --backend cuda.");
ABSL_FLAG(std::string, nccl_library, "", "NCCL's library; empty: libnccl.so.2 from the loader's path.");
ABSL_FLAG(int32_t, max_ctas, 0, "Thread blocks that a broadcast may take, 1 to 64. 0: NCCL's choice.");
ABSL_FLAG(int64_t, epoch, 0, "Of the versions.");
ABSL_FLAG(int64_t, first_step, 1, "Step of the first version.");
ABSL_FLAG(int32_t, updates, 1, "Versions to send.");
ABSL_FLAG(double, pause_seconds, 0, "Between two updates.");
ABSL_FLAG(std::string, policy, "keep", "For samples in flight: finish, keep, recompute or abort.");
ABSL_FLAG(std::string, token_file, "", "Its first line is the workers' control token.");
ABSL_FLAG(double, timeout_seconds, 300, "For one update.");

namespace lockstep {
namespace {

constexpr char kGroup[] = "learner";
constexpr int kRoot = 0;
constexpr int64_t kChunkBytes = 1 << 20;
constexpr int64_t kAlign = 256;

absl::Status FromGrpc(const grpc::Status& status, const std::string& worker) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                      absl::StrCat(worker, ": ", status.error_message()));
}

struct Tensor {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  int64_t bytes = 0;
  const std::byte* host = nullptr;
  std::byte* sent_from = nullptr;  // where NCCL reads it: device memory, or the host's
  uint64_t digest = 0;
};

struct Worker {
  std::string address;
  std::unique_ptr<v1::Weights::Stub> stub;
};

using Clock = std::chrono::steady_clock;
double Milliseconds(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

class Sender {
 public:
  absl::Status Open();
  absl::Status Run();

 private:
  // `call` for every worker at once; the errors of all, with the first one's code.
  absl::Status Everywhere(const std::function<absl::Status(Worker&, size_t)>& call);
  template <class Request, class Response>
  absl::Status Unary(Worker& worker,
                     grpc::Status (v1::Weights::Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                     const Request& request, Response* response);
  absl::Status LoadTensors();
  absl::Status JoinAll();
  absl::Status Update(int64_t step);
  absl::Status SendByStream(const v1::WeightVersion& version);
  absl::Status SendByNccl(const v1::WeightVersion& version);
  absl::Status Broadcast(const std::vector<Bucket>& buckets);
  absl::Time Deadline() const { return deadline_; }
  // With the deadline and the token.
  void Prepare(grpc::ClientContext& context) const {
    context.set_deadline(absl::ToChronoTime(deadline_));
    if (!token_.empty()) context.AddMetadata("authorization", "Bearer " + token_);
  }

  std::optional<Checkpoint> checkpoint_;
  std::vector<Tensor> tensors_;
  std::vector<Worker> workers_;
  v1::Manifest manifest_;
  int64_t bytes_ = 0;
  v1::InFlightPolicy policy_ = v1::IN_FLIGHT_POLICY_KEEP;
  absl::Time deadline_;
  std::string token_;

  // Over NCCL.
  std::unique_ptr<ThreadPool> threads_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<DeviceMemory> device_;
  std::unique_ptr<WeightInbox> stream_;  // for its stream
  std::unique_ptr<NcclGroup> group_;
  int64_t generation_ = 0;
  int64_t bucket_bytes_ = 0;
};

absl::Status Sender::Everywhere(const std::function<absl::Status(Worker&, size_t)>& call) {
  std::vector<absl::Status> results(workers_.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < workers_.size(); ++i) {
    threads.emplace_back([&, i] { results[i] = call(workers_[i], i); });
  }
  for (std::thread& thread : threads) thread.join();
  // One that failed by itself may stand behind those that failed because of it.
  absl::Status all;
  for (const absl::Status& result : results) {
    if (result.ok()) continue;
    all = all.ok() ? result : absl::Status(all.code(), absl::StrCat(all.message(), "; ", result.message()));
  }
  return all;
}

template <class Request, class Response>
absl::Status Sender::Unary(Worker& worker,
                           grpc::Status (v1::Weights::Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                           const Request& request, Response* response) {
  grpc::ClientContext context;
  Prepare(context);
  return FromGrpc((worker.stub.get()->*method)(&context, request, response), worker.address);
}

absl::Status Sender::Open() {
  for (const absl::string_view address : absl::StrSplit(absl::GetFlag(FLAGS_workers), ',', absl::SkipEmpty())) {
    const std::string name(address);
    workers_.push_back({name, v1::Weights::NewStub(grpc::CreateChannel(name, grpc::InsecureChannelCredentials()))});
  }
  if (workers_.empty()) return absl::InvalidArgumentError("--workers: missing; want HOST:PORT,...");
  const std::string transport = absl::GetFlag(FLAGS_transport), policy = absl::GetFlag(FLAGS_policy);
  if (transport != "stream" && transport != "nccl") {
    return absl::InvalidArgumentError(absl::StrCat("--transport: value \"", transport, "\"; want stream or nccl"));
  }
  if (policy == "finish") {
    policy_ = v1::IN_FLIGHT_POLICY_FINISH;
  } else if (policy == "recompute") {
    policy_ = v1::IN_FLIGHT_POLICY_RECOMPUTE;
  } else if (policy == "abort") {
    policy_ = v1::IN_FLIGHT_POLICY_ABORT;
  } else if (policy != "keep") {
    return absl::InvalidArgumentError(
        absl::StrCat("--policy: value \"", policy, "\"; want finish, keep, recompute or abort"));
  }
  if (const std::string path = absl::GetFlag(FLAGS_token_file); !path.empty()) {
    std::ifstream file(path);
    if (!std::getline(file, token_) || token_.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("--token_file: no first line in ", path));
    }
  }
  LOCKSTEP_RETURN_IF_ERROR(LoadTensors());
  deadline_ = absl::Now() + absl::Seconds(absl::GetFlag(FLAGS_timeout_seconds));
  return transport == "nccl" ? JoinAll() : absl::OkStatus();
}

absl::Status Sender::LoadTensors() {
  const std::string dir = absl::GetFlag(FLAGS_checkpoint);
  if (dir.empty()) return absl::InvalidArgumentError("--checkpoint: missing; want a checkpoint directory");
  LOCKSTEP_ASSIGN_OR_RETURN(checkpoint_, Checkpoint::Open(dir));
  int64_t aligned = 0;
  for (const auto& [name, tensor] : checkpoint_->tensors()) {
    const TensorEntry& entry = *tensor.entry;
    if (!entry.dtype) {
      return absl::InvalidArgumentError(absl::StrCat("--checkpoint: ", name, " is of no dtype that can be sent"));
    }
    const int64_t size = entry.elements * DTypeBytes(*entry.dtype);
    tensors_.push_back({name, *entry.dtype, entry.shape, size, tensor.data()});
    bytes_ += size;
    aligned += (size + kAlign - 1) / kAlign * kAlign;
    v1::TensorInfo* info = manifest_.add_tensors();
    info->set_name(name);
    info->set_dtype(ProtoDType(*entry.dtype));
    info->mutable_shape()->Add(entry.shape.begin(), entry.shape.end());
  }
  std::atomic<size_t> next = 0;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
    threads.emplace_back([&] {
      for (size_t t = next++; t < tensors_.size(); t = next++) {
        tensors_[t].digest = Digest(std::span(tensors_[t].host, tensors_[t].bytes));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (absl::GetFlag(FLAGS_transport) != "nccl") return absl::OkStatus();

  const std::string name = absl::GetFlag(FLAGS_backend);
  threads_ = std::make_unique<ThreadPool>(1);
  LOCKSTEP_ASSIGN_OR_RETURN(const NumericsProfile profile, FindNumericsProfile(name == "cuda" ? "hf" : "fp32"));
  LOCKSTEP_ASSIGN_OR_RETURN(
      backend_, MakeBackend({.name = name, .device = absl::GetFlag(FLAGS_cuda_device)}, profile, threads_.get()));
  LOCKSTEP_ASSIGN_OR_RETURN(stream_, backend_->ops().MakeWeightInbox(kAlign, 1));
  LOCKSTEP_ASSIGN_OR_RETURN(device_, backend_->ops().Allocate(aligned));
  int64_t offset = 0;
  for (Tensor& tensor : tensors_) {
    tensor.sent_from = device_->data() + offset;
    backend_->ops().CopyFromHost(tensor.sent_from, tensor.host, tensor.bytes);
    offset += (tensor.bytes + kAlign - 1) / kAlign * kAlign;
  }
  return backend_->ops().status();
}

absl::Status Sender::JoinAll() {
  LOCKSTEP_ASSIGN_OR_RETURN(const std::shared_ptr<NcclLibrary> library,
                            NcclLibrary::Load(absl::GetFlag(FLAGS_nccl_library)));
  LOCKSTEP_ASSIGN_OR_RETURN(const std::string unique_id, library->UniqueId());
  const int ranks = static_cast<int>(workers_.size()) + 1;
  // Later than that of any sender before.
  generation_ = absl::ToUnixMillis(absl::Now());
  std::atomic<bool> failed = false;
  std::vector<int64_t> bucket_bytes(workers_.size());
  absl::Status joined;
  std::thread joins([&] {
    joined = Everywhere([&](Worker& worker, size_t i) {
      v1::JoinRequest request;
      request.set_group(kGroup);
      request.set_generation(generation_);
      request.set_nranks(ranks);
      request.set_rank(static_cast<int>(i) + 1);
      request.set_root(kRoot);
      request.set_unique_id(unique_id);
      request.set_max_ctas(absl::GetFlag(FLAGS_max_ctas));
      v1::JoinResponse response;
      absl::Status status = Unary(worker, &v1::Weights::Stub::Join, request, &response);
      if (!status.ok()) failed = true;
      bucket_bytes[i] = response.bucket_bytes();
      return status;
    });
  });
  absl::Status made = stream_->UseOnThisThread();
  if (made.ok()) {
    absl::StatusOr<std::unique_ptr<NcclGroup>> group = NcclGroup::Create(
        library, unique_id, ranks, kRoot, Deadline(), absl::GetFlag(FLAGS_max_ctas), [&] { return failed.load(); });
    made = group.status();
    if (group.ok()) group_ = *std::move(group);
  }
  joins.join();
  LOCKSTEP_RETURN_IF_ERROR(joined);
  LOCKSTEP_RETURN_IF_ERROR(made);
  bucket_bytes_ = *std::min_element(bucket_bytes.begin(), bucket_bytes.end());
  return absl::OkStatus();
}

absl::Status Sender::SendByStream(const v1::WeightVersion& version) {
  return Everywhere([&](Worker& worker, size_t) -> absl::Status {
    grpc::ClientContext context;
    Prepare(context);
    v1::PushResponse response;
    const std::unique_ptr<grpc::ClientWriter<v1::PushRequest>> stream = worker.stub->Push(&context, &response);
    v1::PushRequest chunk;
    *chunk.mutable_version() = version;
    bool open = true;
    for (size_t t = 0; open && t < tensors_.size(); ++t) {
      for (int64_t offset = 0; open && offset < tensors_[t].bytes; offset += kChunkBytes) {
        chunk.set_tensor(static_cast<int32_t>(t));
        chunk.set_offset(offset);
        chunk.set_data(tensors_[t].host + offset, std::min(kChunkBytes, tensors_[t].bytes - offset));
        open = stream->Write(chunk);
        chunk.Clear();
      }
    }
    stream->WritesDone();
    return FromGrpc(stream->Finish(), worker.address);
  });
}

absl::Status Sender::Broadcast(const std::vector<Bucket>& buckets) {
  LOCKSTEP_RETURN_IF_ERROR(stream_->UseOnThisThread());
  for (const Bucket& bucket : buckets) {
    std::vector<NcclGroup::Piece> pieces;
    for (const BucketPiece& piece : bucket) {
      pieces.push_back({tensors_[piece.tensor].sent_from + piece.tensor_offset, piece.bytes});
    }
    LOCKSTEP_RETURN_IF_ERROR(group_->Broadcast(pieces, kRoot, stream_->stream(), Deadline()));
  }
  return group_->Wait([&] { return stream_->Idle(); }, "the last bytes", Deadline());
}

absl::Status Sender::SendByNccl(const v1::WeightVersion& version) {
  std::vector<int64_t> indices, sizes;
  for (size_t t = 0; t < tensors_.size(); ++t) {
    indices.push_back(static_cast<int64_t>(t));
    sizes.push_back(tensors_[t].bytes);
  }
  LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<Bucket> buckets, PlanBuckets(indices, sizes, bucket_bytes_));
  // Each call's thread waits for the worker's end, which cancels the broadcasts if it is an early one.
  std::vector<grpc::ClientContext> contexts(workers_.size());
  std::atomic<size_t> begun = 0;
  std::atomic<bool> failed = false;
  absl::Status received;
  std::thread receives([&] {
    received = Everywhere([&](Worker& worker, size_t i) -> absl::Status {
      Prepare(contexts[i]);
      const auto stream = worker.stub->Receive(&contexts[i]);
      v1::ReceiveRequest request;
      *request.mutable_version() = version;
      request.set_group(kGroup);
      request.set_generation(generation_);
      request.set_bucket_bytes(bucket_bytes_);
      stream->Write(request);
      v1::ReceiveResponse response;
      if (stream->Read(&response)) {
        ++begun;
        request.Clear();
        request.set_ready_buckets(static_cast<int64_t>(buckets.size()));  // all tensors are there
        stream->Write(request);
      }
      stream->WritesDone();
      absl::Status status = FromGrpc(stream->Finish(), worker.address);
      if (!status.ok()) {
        failed = true;
        group_->Cancel();
      }
      return status;
    });
  });
  while (begun < workers_.size() && !failed) absl::SleepFor(absl::Microseconds(50));
  absl::Status sent = failed ? absl::CancelledError("a worker could not begin") : Broadcast(buckets);
  if (!sent.ok()) {
    for (grpc::ClientContext& context : contexts) context.TryCancel();
  }
  receives.join();
  LOCKSTEP_RETURN_IF_ERROR(received);
  return sent;
}

absl::Status Sender::Update(int64_t step) {
  deadline_ = absl::Now() + absl::Seconds(absl::GetFlag(FLAGS_timeout_seconds));
  v1::WeightVersion version;
  version.set_epoch(absl::GetFlag(FLAGS_epoch));
  version.set_step(step);
  nlohmann::json line = {{"version", {version.epoch(), version.step()}}, {"bytes", bytes_}};
  const Clock::time_point began = Clock::now();
  const auto timed = [&](const char* name, const std::function<absl::Status()>& stage) {
    const Clock::time_point begin = Clock::now();
    absl::Status status = stage();
    line[name] = Milliseconds(begin);
    return status;
  };
  LOCKSTEP_RETURN_IF_ERROR(timed("begin_ms", [&] {
    return Everywhere([&](Worker& worker, size_t) {
      v1::BeginRequest request;
      *request.mutable_version() = version;
      *request.mutable_manifest() = manifest_;
      v1::BeginResponse response;
      return Unary(worker, &v1::Weights::Stub::Begin, request, &response);
    });
  }));
  LOCKSTEP_RETURN_IF_ERROR(
      timed("send_ms", [&] { return group_ == nullptr ? SendByStream(version) : SendByNccl(version); }));
  LOCKSTEP_RETURN_IF_ERROR(timed("verify_ms", [&] {
    return Everywhere([&](Worker& worker, size_t) {
      v1::VerifyRequest request;
      *request.mutable_version() = version;
      for (const Tensor& tensor : tensors_) request.add_digests(tensor.digest);
      v1::VerifyResponse response;
      return Unary(worker, &v1::Weights::Stub::Verify, request, &response);
    });
  }));
  std::vector<double> pauses(workers_.size());
  LOCKSTEP_RETURN_IF_ERROR(timed("commit_ms", [&] {
    return Everywhere([&](Worker& worker, size_t i) {
      v1::CommitRequest request;
      *request.mutable_version() = version;
      request.set_policy(policy_);
      if (policy_ == v1::IN_FLIGHT_POLICY_FINISH) {
        request.set_finish_timeout_ms(absl::ToInt64Milliseconds(Deadline() - absl::Now()) / 2);
      }
      v1::CommitResponse response;
      absl::Status status = Unary(worker, &v1::Weights::Stub::Commit, request, &response);
      pauses[i] = response.pause_ms();
      return status;
    });
  }));
  line["pause_ms"] = *std::max_element(pauses.begin(), pauses.end());
  line["total_ms"] = Milliseconds(began);
  line["send_gb_s"] = static_cast<double>(bytes_) / line["send_ms"].get<double>() * 1e-6;
  std::printf("%s\n", line.dump().c_str());
  std::fflush(stdout);
  return absl::OkStatus();
}

absl::Status Sender::Run() {
  for (int i = 0; i < absl::GetFlag(FLAGS_updates); ++i) {
    if (i > 0) absl::SleepFor(absl::Seconds(absl::GetFlag(FLAGS_pause_seconds)));
    const int64_t step = absl::GetFlag(FLAGS_first_step) + i;
    absl::Status status = Update(step);
    if (status.ok()) continue;
    // Nothing half done stays; where this does not arrive either, the lease ends it.
    deadline_ = absl::Now() + absl::Seconds(10);
    (void)Everywhere([&](Worker& worker, size_t) {
      v1::RollbackRequest request;
      request.mutable_version()->set_epoch(absl::GetFlag(FLAGS_epoch));
      request.mutable_version()->set_step(step);
      v1::RollbackResponse response;
      return Unary(worker, &v1::Weights::Stub::Rollback, request, &response);
    });
    return status;
  }
  if (group_ == nullptr) return absl::OkStatus();
  // The communicator ends on both sides at once.
  deadline_ = absl::Now() + absl::Seconds(10);
  std::thread leave([&] {
    (void)Everywhere([&](Worker& worker, size_t) {
      v1::LeaveRequest request;
      request.set_group(kGroup);
      v1::LeaveResponse response;
      return Unary(worker, &v1::Weights::Stub::Leave, request, &response);
    });
  });
  LOCKSTEP_RETURN_IF_ERROR(stream_->UseOnThisThread());
  group_.reset();
  leave.join();
  return absl::OkStatus();
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage(
      "sends a checkpoint's weights to running workers.\n"
      "  weights_sender --checkpoint DIR --workers 127.0.0.1:50052 --updates 20\n"
      "  weights_sender --checkpoint DIR --workers 127.0.0.1:50052 --transport nccl --backend cuda --cuda_device 1");
  absl::ParseCommandLine(argc, argv);
  spdlog::set_level(spdlog::level::warn);
  lockstep::Sender sender;
  absl::Status status = sender.Open();
  if (status.ok()) status = sender.Run();
  if (!status.ok()) {
    std::fprintf(stderr, "weights_sender: %s\n", std::string(status.message()).c_str());
    return status.code() == absl::StatusCode::kInvalidArgument ? 2 : 1;
  }
  return 0;
}
