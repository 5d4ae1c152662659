// Runs kernels on a CPU, from their own source: a block's threads are fibers, of which a random warp's run ahead as far
// as they can; a warp's collective instructions wait for all 32 lanes; copies into shared memory land at a time of the
// engine's choosing and are poison before that. So machines without a GPU test which bits a kernel gives, and find
// waits that are missing or never end. Not shown by it: the memory model beyond barriers, registers, speed.
//
// A kernel's file is compiled as C++ after prelude.h, with instructions/ ahead of the include path: headers of the same
// names, whose instructions are made of what is declared here. Matrix products are the oracle's, so the bits are a
// GPU's.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

namespace lockstep::host_run {

constexpr int kLaneBytes = 64;

// Runs `body` as every thread of every block, block after block; `shared`: the dynamic shared memory, all NaN at a
// block's start. Aborts, saying who waits for what, if no thread of a block can go on.
void RunGrid(const char* name, dim3 grid, int threads, std::span<std::byte> shared, const std::function<void()>& body);

// The running thread's.
const uint3& ThreadIdx();
const uint3& BlockIdx();
const dim3& GridDim();
int Threads();
// The running block's.
std::span<std::byte> Shared();

// Aborts, naming the block and what its threads wait for, unless `good`.
void Check(bool good, const char* what);

// The caller goes on once condition() holds. `what`: for the message if it never does.
void WaitUntil(const char* what, const std::function<bool()>& condition);

// Until `threads` threads have come to barrier `id` (0: __syncthreads).
void BlockBarrier(int id, int threads);

// What the 32 lanes of a warp bring to one instruction, in_bytes each, and take from it. combine(in, out) computes all
// lanes' results, lane i's at in + i * kLaneBytes and out + i * kLaneBytes. All lanes must come with the same `what`.
void Collective(const char* what, const void* in, size_t in_bytes, void* out, size_t out_bytes,
                const std::function<void(const std::byte* in, std::byte* out)>& combine);

// mbarriers, by their address.
void InitBarrier(const void* barrier, int arrivals);
void Arrive(const void* barrier, int64_t expected_bytes);
void WaitBarrier(const void* barrier, uint32_t parity);

// Calls `copy` at some later time, then counts `bytes` at the barrier. [to, to + bytes) is NaN until then.
void CopyLater(std::byte* to, size_t bytes, const void* barrier, std::function<void()> copy);

// Matrix products that run beside their thread, in order: `run` is called at once or when the thread waits for its
// group, the earliest and the latest time that a device may choose (the engine takes turns, alike for a warp's lanes);
// but not before all of `together` neighbouring threads, a warpgroup, have issued theirs, so that none of its warps is
// ahead of another by more. What it writes is the caller's to poison until then. A thread waits for all before it ends.
void IssueProduct(int together, std::function<void()> run);
void CommitProducts();  // those issued since the last call are a group
// Until at most `pending` groups are left.
void AwaitProducts(int pending);

}  // namespace lockstep::host_run
