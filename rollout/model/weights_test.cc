#include "rollout/model/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>

#include "kernels/float_bits.h"
#include "rollout/model/name_map.h"
#include "rollout/model/safetensors_writer.h"
#include "rollout/model/tensor_values.h"

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::SafetensorsBytes;
using testing::StoredTensor;
using testing::TempDir;
using testing::WriteFile;

// Keeps what was packed as the backend would: converted to the profile's dtype, stacked.
struct RecordedLinear : LinearWeight {
  std::vector<float> values;
  int64_t out = 0;
  int64_t in = 0;
  int64_t out_features() const override { return out; }
  int64_t in_features() const override { return in; }
  int64_t bytes() const override { return out * in * 4; }
};
struct RecordedEmbedding : EmbeddingTable {
  std::vector<float> values;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t vocab() const override { return rows; }
  int64_t hidden() const override { return cols; }
  int64_t bytes() const override { return rows * cols * 4; }
};

struct RecordedVector : VectorWeight {
  explicit RecordedVector(std::span<const float> v) : values(v.begin(), v.end()) {}
  std::vector<float> values;
  const void* data() const override { return values.data(); }
  int64_t size() const override { return static_cast<int64_t>(values.size()); }
  DType dtype() const override { return DType::kF32; }
};

std::vector<float> Floats(const std::unique_ptr<VectorWeight>& vector) {
  return {vector->floats(), vector->floats() + vector->size()};
}

class RecordingOps : public Ops {
 public:
  explicit RecordingOps(const NumericsProfile& profile = {}) : profile_(profile) {}

  const NumericsProfile& profile() const override { return profile_; }
  ThreadPool& threads() override { return threads_; }
  absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinear(std::span<const HostMatrix> parts) override {
    auto packed = std::make_unique<RecordedLinear>();
    for (const HostMatrix& part : parts) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(part.data) % DTypeBytes(part.dtype), 0) << "unaligned";
      packed->out += part.rows;
      packed->in = part.cols;
      const std::vector<float> values =
          ToFloat({.data = part.data, .count = part.rows * part.cols, .dtype = part.dtype});
      packed->values.insert(packed->values.end(), values.begin(), values.end());
    }
    return packed;
  }
  absl::StatusOr<std::unique_ptr<EmbeddingTable>> PackEmbedding(const HostMatrix& table) override {
    auto packed = std::make_unique<RecordedEmbedding>();
    packed->rows = table.rows;
    packed->cols = table.cols;
    packed->values = ToFloat({.data = table.data, .count = table.rows * table.cols, .dtype = table.dtype});
    return packed;
  }

  std::unique_ptr<EmbeddingTable> TieEmbedding(const LinearWeight& head) override {
    const auto& packed = static_cast<const RecordedLinear&>(head);
    auto table = std::make_unique<RecordedEmbedding>();
    table->rows = packed.out;
    table->cols = packed.in;
    table->values = packed.values;
    return table;
  }
  absl::StatusOr<std::unique_ptr<VectorWeight>> PackVector(std::span<const float> values, bool) override {
    return std::make_unique<RecordedVector>(values);
  }

  absl::Status UseOnThisThread() override { return absl::OkStatus(); }
  absl::Status status() override { return absl::OkStatus(); }
  void Synchronize() override {}
  bool runs_by_itself() const override { return false; }
  int64_t AvailableMemory() const override { return 0; }
  int64_t reserved_memory() const override { return 0; }
  absl::StatusOr<std::unique_ptr<DeviceMemory>> Allocate(int64_t) override { return absl::UnimplementedError(""); }
  void Copy(std::byte*, const std::byte*, int64_t) override { FAIL(); }
  void CopyToHost(std::byte*, const std::byte*, int64_t) override { FAIL(); }
  void CopyFromHost(std::byte*, const std::byte*, int64_t) override { FAIL(); }
  std::vector<float> Download(Rows) override { return {}; }
  DType activation_dtype() const override { return DType::kF32; }
  DType residual_dtype() const override { return DType::kF32; }
  DType logit_dtype() const override { return DType::kF32; }
  int64_t max_logit_rows() const override { return 1; }
  int64_t kv_page_multiple() const override { return 16; }
  absl::StatusOr<std::unique_ptr<WeightInbox>> MakeWeightInbox(int64_t, int64_t) override {
    return absl::UnimplementedError("");
  }
  absl::StatusOr<std::unique_ptr<WeightStage>> MakeWeightStage(int64_t) override {
    return absl::UnimplementedError("no stage");
  }
  absl::StatusOr<std::unique_ptr<LiveWeights>> MakeLiveWeights(std::span<const WeightPlace>) override {
    return absl::UnimplementedError("no live weights");
  }
  void StoreLinear(const HostMatrix&, int64_t, LinearWeight&) override { FAIL(); }
  void StoreEmbedding(const HostMatrix&, EmbeddingTable&) override { FAIL(); }
  void StoreVector(const std::byte*, VectorWeight&) override { FAIL(); }
  StepRows BeginStep(const StepBatch&) override { return {}; }
  void RunStep(const void*, absl::FunctionRef<void()>) override { FAIL(); }
  void ForgetSteps(const void*) override { FAIL(); }
  void Embed(const EmbeddingTable&, Rows) override { FAIL(); }
  void GatherLogitRows(Rows, int64_t, Rows) override { FAIL(); }
  void RoundResidual(Rows, Rows) override { FAIL(); }
  void Linear(Rows, const LinearWeight&, Rows) override { FAIL(); }
  void Logits(Rows, const LinearWeight&, Rows) override { FAIL(); }
  void RmsNorm(Rows, const VectorWeight&, float, Rows) override { FAIL(); }
  void AddRmsNorm(Rows, Rows, const VectorWeight&, float, Rows) override { FAIL(); }
  void RmsNormAdd(Rows, const VectorWeight&, float, Rows) override { FAIL(); }
  void Add(Rows, Rows) override { FAIL(); }
  void SwiGlu(Rows, Rows) override { FAIL(); }
  void LinearSwiGlu(Rows, const LinearWeight&, Rows, Rows) override { FAIL(); }
  void Rope(Rows, Rows, const VectorWeight&, float, int64_t) override { FAIL(); }
  int64_t KvPageBytes(const AttentionShape&, int64_t) const override { return 0; }
  void WriteKv(Rows, Rows, const AttentionShape&, const KvLayer&) override { FAIL(); }
  void Attention(Rows, const AttentionShape&, const KvLayer&, Rows) override { FAIL(); }
  int64_t GdnStateBytes(const GdnShape&) const override { return 0; }
  void GdnResetState(const GdnShape&, const GdnLayer&, int32_t) override { FAIL(); }
  void GdnConvAndGates(Rows, const VectorWeight&, const GdnShape&, const GdnLayer&, Rows, const GdnGates&) override {
    FAIL();
  }
  bool normalises_in_conv() const override { return false; }
  void GdnChunk(Rows, Rows, Rows, const GdnShape&, const GdnLayer&, Rows) override { FAIL(); }
  void GdnChunkNorm(Rows, Rows, Rows, const GdnShape&, const GdnLayer&, Rows, const VectorWeight&, float,
                    Rows) override {
    FAIL();
  }
  void GatedRmsNorm(Rows, Rows, const VectorWeight&, float, int64_t, Rows) override { FAIL(); }

 private:
  NumericsProfile profile_;
  ThreadPool threads_{2};
};

constexpr char kHybrid[] =
    R"({"model_type":"olmo_hybrid","vocab_size":10,"hidden_size":8,"intermediate_size":12,"num_hidden_layers":2,
  "num_attention_heads":2,"num_key_value_heads":1,"linear_num_key_heads":1,"linear_num_value_heads":2,"linear_key_head_dim":4,
  "linear_value_head_dim":6,"rope_theta":null,"tie_word_embeddings":TIED})";
constexpr char kOlmo3[] =
    R"({"model_type":"olmo3","vocab_size":10,"hidden_size":8,"intermediate_size":12,"num_hidden_layers":2,
  "num_attention_heads":2,"layer_types":["sliding_attention","full_attention"]})";

ModelSpec Spec(std::string config, bool tied = false) {
  if (const size_t at = config.find("TIED"); at != std::string::npos) config.replace(at, 4, tied ? "true" : "false");
  auto spec = ParseModelSpec(config, "");
  LOCKSTEP_CHECK(spec.ok(), "{}", std::string(spec.status().message()));
  return *spec;
}

std::string Encode(const std::vector<float>& values, const std::string& dtype) {
  std::string bytes;
  for (float value : values) {
    if (dtype == "F32") {
      bytes.append(reinterpret_cast<const char*>(&value), 4);
    } else {
      // Test values are small multiples of 1/8, exact in both formats.
      uint16_t bits = F32ToBf16(value);
      if (dtype == "F16") {
        const auto wide = std::bit_cast<uint32_t>(value);
        bits = value == 0 ? 0
                          : static_cast<uint16_t>((wide >> 16 & 0x8000u) | (((wide >> 23 & 0xFFu) - 112) << 10) |
                                                  (wide >> 13 & 0x3FFu));
      }
      bytes.append(reinterpret_cast<const char*>(&bits), 2);
    }
  }
  return bytes;
}

int64_t Count(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t n : shape) count *= n;
  return count;
}

// A checkpoint by canonical name: every tensor has values of its own.
using Tensors = std::map<std::string, std::pair<std::vector<int64_t>, std::vector<float>>>;

Tensors MakeTensors(const ModelSpec& spec) {
  Tensors tensors;
  int next = 1;
  for (const TensorSpec& tensor : ExpectedTensors(spec)) {
    if (tensor.tied) continue;
    std::vector<float> values(Count(tensor.shape));
    for (float& value : values) value = static_cast<float>(next++ % 509 - 254) / 8;
    tensors[tensor.name] = {tensor.shape, values};
  }
  return tensors;
}

void Write(const std::filesystem::path& path, const Tensors& tensors, const std::string& dtype = "F32",
           int extra_header = 0) {
  std::vector<std::pair<std::string, StoredTensor>> stored;
  for (const auto& [name, tensor] : tensors)
    stored.push_back({name, {dtype, tensor.first, Encode(tensor.second, dtype)}});
  WriteFile(path, SafetensorsBytes(stored, extra_header));
}

void Rename(Tensors& tensors, const std::string& from, const std::string& to) {
  auto node = tensors.extract(from);
  LOCKSTEP_CHECK(!node.empty(), "no {}", from);
  node.key() = to;
  tensors.insert(std::move(node));
}

const std::vector<float>& Values(const std::unique_ptr<LinearWeight>& weight) {
  return dynamic_cast<const RecordedLinear&>(*weight).values;
}

std::vector<float> Stack(const Tensors& tensors, const std::vector<std::string>& names) {
  std::vector<float> out;
  for (const std::string& name : names) {
    const auto& values = tensors.at(name).second;
    out.insert(out.end(), values.begin(), values.end());
  }
  return out;
}

void ExpectLoaded(const ModelWeights& weights, const Tensors& t) {
  EXPECT_EQ(dynamic_cast<const RecordedEmbedding&>(*weights.embedding).values,
            t.at("model.embed_tokens.weight").second);
  EXPECT_EQ(Floats(weights.final_norm), t.at("model.norm.weight").second);
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    const LayerWeights& layer = weights.layers[i];
    const std::string p = LayerPrefix(static_cast<int64_t>(i));
    EXPECT_EQ(Values(layer.gate_up), Stack(t, {p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight"}));
    EXPECT_EQ(Values(layer.down), t.at(p + "mlp.down_proj.weight").second);
    if (t.contains(p + "linear_attn.A_log")) {
      const std::string m = p + "linear_attn.";
      EXPECT_EQ(Values(layer.gdn.in), Stack(t, {m + "q_proj.weight", m + "k_proj.weight", m + "v_proj.weight",
                                                m + "g_proj.weight", m + "a_proj.weight", m + "b_proj.weight"}));
      EXPECT_EQ(Values(layer.gdn.o), t.at(m + "o_proj.weight").second);
      EXPECT_EQ(Floats(layer.gdn.conv), t.at(m + "conv1d.weight").second);
      EXPECT_EQ(Floats(layer.gdn.a_log), t.at(m + "A_log").second);
      EXPECT_EQ(Floats(layer.gdn.dt_bias), t.at(m + "dt_bias").second);
      EXPECT_EQ(Floats(layer.gdn.o_norm), t.at(m + "o_norm.weight").second);
      EXPECT_EQ(Floats(layer.mixer_norm), t.at(p + "input_layernorm.weight").second);
      EXPECT_EQ(Floats(layer.mlp_norm), t.at(p + "post_attention_layernorm.weight").second);
      EXPECT_EQ(layer.attention.qkv, nullptr);
    } else {
      const std::string m = p + "self_attn.";
      EXPECT_EQ(Values(layer.attention.qkv), Stack(t, {m + "q_proj.weight", m + "k_proj.weight", m + "v_proj.weight"}));
      EXPECT_EQ(Values(layer.attention.o), t.at(m + "o_proj.weight").second);
      EXPECT_EQ(Floats(layer.attention.q_norm), t.at(m + "q_norm.weight").second);
      EXPECT_EQ(Floats(layer.attention.k_norm), t.at(m + "k_norm.weight").second);
      EXPECT_EQ(Floats(layer.mixer_norm), t.at(p + "post_attention_layernorm.weight").second);
      EXPECT_EQ(Floats(layer.mlp_norm), t.at(p + "post_feedforward_layernorm.weight").second);
      EXPECT_EQ(layer.gdn.in, nullptr);
    }
  }
}

std::string LoadError(const TempDir& dir, const ModelSpec& spec) {
  RecordingOps ops;
  const auto weights = LoadModelWeights(dir.path(), spec, ops);
  return weights.ok() ? "OK" : std::string(weights.status().message());
}

TEST(LoadModelWeights, EveryDTypeAndAlignment) {
  for (const char* config : {kHybrid, kOlmo3}) {
    const ModelSpec spec = Spec(config);
    const Tensors tensors = MakeTensors(spec);
    for (const char* dtype : {"F32", "BF16", "F16"}) {
      for (int extra : {0, 1, 2}) {
        TempDir dir;
        Write(dir.path() / "model.safetensors", tensors, dtype, extra);
        RecordingOps ops;
        const auto weights = LoadModelWeights(dir.path(), spec, ops);
        ASSERT_TRUE(weights.ok()) << weights.status();
        ASSERT_EQ(weights->layers.size(), 2);
        ExpectLoaded(*weights, tensors);
        EXPECT_EQ(Values(weights->head), tensors.at("lm_head.weight").second);
        EXPECT_EQ(weights->bytes(), 4 * spec.parameter_count());
      }
    }
  }
}

TEST(LoadModelWeights, Shards) {
  const ModelSpec spec = Spec(kHybrid);
  const Tensors tensors = MakeTensors(spec);
  Tensors one, two;
  nlohmann::json map;
  for (const auto& [name, tensor] : tensors) {
    const bool first = name.find("layers.0") != std::string::npos;
    (first ? one : two)[name] = tensor;
    map[name] = first ? "model-00001-of-00002.safetensors" : "model-00002-of-00002.safetensors";
  }
  TempDir dir;
  Write(dir.path() / "model-00001-of-00002.safetensors", one, "BF16");
  Write(dir.path() / "model-00002-of-00002.safetensors", two, "F32");
  WriteFile(dir.path() / "model.safetensors.index.json", nlohmann::json{{"weight_map", map}}.dump());
  RecordingOps ops;
  const auto weights = LoadModelWeights(dir.path(), spec, ops);
  ASSERT_TRUE(weights.ok()) << weights.status();
  ExpectLoaded(*weights, tensors);
}

// The names of transformers' save_pretrained: older norm names, in the attention layers too, and the convolution in
// three parts.
TEST(LoadModelWeights, AliasesAndSeparateConvolutions) {
  const ModelSpec spec = Spec(kHybrid);
  const Tensors tensors = MakeTensors(spec);
  // channels: q 4, k 4, v 12; or cut in equal parts as torch.chunk does
  for (const std::vector<int64_t>& rows : {std::vector<int64_t>{4, 4, 12}, std::vector<int64_t>{7, 7, 6}}) {
    Tensors stored = tensors;
    Rename(stored, "model.layers.0.input_layernorm.weight", "model.layers.0.attention_layer_norm.weight");
    Rename(stored, "model.layers.0.post_attention_layernorm.weight", "model.layers.0.feedforward_layer_norm.weight");
    Rename(stored, "model.layers.1.post_attention_layernorm.weight", "model.layers.1.feedforward_layer_norm.weight");
    const auto conv = stored.extract("model.layers.0.linear_attn.conv1d.weight").mapped();
    auto from = conv.second.begin();
    for (int i = 0; i < 3; ++i) {
      const auto to = from + rows[i] * 4;
      stored[std::string("model.layers.0.linear_attn.") + "qkv"[i] + "_conv1d.weight"] = {{rows[i], 1, 4}, {from, to}};
      from = to;
    }
    TempDir dir;
    Write(dir.path() / "model.safetensors", stored);
    RecordingOps ops;
    const auto weights = LoadModelWeights(dir.path(), spec, ops);
    ASSERT_TRUE(weights.ok()) << weights.status();
    ExpectLoaded(*weights, tensors);

    // One of the three missing, and the fused one beside them.
    Tensors missing = stored;
    missing.erase("model.layers.0.linear_attn.k_conv1d.weight");
    Write(dir.path() / "model.safetensors", missing);
    EXPECT_THAT(LoadError(dir, spec), HasSubstr("1 missing: model.layers.0.linear_attn.k_conv1d.weight"));
    Tensors both = stored;
    both["model.layers.0.linear_attn.conv1d.weight"] = conv;
    Write(dir.path() / "model.safetensors", both);
    EXPECT_THAT(LoadError(dir, spec),
                AllOf(HasSubstr("1 stored under several names: model.layers.0.linear_attn.conv1d.weight ("),
                      HasSubstr("model.layers.0.linear_attn.v_conv1d.weight)")));
  }
  Tensors wrong_cut = tensors;
  wrong_cut.erase("model.layers.0.linear_attn.conv1d.weight");
  for (const auto& [part, rows] : {std::pair{"q", 4}, std::pair{"k", 6}, std::pair{"v", 10}}) {
    wrong_cut[std::string("model.layers.0.linear_attn.") + part + "_conv1d.weight"] = {{rows, 1, 4},
                                                                                       std::vector<float>(rows * 4)};
  }
  TempDir dir;
  Write(dir.path() / "model.safetensors", wrong_cut);
  EXPECT_THAT(LoadError(dir, spec),
              AllOf(HasSubstr("2 misshapen"), HasSubstr("k_conv1d.weight ([6, 1, 4], want [4, 1, 4])"),
                    HasSubstr("v_conv1d.weight ([10, 1, 4], want [12, 1, 4])")));
}

TEST(LoadModelWeights, BothNamesOfANormAreAmbiguous) {
  const ModelSpec spec = Spec(kHybrid);
  Tensors tensors = MakeTensors(spec);
  tensors["model.layers.0.attention_layer_norm.weight"] = tensors["model.layers.0.input_layernorm.weight"];
  TempDir dir;
  Write(dir.path() / "model.safetensors", tensors);
  EXPECT_THAT(
      LoadError(dir, spec),
      HasSubstr(
          "1 stored under several names: model.layers.0.input_layernorm.weight (model.layers.0.input_layernorm.weight, "
          "model.layers.0.attention_layer_norm.weight)"));
}

TEST(LoadModelWeights, TiedEmbeddings) {
  const ModelSpec spec = Spec(kHybrid, /*tied=*/true);
  Tensors tensors = MakeTensors(spec);
  ASSERT_FALSE(tensors.contains("lm_head.weight"));
  TempDir dir;
  const auto path = dir.path() / "model.safetensors";
  Write(path, tensors);
  RecordingOps ops;
  auto weights = LoadModelWeights(dir.path(), spec, ops);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(Values(weights->head), tensors.at("model.embed_tokens.weight").second);

  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"];
  Write(path, tensors);
  weights = LoadModelWeights(dir.path(), spec, ops);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(Values(weights->head), tensors.at("model.embed_tokens.weight").second);

  tensors["lm_head.weight"].second.back() += 1;
  Write(path, tensors);
  EXPECT_THAT(LoadError(dir, spec),
              HasSubstr("1 different from the embedding although tie_word_embeddings is true: lm_head.weight"));

  // Not tied: it must be there.
  tensors.erase("lm_head.weight");
  Write(path, tensors);
  EXPECT_THAT(LoadError(dir, Spec(kHybrid)), HasSubstr("1 missing: lm_head.weight"));
}

TEST(LoadModelWeights, EverythingWrongIsListed) {
  const ModelSpec spec = Spec(kHybrid);
  Tensors tensors = MakeTensors(spec);
  tensors.erase("model.norm.weight");
  tensors.erase("model.layers.1.self_attn.q_norm.weight");
  tensors["model.layers.1.self_attn.q_proj.bias"] = {{8}, std::vector<float>(8)};
  tensors["model.layers.2.input_layernorm.weight"] = {{8}, std::vector<float>(8)};
  tensors["model.layers.1.mlp.down_proj.weight"] = {{12, 8}, std::vector<float>(96)};
  std::vector<std::pair<std::string, StoredTensor>> stored;
  for (const auto& [name, tensor] : tensors) {
    const bool wide = name == "lm_head.weight";
    stored.push_back(
        {name, {wide ? "F64" : "F32", tensor.first, wide ? std::string(8 * 80, 'x') : Encode(tensor.second, "F32")}});
  }
  TempDir dir;
  WriteFile(dir.path() / "model.safetensors", SafetensorsBytes(stored));
  EXPECT_THAT(
      LoadError(dir, spec),
      AllOf(HasSubstr(dir.path().string()),
            HasSubstr("2 missing: model.layers.1.self_attn.q_norm.weight, model.norm.weight"),
            HasSubstr("2 unexpected: model.layers.1.self_attn.q_proj.bias, model.layers.2.input_layernorm.weight"),
            HasSubstr("1 misshapen: model.layers.1.mlp.down_proj.weight ([12, 8], want [8, 12])"),
            HasSubstr("1 of a wrong dtype: lm_head.weight (F64, want BF16, F16 or F32)")));
}

TEST(LoadModelWeights, LongListsAreCut) {
  const ModelSpec spec = Spec(kHybrid);
  TempDir dir;
  Tensors tensors;
  for (int i = 0; i < 50; ++i) tensors["extra." + std::to_string(100 + i)] = {{1}, {0}};
  Write(dir.path() / "model.safetensors", tensors);
  EXPECT_THAT(LoadError(dir, spec), AllOf(HasSubstr("50 unexpected: extra.100"), HasSubstr("extra.119, and 30 more"),
                                          Not(HasSubstr("extra.120"))));
}

TEST(LoadModelWeights, IgnoredTensors) {
  ModelSpec spec = Spec(kHybrid);
  Tensors tensors = MakeTensors(spec);
  tensors["mtp.layers.0.mlp.up_proj.weight"] = {{3}, std::vector<float>(3)};
  tensors["model.rotary_emb.inv_freq"] = {{2}, std::vector<float>(2)};
  tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = {{2}, std::vector<float>(2)};
  TempDir dir;
  Write(dir.path() / "model.safetensors", tensors);
  EXPECT_EQ(LoadError(dir, spec), "OK");
  EXPECT_FALSE(IsIgnoredTensor(spec, "model.mtp.weight"));
  // Olmo 3 has no such layers in transformers, nor the older norm names.
  spec = Spec(kOlmo3);
  tensors = MakeTensors(spec);
  tensors["mtp.x"] = {{1}, {0}};
  Rename(tensors, "model.layers.0.post_attention_layernorm.weight", "model.layers.0.feedforward_layer_norm.weight");
  Write(dir.path() / "model.safetensors", tensors);
  EXPECT_THAT(LoadError(dir, spec),
              AllOf(HasSubstr("2 unexpected: model.layers.0.feedforward_layer_norm.weight, mtp.x"),
                    HasSubstr("1 missing: model.layers.0.post_attention_layernorm.weight")));
}

TEST(LoadModelWeights, NonFiniteValuesAreNamed) {
  const ModelSpec spec = Spec(kHybrid);
  for (const auto& [name, place] : std::vector<std::pair<std::string, std::string>>{
           {"model.embed_tokens.weight", "[9, 7]"},
           {"lm_head.weight", "[9, 7]"},
           {"model.norm.weight", "[7]"},
           {"model.layers.0.linear_attn.A_log", "[1]"},
           {"model.layers.0.linear_attn.conv1d.weight", "[19, 0, 3]"},
           {"model.layers.0.linear_attn.v_proj.weight", "[11, 7]"},
           {"model.layers.1.self_attn.k_proj.weight", "[3, 7]"},
           {"model.layers.1.mlp.down_proj.weight", "[7, 11]"},
       }) {
    for (float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      Tensors tensors = MakeTensors(spec);
      tensors[name].second.back() = bad;
      const auto count = tensors[name].second.size();
      for (const char* dtype : {"F32", "BF16"}) {
        TempDir dir;
        Write(dir.path() / "model.safetensors", tensors, dtype);
        EXPECT_THAT(LoadError(dir, spec), HasSubstr("tensor \"" + name + "\": 1 of " + std::to_string(count) +
                                                    " values are NaN or infinite, the first at " + place));
      }
    }
  }
}

// An fp32 checkpoint under a bf16 profile: small tensors are rounded as from_pretrained(dtype=bfloat16) rounds them;
// A_log is not.
TEST(LoadModelWeights, SmallTensorsAreRoundedToTheProfile) {
  const ModelSpec spec = Spec(kHybrid);
  Tensors tensors = MakeTensors(spec);
  for (auto& [name, tensor] : tensors) {
    for (float& value : tensor.second) value += 0.001f;
  }
  TempDir dir;
  Write(dir.path() / "model.safetensors", tensors);
  RecordingOps ops(FindNumericsProfile("hf").value());
  const auto weights = LoadModelWeights(dir.path(), spec, ops);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const GdnWeights& gdn = weights->layers[0].gdn;
  const auto rounded = [&](const std::string& name) {
    std::vector<float> values = tensors.at(name).second;
    for (float& value : values) value = RoundBf16(value);
    EXPECT_NE(values, tensors.at(name).second);
    return values;
  };
  EXPECT_EQ(Floats(gdn.a_log), tensors.at("model.layers.0.linear_attn.A_log").second);
  EXPECT_EQ(Floats(gdn.dt_bias), rounded("model.layers.0.linear_attn.dt_bias"));
  EXPECT_EQ(Floats(gdn.conv), rounded("model.layers.0.linear_attn.conv1d.weight"));
  EXPECT_EQ(Floats(gdn.o_norm), rounded("model.layers.0.linear_attn.o_norm.weight"));
  EXPECT_EQ(Floats(weights->final_norm), rounded("model.norm.weight"));
  EXPECT_EQ(Floats(weights->layers[1].attention.q_norm), rounded("model.layers.1.self_attn.q_norm.weight"));

  NumericsProfile fp16 = FindNumericsProfile("hf").value();
  fp16.weights = DType::kF16;
  RecordingOps half(fp16);
  EXPECT_EQ(LoadModelWeights(dir.path(), spec, half).status().code(), absl::StatusCode::kUnimplemented);

  // Under autocast the trainer's parameters are fp32; what a convolution multiplies with is cast.
  RecordingOps autocast(FindNumericsProfile("hf-autocast").value());
  const auto exact = LoadModelWeights(dir.path(), spec, autocast);
  ASSERT_TRUE(exact.ok()) << exact.status();
  EXPECT_EQ(Floats(exact->layers[0].gdn.dt_bias), tensors.at("model.layers.0.linear_attn.dt_bias").second);
  EXPECT_EQ(Floats(exact->layers[0].gdn.o_norm), tensors.at("model.layers.0.linear_attn.o_norm.weight").second);
  EXPECT_EQ(Floats(exact->final_norm), tensors.at("model.norm.weight").second);
  EXPECT_EQ(Floats(exact->layers[0].gdn.conv), rounded("model.layers.0.linear_attn.conv1d.weight"));

  // OLMo-core gathers A_log in bf16 too.
  RecordingOps core(FindNumericsProfile("olmo-core").value());
  const auto gathered = LoadModelWeights(dir.path(), spec, core);
  ASSERT_TRUE(gathered.ok()) << gathered.status();
  EXPECT_EQ(Floats(gathered->layers[0].gdn.a_log), rounded("model.layers.0.linear_attn.A_log"));
}

}  // namespace
}  // namespace lockstep
