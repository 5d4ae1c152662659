// What the tests of this folder share: bf16 values as bits, device memory, recorded arrays. The environment
// variable LOCKSTEP_TEST_DATA replaces the compiled-in folder, so that a test runs on another machine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/float_bits.h"

namespace lockstep::cuda {

using Bits = std::vector<uint16_t>;

constexpr uint16_t kPoison = 0xFFFF;  // a NaN no operation writes: the GPU's own is 0x7FFF

template <class T>
std::vector<T> ReadArray(const std::string& name) {
  const char* folder = std::getenv("LOCKSTEP_TEST_DATA");
  const std::string path = std::string(folder != nullptr ? folder : LOCKSTEP_TEST_DATA) + "/torch_ops/" + name;
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  EXPECT_TRUE(file.good()) << path;
  const std::streamoff bytes = file.good() ? static_cast<std::streamoff>(file.tellg()) : 0;
  std::vector<T> values(static_cast<size_t>(bytes) / sizeof(T));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), bytes);
  return values;
}

inline Bits RandomBits(size_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  Bits bits(count);
  for (uint16_t& b : bits) b = F32ToBf16(normal(generator));
  return bits;
}

inline std::vector<float> RandomFloats(size_t count, uint32_t seed, float mean = 0.0f, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(mean, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// The poison of fp32 memory: a NaN no operation writes.
inline std::vector<float> PoisonFloats(size_t count) {
  return std::vector<float>(count, std::bit_cast<float>(0xFFFFFFFFu));
}

// Device memory with a host vector's contents.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& host) : size_(host.size()) {
    EXPECT_EQ(cudaMalloc(&data_, std::max<size_t>(size_, 1) * sizeof(T)), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return static_cast<T*>(data_); }
  __nv_bfloat16* bf16() const { return static_cast<__nv_bfloat16*>(data_); }
  std::vector<T> Host() const {
    std::vector<T> host(size_);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return host;
  }

 private:
  void* data_ = nullptr;
  size_t size_;
};

inline DeviceArray<uint16_t> Poisoned(size_t count) {
  return DeviceArray<uint16_t>(Bits(count, kPoison));
}

inline void ExpectSameBits(const Bits& got, const Bits& want) {
  ASSERT_EQ(got.size(), want.size());
  ASSERT_FALSE(want.empty());
  size_t differing = 0;
  size_t first = 0;
  for (size_t i = got.size(); i-- > 0;) {
    if (got[i] == want[i]) continue;
    ++differing;
    first = i;
  }
  EXPECT_EQ(differing, 0u) << "of " << want.size() << "; the first at " << first << ": " << std::hex << got[first]
                           << ", want " << want[first];
}

inline std::vector<uint32_t> WordsOf(const std::vector<float>& values) {
  std::vector<uint32_t> words(values.size());
  for (size_t i = 0; i < values.size(); ++i) words[i] = std::bit_cast<uint32_t>(values[i]);
  return words;
}

inline void ExpectSameBits(const std::vector<float>& got, const std::vector<float>& want) {
  EXPECT_EQ(WordsOf(got), WordsOf(want));
}

// A test that needs a GPU.
class CudaOps : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }
};

// Never followed: for Validate(), which needs no GPU.
inline __nv_bfloat16* Address(uintptr_t address = 4096) {
  return reinterpret_cast<__nv_bfloat16*>(address);
}

template <class Params>
void ExpectRefused(const Params& params, const char* field) {
  const absl::Status status = params.Validate();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr(field));
}

template <class Params, class Change>
void ExpectRefusedAfter(Params params, const char* field, Change change) {
  change(params);
  ExpectRefused(params, field);
}

}  // namespace lockstep::cuda
