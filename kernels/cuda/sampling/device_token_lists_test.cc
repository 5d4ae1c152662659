// What kernels find at each step where their tasks point, over requests that begin, end, wait and share. The CUDA
// runtime is one of the test's own: memory is the host's, a stream does its copies when it is run. Needs no GPU.
#include "kernels/cuda/sampling/device_token_lists.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/sampling/task_packer.h"
#include "kernels/cuda/sampling/token_lists.h"

namespace {

bool g_full = false;                          // the device has no memory
std::vector<std::function<void()>> g_stream;  // copies that were asked for
std::map<void*, size_t> g_pinned;             // page-locked memory

void* Poisoned(size_t bytes) {
  void* const memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(memory, 0xFF, bytes);
  return memory;
}

bool IsPinned(const void* data, size_t bytes) {
  return std::any_of(g_pinned.begin(), g_pinned.end(), [&](const auto& block) {
    const auto* const begin = static_cast<const std::byte*>(block.first);
    return data >= begin && static_cast<const std::byte*>(data) + bytes <= begin + block.second;
  });
}

// Returns how many copies were made.
int64_t RunStream() {
  const auto copies = std::exchange(g_stream, {});
  for (const auto& copy : copies) copy();
  return static_cast<int64_t>(copies.size());
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** data, size_t bytes) {
  if (g_full) return cudaErrorMemoryAllocation;
  *data = Poisoned(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  *data = Poisoned(bytes);
  g_pinned[*data] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* data) {
  EXPECT_TRUE(g_stream.empty()) << "memory of copies on their way";
  g_pinned.erase(data);
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  EXPECT_TRUE(IsPinned(from, bytes)) << "or the host would wait for the copy";
  g_stream.push_back([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = 0;
  return cudaSuccess;
}
cudaError_t cudaMemset(void* data, int value, size_t bytes) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
  return "an error";
}

}  // extern "C"

namespace lockstep::cuda {
namespace {

constexpr int64_t kVocab = 1003;

struct Request {
  uint64_t number = 0;
  SamplingParams params;
  int samples = 1;
};

class Requests {
 public:
  explicit Requests(unsigned seed) : engine_(seed) {}
  int64_t Below(int64_t n) { return static_cast<int64_t>(engine_() % n); }

  std::unique_ptr<Request> Begin() {
    auto request = std::make_unique<Request>();
    request->number = ++begun_;
    request->samples = static_cast<int>(1 + Below(3));
    SamplingParams& p = request->params;
    const int64_t kind = Below(8);  // 0: neither
    for (int64_t i = kind % 3 == 0 ? 0 : 1 + Below(900); i > 0; --i) p.allowed_token_ids.push_back(Token());
    for (int64_t i = kind % 4 == 0 ? 0 : 1 + Below(300); i > 0; --i) p.logit_bias[Token()] = static_cast<float>(begun_);
    return request;
  }
  void Shuffle(std::vector<std::unique_ptr<Request>>& v) { std::shuffle(v.begin(), v.end(), engine_); }
  uint64_t begun() const { return begun_; }

 private:
  int32_t Token() { return static_cast<int32_t>(Below(kVocab)); }

  std::mt19937 engine_;
  uint64_t begun_ = 0;
};

void ExpectLists(const DeviceTask& task, const SamplingParams& params) {
  ASSERT_EQ(task.allowed != nullptr, !params.allowed_token_ids.empty());
  if (task.allowed != nullptr) {
    const std::set<int32_t> want(params.allowed_token_ids.begin(), params.allowed_token_ids.end());
    const auto bits = std::as_bytes(std::span(task.allowed, KeptBytes(kVocab) / sizeof(uint32_t)));
    ASSERT_EQ(KeptTokens(bits), std::vector<int32_t>(want.begin(), want.end()));
  }
  std::map<int32_t, float> biases;
  for (int32_t i = 0; i < task.bias_count; ++i) biases[task.biases[i].token] = task.biases[i].bias;
  ASSERT_EQ(biases, params.logit_bias);
}

// A step of `requests`, their samples in two pieces of it. Returns how many requests' lists were sent.
int64_t Step(DeviceTokenLists& lists, std::vector<PinnedMemory>& staging,
             std::span<const std::unique_ptr<Request>> requests) {
  struct Placed {
    DeviceTask device;
    const SamplingParams* params;
  };
  std::vector<Placed> tasks;
  staging.resize(2);
  for (size_t piece = 0; piece < 2; ++piece) {
    for (const auto& request : requests) {
      for (int sample = 0; sample < request->samples; ++sample) {
        if (sample % 2 != static_cast<int>(piece)) continue;
        const RowTask task = {.request = request->number, .params = &request->params};
        Placed& placed = tasks.emplace_back();
        placed.params = &request->params;
        lists.Place(task, placed.device);
      }
    }
    const absl::Status status = lists.Send(staging[piece], nullptr);
    EXPECT_TRUE(status.ok()) << status;
  }
  const int64_t sent = RunStream();
  for (const Placed& placed : tasks) ExpectLists(placed.device, *placed.params);
  lists.EndStep();
  // The next step's.
  for (const PinnedMemory& memory : staging) {
    if (memory.bytes() > 0) std::memset(memory.data(), 0xFF, memory.bytes());
  }
  return sent;
}

TEST(DeviceTokenLists, KernelsFindTheirRequestsAtEveryStep) {
  constexpr int64_t kPlaces = 4;
  Requests source(7);
  auto lists = *DeviceTokenLists::Create(kVocab, kPlaces);
  std::vector<PinnedMemory> staging;
  std::vector<std::unique_ptr<Request>> live;
  for (int step = 0; step < 2000 && !testing::Test::HasFatalFailure(); ++step) {
    while (live.size() < kPlaces + 3) live.push_back(source.Begin());
    if (source.Below(4) == 0) source.Shuffle(live);
    Step(*lists, staging, std::span(live).first(source.Below(kPlaces + 1)));
    if (source.Below(4) != 0) continue;
    const int64_t ends = source.Below(static_cast<int64_t>(live.size()));
    lists->Forget(live[ends]->number);
    live.erase(live.begin() + ends);
  }
}

TEST(DeviceTokenLists, AreSentOnceForAllStepsAndSamples) {
  Requests source(8);
  auto lists = *DeviceTokenLists::Create(kVocab, 6);
  std::vector<PinnedMemory> staging;
  std::vector<std::unique_ptr<Request>> live;
  int64_t sent = 0, with_lists = 0;
  for (int step = 0; step < 300; ++step) {
    while (live.size() < 6) {
      live.push_back(source.Begin());
      with_lists += HasTokenLists(live.back()->params);
    }
    sent += Step(*lists, staging, live);
    if (step % 10 != 9) continue;
    lists->Forget(live[0]->number);
    live.erase(live.begin());
  }
  EXPECT_EQ(sent, with_lists);
  EXPECT_GT(with_lists, 20);
}

TEST(DeviceTokenLists, WithoutListsNeedNoPlace) {
  auto lists = *DeviceTokenLists::Create(kVocab, 0);
  const SamplingParams params;
  DeviceTask device;
  lists->Place({.params = &params}, device);
  EXPECT_EQ(device.allowed, nullptr);
  EXPECT_EQ(device.bias_count, 0);
  PinnedMemory staging;
  EXPECT_TRUE(lists->Send(staging, nullptr).ok());
  EXPECT_EQ(staging.bytes(), 0);
}

TEST(DeviceTokenLists, ADeviceWithoutRoomIsNamed) {
  g_full = true;
  const auto lists = DeviceTokenLists::Create(kVocab, 3);
  g_full = false;
  EXPECT_EQ(lists.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(lists.status().message().find(std::to_string(3 * MaxTokenListBytes(kVocab))), std::string::npos);
}

TEST(DeviceTokenListsDeathTest, ARequestHasOneSetOfParameters) {
  auto lists = *DeviceTokenLists::Create(kVocab, 3);
  SamplingParams first, second;
  first.allowed_token_ids = second.allowed_token_ids = {1};
  DeviceTask device;
  lists->Place({.request = 1, .params = &first}, device);
  EXPECT_DEATH(lists->Place({.request = 1, .params = &second}, device), "");
  lists->Forget(1);
  lists->Place({.request = 1, .params = &second}, device);
}

}  // namespace
}  // namespace lockstep::cuda
