// A step's kernels by time, each beside the bytes or multiplications that its operation takes at least.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "rollout/model/spec.h"
#include "rollout/model/weights.h"
#include "tools/bench/kernel_recorder.h"
#include "tools/bench/traffic.h"

namespace lockstep {

// One linear layer of a step, in the order in which the forward pass asks for them; the head is the last.
struct LinearProduct {
  std::string name;  // "mlp gate_up"
  double in = 0, out = 0;
  double bytes = 0;  // of the weight
};
std::vector<LinearProduct> LinearProducts(const ModelSpec& spec, const ModelWeights& weights);

// What one step worked on.
struct ProfiledStep {
  int64_t rows = 0;
  int64_t logit_rows = 0;
  int64_t head_blocks = 0;            // times the head ran
  int64_t decode_rows = 0;            // pieces of one row
  double decode_kv_bytes = 0;         // keys and values they see, all layers
  SharedAttentionBytes shared;        // of these, if a kernel takes rows together
  double prompt_attention_flops = 0;  // of the other pieces, all layers
};

class KernelTable {
 public:
  KernelTable(std::vector<LinearProduct> products, Traffic traffic)
      : products_(std::move(products)), traffic_(std::move(traffic)) {}

  // `launches`: the step's, in order of start. A kernel's time is that during which no kernel before it ran: kernels
  // that start early and wait for the one before them (programmatic dependent launch) count from its end, and all of
  // them together take as long as the device was busy.
  void AddStep(const ProfiledStep& step, std::span<const KernelLaunch> launches);

  struct Row {
    std::string kernel;     // ShortKernelName
    std::string operation;  // empty: not known
    double calls = 0;       // a step
    double us = 0;          // a step
    double idle_us = 0;     // a step: before it, while no kernel ran; the host's time between two steps is left out
    std::optional<double> gb_s;
    std::optional<double> tflop_s;
  };
  // Those that take longest, at most `count`.
  std::vector<Row> Top(size_t count) const;
  double busy_us() const;  // a step: all kernels
  double idle_us() const;  // a step: all idle times
  int64_t steps() const { return steps_; }

 private:
  struct Work {
    std::string operation;
    double bytes = 0, flops = 0;  // 0: not known
  };
  struct Sum {
    int64_t calls = 0;
    double ns = 0, idle_ns = 0, bytes = 0, flops = 0;
    bool every_bytes = true, every_flops = true;  // known for every launch
  };
  // By launch: what it does. A family of kernels that was not launched as often as the model has layers for it is not
  // known.
  std::vector<Work> WorkOf(const ProfiledStep& step, std::span<const std::string> names) const;

  std::vector<LinearProduct> products_;
  Traffic traffic_;
  std::map<std::pair<std::string, std::string>, Sum> sums_;  // by kernel and operation
  int64_t steps_ = 0;
};

}  // namespace lockstep
