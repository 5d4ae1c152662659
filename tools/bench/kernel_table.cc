#include "tools/bench/kernel_table.h"

#include <algorithm>

#include "tools/bench/kernel_name.h"

namespace lockstep {
namespace {

constexpr double kActivationBytes = 2;

LinearProduct Product(const char* name, const LinearWeight& weight) {
  return {name, static_cast<double>(weight.in_features()), static_cast<double>(weight.out_features()),
          static_cast<double>(weight.bytes())};
}

// Indices of the launches of one family.
template <class Predicate>
std::vector<size_t> Find(std::span<const std::string> names, const Predicate& predicate) {
  std::vector<size_t> found;
  for (size_t i = 0; i < names.size(); ++i) {
    if (predicate(KernelBaseName(names[i]))) found.push_back(i);
  }
  return found;
}

}  // namespace

std::vector<LinearProduct> LinearProducts(const ModelSpec& spec, const ModelWeights& weights) {
  std::vector<LinearProduct> products;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerWeights& w = weights.layers[i];
    if (spec.layers[i].mixer == MixerKind::kGatedDeltaNet) {
      products.push_back(Product("gdn in", *w.gdn.in));
      products.push_back(Product("gdn o", *w.gdn.o));
    } else {
      products.push_back(Product("attention qkv", *w.attention.qkv));
      products.push_back(Product("attention o", *w.attention.o));
    }
    products.push_back(Product("mlp gate_up", *w.gate_up));
    products.push_back(Product("mlp down", *w.down));
  }
  products.push_back(Product("head", *weights.head));
  return products;
}

std::vector<KernelTable::Work> KernelTable::WorkOf(const ProfiledStep& step, std::span<const std::string> names) const {
  std::vector<Work> work(names.size());
  const auto all = [&](const std::vector<size_t>& launches, const Work& total) {
    const double n = static_cast<double>(launches.size());
    for (const size_t i : launches) work[i] = {total.operation, total.bytes / n, total.flops / n};
  };
  const auto family = [&](const char* name) {
    return Find(names, [&](std::string_view base) { return base == name; });
  };

  const std::vector<size_t> linear = Find(names, [](std::string_view base) { return base.starts_with("Linear"); });
  const size_t layers = products_.size() - 1;
  if (linear.size() == layers + static_cast<size_t>(step.head_blocks)) {
    for (size_t n = 0; n < linear.size(); ++n) {
      const LinearProduct& product = products_[std::min(n, layers)];
      const double rows = n < layers ? static_cast<double>(step.rows)
                                     : static_cast<double>(step.logit_rows) / static_cast<double>(step.head_blocks);
      // SwiGLU in the same kernel: of gate and up one output is stored.
      const double stored = names[linear[n]].starts_with("LinearSwiGlu") ? product.out / 2 : product.out;
      work[linear[n]] = {product.name, product.bytes + rows * (product.in + stored) * kActivationBytes,
                         2 * rows * product.in * product.out};
    }
  }

  const size_t attention_layers = static_cast<size_t>(traffic_.attention_layers());
  // Rows that share their first keys: those in a kernel before.
  const std::vector<size_t> prefix = family("DecodeSharedKernel"), decode = family("DecodeKernel");
  // Few sequences: scores, which read the keys, and then values, in two kernels.
  const std::vector<size_t> score = family("ScoreKernel"), value = family("ValueKernel");
  if (decode.size() == attention_layers && score.empty() && value.empty()) {
    if (prefix.empty()) {
      all(decode, {.operation = "attention", .bytes = step.decode_kv_bytes});
    } else if (prefix.size() == attention_layers) {
      all(prefix, {.operation = "shared prefix", .bytes = step.shared.moved});
      all(decode, {.operation = "attention", .bytes = step.decode_kv_bytes - step.shared.spared});
    }
  } else if (decode.empty() && prefix.empty() && score.size() == attention_layers && value.size() == attention_layers) {
    all(score, {.operation = "attention q.k", .bytes = step.decode_kv_bytes / 2});
    all(value, {.operation = "attention p.v", .bytes = step.decode_kv_bytes / 2});
  }
  if (const auto prefill = family("PrefillKernel"); prefill.size() == attention_layers)
    all(prefill, {.operation = "attention", .flops = step.prompt_attention_flops});
  if (const auto gdn = family("GdnDecodeKernel"); gdn.size() == static_cast<size_t>(traffic_.gdn_layers))
    all(gdn, {.operation = "gdn", .bytes = traffic_.state * static_cast<double>(step.decode_rows)});
  return work;
}

void KernelTable::AddStep(const ProfiledStep& step, std::span<const KernelLaunch> launches) {
  ++steps_;
  std::vector<std::string> names;
  for (const KernelLaunch& launch : launches) names.push_back(ShortKernelName(launch.name));
  const std::vector<Work> work = WorkOf(step, names);
  uint64_t last_end = 0;
  for (size_t i = 0; i < launches.size(); ++i) {
    const uint64_t begin = std::max(launches[i].start, last_end);
    Sum& sum = sums_[{names[i], work[i].operation}];
    if (i > 0) sum.idle_ns += static_cast<double>(begin - last_end);
    last_end = std::max(last_end, launches[i].end);
    ++sum.calls;
    sum.ns += static_cast<double>(last_end - begin);
    sum.bytes += work[i].bytes;
    sum.flops += work[i].flops;
    sum.every_bytes &= work[i].bytes > 0;
    sum.every_flops &= work[i].flops > 0;
  }
}

std::vector<KernelTable::Row> KernelTable::Top(size_t count) const {
  std::vector<Row> rows;
  for (const auto& [key, sum] : sums_) {
    const double steps = static_cast<double>(steps_);
    Row row{.kernel = key.first,
            .operation = key.second,
            .calls = static_cast<double>(sum.calls) / steps,
            .us = sum.ns * 1e-3 / steps,
            .idle_us = sum.idle_ns * 1e-3 / steps};
    if (sum.every_bytes && sum.ns > 0) row.gb_s = sum.bytes / sum.ns;
    if (sum.every_flops && sum.ns > 0) row.tflop_s = sum.flops / sum.ns * 1e-3;
    rows.push_back(std::move(row));
  }
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.us > b.us; });
  if (rows.size() > count) rows.resize(count);
  return rows;
}

double KernelTable::busy_us() const {
  double ns = 0;
  for (const auto& [key, sum] : sums_) ns += sum.ns;
  return ns * 1e-3 / static_cast<double>(steps_);
}

double KernelTable::idle_us() const {
  double ns = 0;
  for (const auto& [key, sum] : sums_) ns += sum.idle_ns;
  return ns * 1e-3 / static_cast<double>(steps_);
}

}  // namespace lockstep
