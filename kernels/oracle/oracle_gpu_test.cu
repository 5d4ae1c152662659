// The oracle against the GPU it stands for, on fresh operands: tensor-core steps of every kind, through mma.sync and
// wgmma, and the special functions over all significands. Skips without a GPU.
#include <cuda_runtime.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/float_bits.h"
#include "kernels/oracle/special_functions.h"
#include "kernels/oracle/tensor_core.h"

namespace lockstep::oracle {
namespace {

#define ASSERT_CUDA(call) ASSERT_EQ(call, cudaSuccess) << cudaGetErrorString(cudaGetLastError())

template <class T>
class Managed {
 public:
  explicit Managed(size_t size) : size_(size) { ok_ = cudaMallocManaged(&data_, size * sizeof(T)) == cudaSuccess; }
  ~Managed() { cudaFree(data_); }
  Managed(const Managed&) = delete;
  Managed& operator=(const Managed&) = delete;

  bool ok() const { return ok_; }
  T* data() { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  size_t size_;
  T* data_ = nullptr;
  bool ok_ = false;
};

class OracleOnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
  }
};

// A tile is 64 x 8 outputs, one step deep: a [64, depth], b [8, depth], c and d [64, 8].
constexpr int kRows = 64;
constexpr int kColumns = 8;

enum class Instruction { kMma, kWgmma };

// Depth in 32-bit words: 8 for 16 bf16 and for 8 tf32. Both kinds of fragment then have the same words: of A, rows g
// and g + 8 of the warp's 16, word t and then t + 4; of B, column g; of C, columns 2t and 2t + 1 (g = lane / 4, t =
// lane % 4).
constexpr int kWords = 8;

// Grid: a block of four warps per tile.
template <Instruction kInstruction, bool kBf16>
__global__ void Steps(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  a += blockIdx.x * kRows * kWords;
  b += blockIdx.x * kColumns * kWords;
  c += blockIdx.x * kRows * kColumns;
  d += blockIdx.x * kRows * kColumns;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const int row = threadIdx.x / 32 * 16 + g;
  const uint32_t a0 = a[row * kWords + t], a1 = a[(row + 8) * kWords + t];
  const uint32_t a2 = a[row * kWords + t + 4], a3 = a[(row + 8) * kWords + t + 4];
  float d0 = c[row * kColumns + 2 * t], d1 = c[row * kColumns + 2 * t + 1];
  float d2 = c[(row + 8) * kColumns + 2 * t], d3 = c[(row + 8) * kColumns + 2 * t + 1];
  if constexpr (kInstruction == Instruction::kMma) {
    const uint32_t b0 = b[g * kWords + t], b1 = b[g * kWords + t + 4];
    if constexpr (kBf16) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
  } else {
    // Two core matrices of 8 rows x 16 bytes, one for each half of the depth, not swizzled.
    __shared__ alignas(128) uint32_t tile[kColumns * kWords];
    if (threadIdx.x < kColumns * kWords) {
      const int column = threadIdx.x / kWords, word = threadIdx.x % kWords;
      tile[word / 4 * 32 + column * 4 + word % 4] = b[threadIdx.x];
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const uint64_t address = static_cast<uint64_t>(__cvta_generic_to_shared(tile));
    const uint64_t descriptor = (address & 0x3FFFF) >> 4 | uint64_t{128 >> 4} << 16 | uint64_t{128 >> 4} << 32;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    if constexpr (kBf16) {
      asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1, 0;"
                   : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(descriptor));
    } else {
      asm volatile("wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1;"
                   : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(descriptor));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)::"memory");
  }
  d[row * kColumns + 2 * t] = d0;
  d[row * kColumns + 2 * t + 1] = d1;
  d[(row + 8) * kColumns + 2 * t] = d2;
  d[(row + 8) * kColumns + 2 * t + 1] = d3;
}

class Operands {
 public:
  explicit Operands(uint32_t seed) : random_(seed) {}

  // Kinds: ordinary; wide exponents with zeros; any finite bits; subnormal results; subnormal factors; overflow; zeros
  // beside huge factors; exact cancellation; infinities and NaN.
  static constexpr int kKinds = 9;
  float Factor(int kind, bool is_a, int k) {
    switch (kind) {
      case 0:
        return std::normal_distribution<float>()(random_);
      case 1:
        return OneIn(4) ? Zero() : Exponent(-20, 20);
      case 2:
        return Exponent(-127, 127);
      case 3:
        return Exponent(-76, -58);
      case 4:
        return is_a ? (OneIn(3) ? Zero() : Exponent(-127, -127)) : Exponent(-30, 127);
      case 5:
        return Exponent(58, 63);
      case 6:
        if (k % 4 == 0) return is_a ? Zero() : Exponent(100, 127);
        return is_a ? Exponent(-100, -90) : Exponent(-20, -10);
      case 7:
        return OneIn(3) ? Zero() : (OneIn(2) ? 1.0f : -1.0f) * (OneIn(3) ? 2.0f : 1.0f);
      default:
        return OneIn(30) ? Special() : Exponent(-3, 3);
    }
  }
  float Accumulator(int kind) {
    if (OneIn(4)) return Zero();
    switch (kind) {
      case 0:
      case 1:
        return Exponent(-20, 20);
      case 3:
        return Exponent(-127, -120);
      case 5:
        return Exponent(120, 127);
      case 6:
        return Exponent(-126, -110);
      case 7:
        return OneIn(2) ? 1.0f : -1.0f;
      case 8:
        return OneIn(30) ? Special() : Exponent(-3, 3);
      default:
        return Exponent(-127, 127);
    }
  }

 private:
  bool OneIn(uint32_t n) { return random_() % n == 0; }
  float Zero() { return OneIn(2) ? 0.0f : -0.0f; }
  float Special() {
    const float infinity = std::numeric_limits<float>::infinity();
    return OneIn(3) ? std::numeric_limits<float>::quiet_NaN() : OneIn(2) ? infinity : -infinity;
  }
  // -127 is a subnormal.
  float Exponent(int low, int high) {
    const uint32_t bits = static_cast<uint32_t>(random_());
    const int exponent = low + static_cast<int>(random_() % static_cast<uint32_t>(high - low + 1));
    return std::bit_cast<float>((bits & 0x807FFFFFu) | static_cast<uint32_t>(exponent + 127) << 23);
  }

  std::mt19937 random_;
};

template <Instruction kInstruction, bool kBf16>
void ExpectOraclesSteps() {
  constexpr int kDepth = kBf16 ? kBf16Group : kTf32Group;
  constexpr int kTilesPerKind = 64;
  constexpr int kTiles = Operands::kKinds * kTilesPerKind;
  Managed<uint32_t> a(kTiles * kRows * kWords), b(kTiles * kColumns * kWords);
  Managed<float> c(kTiles * kRows * kColumns), d(c.size());
  ASSERT_TRUE(a.ok() && b.ok() && c.ok() && d.ok());
  Operands operands(kBf16 ? 1 : 2);
  auto fill = [&](Managed<uint32_t>& words, bool is_a) {
    const size_t per_kind = words.size() / Operands::kKinds;
    for (size_t i = 0; i < words.size(); ++i) {
      const int kind = static_cast<int>(i / per_kind);
      if constexpr (kBf16) {
        const int k = static_cast<int>(i % kWords) * 2;
        const uint32_t low = std::bit_cast<uint32_t>(operands.Factor(kind, is_a, k)) >> 16;
        words[i] = low | (std::bit_cast<uint32_t>(operands.Factor(kind, is_a, k + 1)) & 0xFFFF0000u);
      } else {
        words[i] = std::bit_cast<uint32_t>(operands.Factor(kind, is_a, static_cast<int>(i % kWords)));
      }
    }
  };
  fill(a, true);
  fill(b, false);
  for (size_t i = 0; i < c.size(); ++i) {
    c[i] = operands.Accumulator(static_cast<int>(i / (c.size() / Operands::kKinds)));
    d[i] = -1234.5f;
  }
  Steps<kInstruction, kBf16><<<kTiles, 128>>>(a.data(), b.data(), c.data(), d.data());
  ASSERT_CUDA(cudaDeviceSynchronize());

  auto factors = [&](Managed<uint32_t>& words, size_t row) {
    std::vector<Factor> f(kDepth);
    for (int k = 0; k < kDepth; ++k) {
      if constexpr (kBf16) {
        const uint32_t word = words[row * kWords + k / 2];
        f[k] = MakeFactor(Bf16ToF32(static_cast<uint16_t>(k % 2 == 0 ? word : word >> 16)));
      } else {
        f[k] = MakeTf32Factor(std::bit_cast<float>(words[row * kWords + k]));
      }
    }
    return f;
  };
  std::array<int, Operands::kKinds> differing = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int r = 0; r < kRows; ++r) {
      const std::vector<Factor> row = factors(a, tile * kRows + r);
      for (int n = 0; n < kColumns; ++n) {
        const size_t at = (static_cast<size_t>(tile) * kRows + r) * kColumns + n;
        const float want = FusedStep(c[at], row, factors(b, tile * kColumns + n));
        differing[tile / kTilesPerKind] += std::bit_cast<uint32_t>(want) != std::bit_cast<uint32_t>(d[at]);
      }
    }
  }
  for (int kind = 0; kind < Operands::kKinds; ++kind) {
    EXPECT_EQ(differing[kind], 0) << "kind " << kind << ", of " << kTilesPerKind * kRows * kColumns;
  }
}

TEST_F(OracleOnGpu, MmaBf16) {
  ExpectOraclesSteps<Instruction::kMma, true>();
}
TEST_F(OracleOnGpu, MmaTf32) {
  ExpectOraclesSteps<Instruction::kMma, false>();
}
TEST_F(OracleOnGpu, WgmmaBf16) {
  ExpectOraclesSteps<Instruction::kWgmma, true>();
}
TEST_F(OracleOnGpu, WgmmaTf32) {
  ExpectOraclesSteps<Instruction::kWgmma, false>();
}

struct Named {
  const char* name;
  Function function;
};
const std::array<Named, 9> kFunctions = {{{"ex2.approx.ftz", Exp2Approx},
                                          {"rcp.approx.ftz", ReciprocalApprox},
                                          {"rsqrt.approx.ftz", RsqrtApprox},
                                          {"sqrt.approx.ftz", SqrtApprox},
                                          {"div.full of 1", [](float x) { return DivFull(1.0f, x); }},
                                          {"expf", Exp},
                                          {"logf", Log},
                                          {"log1pf", Log1p},
                                          {"rsqrtf", Rsqrt}}};

// y[f * count + i] = function f of x[i]. Grid: a thread per argument.
__global__ void Evaluate(const float* x, float* y, size_t count) {
  const size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y[i]) : "f"(x[i]));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y[count + i]) : "f"(x[i]));
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y[2 * count + i]) : "f"(x[i]));
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y[3 * count + i]) : "f"(x[i]));
  asm("div.full.f32 %0, %1, %2;" : "=f"(y[4 * count + i]) : "f"(1.0f), "f"(x[i]));
  y[5 * count + i] = expf(x[i]);
  y[6 * count + i] = logf(x[i]);
  y[7 * count + i] = log1pf(x[i]);
  y[8 * count + i] = rsqrtf(x[i]);
}

// Arguments: every eighth significand of [1, 4) and of (-4, -1], and random bits.
TEST_F(OracleOnGpu, SpecialFunctions) {
  constexpr size_t kSignificands = 1u << 21;
  constexpr size_t kCount = 3 * kSignificands;
  Managed<float> x(kCount), y(kFunctions.size() * kCount);
  ASSERT_TRUE(x.ok() && y.ok());
  std::mt19937 random(4);
  for (size_t i = 0; i < kSignificands; ++i) {
    const uint32_t offset = static_cast<uint32_t>(8 * i + i % 8);
    x[i] = std::bit_cast<float>(0x3F800000u + offset);
    x[kSignificands + i] = std::bit_cast<float>(0xBF800000u + offset);
    x[2 * kSignificands + i] = std::bit_cast<float>(static_cast<uint32_t>(random()));
  }
  Evaluate<<<kCount / 256, 256>>>(x.data(), y.data(), kCount);
  ASSERT_CUDA(cudaDeviceSynchronize());
  for (size_t f = 0; f < kFunctions.size(); ++f) {
    size_t differing = 0;
    for (size_t i = 0; i < kCount; ++i) {
      const uint32_t want = std::bit_cast<uint32_t>(kFunctions[f].function(x[i]));
      differing += want != std::bit_cast<uint32_t>(y[f * kCount + i]);
    }
    EXPECT_EQ(differing, 0u) << kFunctions[f].name << ", of " << kCount;
  }
}

}  // namespace
}  // namespace lockstep::oracle
