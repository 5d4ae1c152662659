#include "kernels/cuda/host_run/host_run.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace lockstep::host_run {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr int kWarp = 32;

struct Barrier {
  int arrivals = 0;   // that a phase takes
  int missing = 0;    // of this phase
  int64_t bytes = 0;  // announced and not yet there
  uint32_t phases = 0;
};

struct NamedBarrier {
  int here = 0;
  uint32_t times = 0;
};

struct Warp {
  const char* what = nullptr;
  int here = 0;
  uint32_t times = 0;
  alignas(16) std::array<std::byte, kWarp * kLaneBytes> in, out;
};

struct Thread {
  uint3 index = {};
  ucontext_t context = {};
  std::unique_ptr<std::byte[]> stack;
  std::function<bool()> condition;  // null: can run
  const char* waits_for = "";
  bool done = false;
  struct Product {
    uint32_t number;  // of the thread's, from 1 on
    int together;
    std::function<void()> run;
  };
  using Products = std::vector<Product>;  // those that have run are gone
  Products issued;                        // since the last commit
  std::deque<Products> groups;
  uint32_t products = 0;  // issued so far
};

struct Copy {
  std::function<void()> run;
  const void* barrier;
  int64_t bytes;
};

struct Block {
  const char* kernel;
  uint3 index;
  dim3 grid;
  std::span<std::byte> shared;
  const std::function<void()>* body;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<const void*, Barrier> barriers;
  std::map<int, NamedBarrier> named;
  std::vector<Copy> copies;
  std::mt19937 random;
  ucontext_t engine = {};
  Thread* running = nullptr;

  [[noreturn]] void Die(const std::string& why) const {
    std::fprintf(stderr, "%s, block (%u, %u, %u): %s\n", kernel, index.x, index.y, index.z, why.c_str());
    for (const Thread& thread : threads) {
      if (!thread.done) std::fprintf(stderr, "  thread %u waits for %s\n", thread.index.x, thread.waits_for);
    }
    std::abort();
  }
  Barrier& At(const void* barrier) {
    const auto found = barriers.find(barrier);
    if (found == barriers.end()) Die("a barrier that was not initialised");
    return found->second;
  }
  void Settle(Barrier& barrier) const {
    if (barrier.missing < 0 || barrier.bytes < 0) Die("a barrier was given more than it expects");
    if (barrier.missing > 0 || barrier.bytes > 0) return;
    ++barrier.phases;
    barrier.missing = barrier.arrivals;
  }
  void Arrive(Barrier& barrier) const {
    --barrier.missing;
    Settle(barrier);
  }
  // One that is on its way, drawn at random.
  void RunCopy() {
    std::swap(copies[random() % copies.size()], copies.back());
    Copy copy = std::move(copies.back());
    copies.pop_back();
    copy.run();
    Barrier& barrier = At(copy.barrier);
    barrier.bytes -= copy.bytes;
    Settle(barrier);
  }
  // Its threads that can go on, each up to its next wait, in some order; false if there are none.
  bool RunWarp(int warp);
  void Run();
};

Block* g_block = nullptr;

void Enter() {
  Block* block = g_block;
  (*block->body)();
  Check(block->running->issued.empty() && block->running->groups.empty(), "a thread ended before its products");
  block->running->done = true;
  swapcontext(&block->running->context, &block->engine);
}

bool Block::RunWarp(int warp) {
  bool going = false;
  const unsigned turn = random() % kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const size_t at = warp * kWarp + (lane ^ turn);
    if (at >= threads.size()) continue;
    Thread& thread = threads[at];
    if (thread.done || (thread.condition && !thread.condition())) continue;
    thread.condition = nullptr;
    running = &thread;
    swapcontext(&engine, &thread.context);
    going = true;
  }
  return going;
}

void Block::Run() {
  g_block = this;
  std::memset(shared.data(), 0xFF, shared.size());
  for (Thread& thread : threads) {
    thread.stack = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, Enter, 0);
  }
  // One warp goes as far ahead of the others as it can, then another; half of the blocks get their copies only when
  // nothing else can happen. So a wait that is missing shows in some block.
  const bool late_copies = random() % 2 == 0;
  std::vector<int> order(warps.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::shuffle(order, random);
  for (bool going = true; going;) {
    if (random() % 16 == 0) std::ranges::shuffle(order, random);
    going = std::ranges::any_of(order, [&](int warp) { return RunWarp(warp); });
    if (!copies.empty() && (!going || (!late_copies && random() % 4 == 0))) {
      RunCopy();
      going = true;
    }
  }
  if (!std::ranges::all_of(threads, &Thread::done)) Die("no thread can go on");
  g_block = nullptr;
}

}  // namespace

void RunGrid(const char* name, dim3 grid, int threads, std::span<std::byte> shared, const std::function<void()>& body) {
  static std::mt19937 seeds;  // every block of a program has another order
  for (uint3 at = {}; at.z < grid.z; ++at.z) {
    for (at.y = 0; at.y < grid.y; ++at.y) {
      for (at.x = 0; at.x < grid.x; ++at.x) {
        Block block{.kernel = name, .index = at, .grid = grid, .shared = shared, .body = &body};
        block.threads.resize(threads);
        for (int i = 0; i < threads; ++i) block.threads[i].index.x = static_cast<unsigned>(i);
        block.warps.resize((threads + kWarp - 1) / kWarp);
        block.random.seed(seeds());
        block.Run();
      }
    }
  }
}

const uint3& ThreadIdx() {
  return g_block->running->index;
}
const uint3& BlockIdx() {
  return g_block->index;
}
const dim3& GridDim() {
  return g_block->grid;
}
std::span<std::byte> Shared() {
  return g_block->shared;
}
int Threads() {
  return static_cast<int>(g_block->threads.size());
}

void Check(bool good, const char* what) {
  if (!good) g_block->Die(what);
}

void WaitUntil(const char* what, const std::function<bool()>& condition) {
  if (condition()) return;
  Thread& self = *g_block->running;
  self.waits_for = what;
  self.condition = condition;
  swapcontext(&self.context, &g_block->engine);
}

void BlockBarrier(int id, int threads) {
  NamedBarrier& barrier = g_block->named[id];
  const uint32_t times = barrier.times;
  if (++barrier.here == threads) {
    barrier.here = 0;
    ++barrier.times;
  }
  WaitUntil("a block's barrier", [&] { return barrier.times != times; });
}

void Collective(const char* what, const void* in, size_t in_bytes, void* out, size_t out_bytes,
                const std::function<void(const std::byte*, std::byte*)>& combine) {
  const unsigned thread = ThreadIdx().x;
  Warp& warp = g_block->warps[thread / kWarp];
  if (warp.here > 0 && std::strcmp(warp.what, what) != 0) {
    g_block->Die(std::string("lanes of one warp at ") + warp.what + " and at " + what);
  }
  warp.what = what;
  std::memcpy(&warp.in[thread % kWarp * kLaneBytes], in, in_bytes);
  const uint32_t times = warp.times;
  if (++warp.here == kWarp) {
    combine(warp.in.data(), warp.out.data());
    warp.here = 0;
    ++warp.times;
  }
  WaitUntil(what, [&] { return warp.times != times; });
  std::memcpy(out, &warp.out[thread % kWarp * kLaneBytes], out_bytes);
}

void InitBarrier(const void* barrier, int arrivals) {
  g_block->barriers[barrier] = {.arrivals = arrivals, .missing = arrivals};
}

void Arrive(const void* barrier, int64_t expected_bytes) {
  Barrier& at = g_block->At(barrier);
  at.bytes += expected_bytes;
  g_block->Arrive(at);
}

void WaitBarrier(const void* barrier, uint32_t parity) {
  Barrier& at = g_block->At(barrier);
  WaitUntil("a barrier's phase", [&] { return at.phases % 2 != parity; });
}

void CopyLater(std::byte* to, size_t bytes, const void* barrier, std::function<void()> copy) {
  std::memset(to, 0xFF, bytes);
  g_block->copies.push_back({std::move(copy), barrier, static_cast<int64_t>(bytes)});
}

void RunProducts(Thread::Products& products) {
  const size_t thread = g_block->running->index.x;
  for (const Thread::Product& product : std::exchange(products, {})) {
    const size_t first = thread / product.together * product.together;
    WaitUntil("its warpgroup's products", [&] {
      return std::all_of(&g_block->threads[first], &g_block->threads[first] + product.together,
                         [&](const Thread& other) { return other.products >= product.number; });
    });
    product.run();
  }
}

void IssueProduct(int together, std::function<void()> run) {
  Thread& self = *g_block->running;
  self.issued.push_back({++self.products, together, std::move(run)});
  const uint32_t turn = self.products * 0x9E3779B9u + self.index.x / kWarp * 0x85EBCA6Bu + g_block->index.x;
  if ((turn >> 16) % 3 != 0) return;
  for (Thread::Products& group : self.groups) RunProducts(group);
  RunProducts(self.issued);
}

void CommitProducts() {
  Thread& self = *g_block->running;
  self.groups.push_back(std::exchange(self.issued, {}));
}

void AwaitProducts(int pending) {
  Thread& self = *g_block->running;
  // So that others go on meanwhile, who may be about to overwrite an operand.
  bool waited = false;
  WaitUntil("its products", [&] { return std::exchange(waited, true); });
  for (; static_cast<int>(self.groups.size()) > pending; self.groups.pop_front()) RunProducts(self.groups.front());
}

}  // namespace lockstep::host_run
