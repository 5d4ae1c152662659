#include "kernels/cpu/embedding.h"

#include <vector>

#include "kernels/cpu/linear.h"
#include "kernels/cpu/test_util.h"

namespace lockstep {
namespace {

using testing::LogToStderr;
using testing::Matrix;
using testing::TestContext;

TEST(Embedding, RowsOfEveryDtypeInEveryProfile) {
  const int64_t vocab = 50;
  for (const int64_t hidden : {1, 16, 33, 256}) {
    std::mt19937 generator(5);
    std::normal_distribution<float> normal;
    std::vector<float> f32(vocab * hidden);
    std::vector<uint16_t> bf16(vocab * hidden);
    std::vector<uint16_t> f16(vocab * hidden);
    for (int64_t i = 0; i < vocab * hidden; ++i) {
      f32[i] = normal(generator);
      bf16[i] = F32ToBf16(normal(generator));
      f16[i] = static_cast<uint16_t>(generator() % 0x7C00u | (generator() & 0x8000u));
    }
    const HostMatrix tables[] = {{f32.data(), vocab, hidden, DType::kF32},
                                 {bf16.data(), vocab, hidden, DType::kBF16},
                                 {f16.data(), vocab, hidden, DType::kF16}};
    const std::vector<int32_t> tokens = {49, 0, 7, 7, 13, 48, 0};
    for (const char* profile : {"hf", "hf-torch", "fp32"}) {
      for (const HostMatrix& table : tables) {
        TestContext context(profile, 2);
        const auto packed = CpuPackEmbedding(context.get(), table);
        EXPECT_EQ(packed->vocab(), vocab);
        EXPECT_EQ(packed->hidden(), hidden);
        EXPECT_EQ(packed->bytes(), vocab * hidden * (context.bf16() ? 2 : 4));
        Matrix out(static_cast<int64_t>(tokens.size()), hidden);
        CpuEmbed(context.get(), tokens, *packed, out.view());
        EXPECT_EQ(out.TouchedOutside(), 0);
        // Out of the head's packed weight: the same rows.
        const auto head = CpuPackLinear(context.get(), {&table, 1});
        const auto tied = CpuTieEmbedding(*head);
        EXPECT_EQ(tied->vocab(), vocab);
        EXPECT_EQ(tied->hidden(), hidden);
        EXPECT_EQ(tied->bytes(), 0);
        Matrix tied_out(static_cast<int64_t>(tokens.size()), hidden);
        CpuEmbed(context.get(), tokens, *tied, tied_out.view());
        for (size_t r = 0; r < tokens.size(); ++r) {
          for (int64_t i = 0; i < hidden; ++i) {
            ASSERT_EQ(tied_out.at(static_cast<int64_t>(r), i), out.at(static_cast<int64_t>(r), i)) << profile;
          }
        }
        for (size_t r = 0; r < tokens.size(); ++r) {
          for (int64_t i = 0; i < hidden; ++i) {
            const int64_t at = tokens[r] * hidden + i;
            const float value = table.dtype == DType::kF32    ? f32[at]
                                : table.dtype == DType::kBF16 ? Bf16ToF32(bf16[at])
                                                              : F16ToF32(f16[at]);
            ASSERT_EQ(out.at(static_cast<int64_t>(r), i), context.bf16() ? RoundBf16(value) : value)
                << profile << " " << DTypeName(table.dtype);
          }
        }
      }
    }
  }
}

TEST(EmbeddingDeathTest, ATokenOutsideTheVocabularyIsACheck) {
  LogToStderr();
  TestContext context("hf");
  const std::vector<float> values(4 * 3, 1.0f);
  const auto packed = CpuPackEmbedding(context.get(), {values.data(), 4, 3, DType::kF32});
  Matrix out(1, 3);
  const int32_t token = 4;
  EXPECT_DEATH(CpuEmbed(context.get(), {&token, 1}, *packed, out.view()), "token 4 of row 0, vocabulary 4");
}

}  // namespace
}  // namespace lockstep
