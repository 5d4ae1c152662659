// Against tests/fake_nccl: threads of this process as ranks, and other processes where one has to die or fall silent.
#include "weights_sync/nccl_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <functional>
#include <thread>
#include <vector>

#include "absl/time/clock.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using Group = std::unique_ptr<NcclGroup>;
using Piece = NcclGroup::Piece;

// Of what must succeed, however slow the machine.
absl::Time Ample() {
  return absl::Now() + absl::Seconds(60);
}
absl::Time Soon() {
  return absl::Now() + absl::Milliseconds(300);
}

std::shared_ptr<NcclLibrary> Library() {
  auto library = NcclLibrary::Load(LOCKSTEP_FAKE_NCCL);
  if (!library.ok()) {
    ADD_FAILURE() << library.status();
    std::abort();
  }
  return *library;
}
std::string UniqueId() {
  return Library()->UniqueId().value();
}

void InThreads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  threads.reserve(count);
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

std::vector<Group> Groups(int nranks) {
  const std::string id = UniqueId();
  std::vector<Group> groups(nranks);
  InThreads(nranks, [&](int rank) {
    auto group = NcclGroup::Create(Library(), id, nranks, rank, Ample());
    ASSERT_TRUE(group.ok()) << group.status();
    groups[rank] = *std::move(group);
  });
  return groups;
}

size_t Entries(const char* folder) {
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) count += entry.path().empty() ? 0 : 1;
  return count;
}
// Threads that have been joined stay in /proc for a moment.
bool Falls(const char* folder, size_t to) {
  for (const absl::Time end = absl::Now() + absl::Seconds(5); absl::Now() < end; absl::SleepFor(absl::Milliseconds(5)))
    if (Entries(folder) <= to) return true;
  return false;
}

unsigned char Value(size_t seed, size_t i) {
  return static_cast<unsigned char>((i * 2654435761u >> 7) + seed * 31 + 1);
}

struct Bucket {
  explicit Bucket(const std::vector<int64_t>& sizes) {
    for (const int64_t size : sizes) memory.emplace_back(size);
    for (auto& m : memory) pieces.push_back({m.data(), static_cast<int64_t>(m.size())});
  }
  void Fill(size_t seed) {
    for (size_t p = 0; p < memory.size(); ++p)
      for (size_t i = 0; i < memory[p].size(); ++i) memory[p][i] = Value(seed + p, i);
  }
  bool Holds(size_t seed) const {
    for (size_t p = 0; p < memory.size(); ++p)
      for (size_t i = 0; i < memory[p].size(); ++i)
        if (memory[p][i] != Value(seed + p, i)) return false;
    return true;
  }
  std::vector<std::vector<unsigned char>> memory;
  std::vector<Piece> pieces;
};

// A rank in a process of its own, forked while this one has a single thread; the id comes later, through a pipe.
class Child {
 public:
  explicit Child(const std::function<void(const std::string& id)>& body) {
    EXPECT_EQ(pipe(pipe_.data()), 0);
    pid_ = fork();
    if (pid_ != 0) return;
    std::string id(nccl::kUniqueIdBytes, '\0');
    if (read(pipe_[0], id.data(), id.size()) != id.size()) _exit(2);
    body(id);
    _exit(0);
  }
  ~Child() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    close(pipe_[0]);
    close(pipe_[1]);
  }
  void Give(const std::string& id) const { EXPECT_EQ(write(pipe_[1], id.data(), id.size()), id.size()); }
  void Signal(int signal) const { kill(pid_, signal); }
  // Until it has stopped, by itself or by Signal(SIGSTOP).
  void AwaitStop() const {
    int status = 0;
    EXPECT_EQ(waitpid(pid_, &status, WUNTRACED), pid_);
    EXPECT_TRUE(WIFSTOPPED(status)) << status;
  }

 private:
  std::array<int, 2> pipe_;
  pid_t pid_;
};

// Joins as `rank` and stops for good.
std::function<void(const std::string&)> JoinAndStop(int nranks, int rank) {
  return [=](const std::string& id) {
    auto group = NcclGroup::Create(Library(), id, nranks, rank, Ample());
    if (!group.ok()) _exit(3);
    raise(SIGSTOP);
  };
}

TEST(NcclGroup, NineRanksManySizesEveryRoot) {
  constexpr int kRanks = 9;
  const std::vector<Group> groups = Groups(kRanks);
  const std::vector<std::vector<int64_t>> buckets = {
      {1}, {0}, {}, {7, 0, 4096, 1 << 20, 3}, std::vector<int64_t>(300, 1000), {(8 << 20) + 5, 1, (3 << 20) - 1}};
  InThreads(kRanks, [&](int rank) {
    for (int root = 0; root < kRanks; root += 4) {
      for (size_t b = 0; b < buckets.size(); ++b) {
        Bucket bucket(buckets[b]);
        const size_t seed = root * size_t{100} + b;
        if (rank == root) bucket.Fill(seed);
        const absl::Status status = groups[rank]->Broadcast(bucket.pieces, root, nullptr, Ample());
        ASSERT_TRUE(status.ok()) << status;
        ASSERT_TRUE(bucket.Holds(seed)) << "rank " << rank << " root " << root << " bucket " << b;
      }
    }
  });
}

TEST(NcclGroup, SixtyFourMebibytes) {
  const std::vector<Group> groups = Groups(3);
  InThreads(3, [&](int rank) {
    Bucket bucket({64 << 20});
    if (rank == 1) bucket.Fill(5);
    ASSERT_TRUE(groups[rank]->Broadcast(bucket.pieces, 1, nullptr, Ample()).ok());
    EXPECT_TRUE(bucket.Holds(5));
  });
}

TEST(NcclGroup, OneRank) {
  const std::vector<Group> groups = Groups(1);
  Bucket bucket({100});
  bucket.Fill(1);
  ASSERT_TRUE(groups[0]->Broadcast(bucket.pieces, 0, nullptr, Ample()).ok());
  EXPECT_TRUE(bucket.Holds(1));
}

TEST(NcclGroup, TwoGroupsAtOnce) {
  std::array<std::vector<Group>, 2> groups = {Groups(3), Groups(3)};
  InThreads(6, [&](int i) {
    for (int round = 0; round < 20; ++round) {
      Bucket bucket({1 << 20, 17});
      const int root = round % 3;
      const size_t seed = i / 3 * size_t{1000} + round;
      if (i % 3 == root) bucket.Fill(seed);
      const absl::Status status = groups[i / 3][i % 3]->Broadcast(bucket.pieces, root, nullptr, Ample());
      ASSERT_TRUE(status.ok()) << status;
      ASSERT_TRUE(bucket.Holds(seed));
    }
  });
}

TEST(NcclGroup, BadArguments) {
  const std::string id(nccl::kUniqueIdBytes, 'x');
  EXPECT_TRUE(absl::IsInvalidArgument(NcclGroup::Create(Library(), "short", 1, 0, Ample()).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(NcclGroup::Create(Library(), id, 0, 0, Ample()).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(NcclGroup::Create(Library(), id, 2, 2, Ample()).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(NcclGroup::Create(Library(), id, 2, 1, Ample()).status()));
  const std::vector<Group> groups = Groups(1);
  EXPECT_TRUE(absl::IsInvalidArgument(groups[0]->Broadcast({}, 1, nullptr, Ample())));
  Bucket bucket({4});
  const Piece null = {nullptr, 4}, negative = {bucket.memory[0].data(), -1};
  EXPECT_TRUE(absl::IsInvalidArgument(groups[0]->Broadcast({&null, 1}, 0, nullptr, Ample())));
  EXPECT_TRUE(absl::IsInvalidArgument(groups[0]->Broadcast({&negative, 1}, 0, nullptr, Ample())));
  EXPECT_TRUE(groups[0]->healthy()) << "nothing of that has reached NCCL";
  int no_stream = 0;
  EXPECT_TRUE(absl::IsInvalidArgument(groups[0]->Broadcast(bucket.pieces, 0, &no_stream, Ample())));
  EXPECT_FALSE(groups[0]->healthy());
  EXPECT_TRUE(absl::IsFailedPrecondition(groups[0]->Broadcast(bucket.pieces, 0, nullptr, Ample())));
  // The thread's group was closed after the error.
  const std::vector<Group> more = Groups(1);
  EXPECT_TRUE(more[0]->Broadcast(bucket.pieces, 0, nullptr, Ample()).ok());
}

TEST(NcclGroup, RanksThatContradictOneAnother) {
  for (const auto& [nranks, rank] : {std::pair(3, 1), std::pair(2, 0)}) {
    const std::string id = UniqueId();
    InThreads(2, [&, nranks = nranks, rank = rank](int i) {
      const absl::Status status =
          NcclGroup::Create(Library(), id, i == 0 ? 2 : nranks, i == 0 ? 0 : rank, Ample()).status();
      EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    });
  }
}

TEST(NcclGroup, SizesThatDiffer) {
  const std::vector<Group> groups = Groups(3);
  InThreads(3, [&](int rank) {
    Bucket bucket({100, rank == 2 ? 7 : 8});
    const absl::Status status = groups[rank]->Broadcast(bucket.pieces, 0, nullptr, Ample());
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_FALSE(groups[rank]->healthy());
  });
}

TEST(NcclGroup, AMissingRank) {
  const std::string id = UniqueId();
  InThreads(2, [&](int rank) {
    const absl::Time begin = absl::Now();
    const absl::Status status = NcclGroup::Create(Library(), id, 3, rank, Soon()).status();
    EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("waiting for the ranks to come together"));
    EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  });
}

TEST(NcclGroup, ASilentPeer) {
  const Child child(JoinAndStop(3, 1));
  const std::string id = UniqueId();
  child.Give(id);
  InThreads(2, [&](int i) {
    auto group = NcclGroup::Create(Library(), id, 3, i * 2, Ample());
    ASSERT_TRUE(group.ok()) << group.status();
    if (i == 0) child.AwaitStop();
    Bucket bucket({64 << 20, 1});
    const absl::Time begin = absl::Now();
    const absl::Status status = (*group)->Broadcast(bucket.pieces, 0, nullptr, i == 0 ? Soon() : Ample());
    if (i == 0) {
      EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr("waiting for a broadcast of 67108865 bytes from rank 0"));
    } else {
      EXPECT_TRUE(absl::IsUnavailable(status)) << "its root has aborted: " << status;
    }
    EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
    EXPECT_TRUE(absl::IsFailedPrecondition((*group)->Broadcast(bucket.pieces, 0, nullptr, Ample())));
  });
}

TEST(NcclGroup, ASilentRoot) {
  const std::vector<Group> groups = Groups(2);
  Bucket bucket({100});
  EXPECT_TRUE(absl::IsDeadlineExceeded(groups[1]->Broadcast(bucket.pieces, 0, nullptr, Soon())));
}

TEST(NcclGroup, APeerDies) {
  const Child child(JoinAndStop(3, 1));
  const std::string id = UniqueId();
  child.Give(id);
  InThreads(2, [&](int i) {
    auto group = NcclGroup::Create(Library(), id, 3, i * 2, Ample());
    ASSERT_TRUE(group.ok()) << group.status();
    if (i == 0) {
      child.AwaitStop();
      child.Signal(SIGKILL);
    }
    Bucket bucket({1 << 20});
    const absl::Status status = (*group)->Broadcast(bucket.pieces, 0, nullptr, Ample());
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("ncclRemoteError"));
    EXPECT_TRUE(absl::IsFailedPrecondition((*group)->Broadcast(bucket.pieces, 0, nullptr, Ample())));
  });
}

TEST(NcclGroup, APeerDiesAmidTheData) {
  constexpr size_t kBytes = 64 << 20;
  int amid = 0;
  for (int attempt = 0; attempt < 20 && amid < 1; ++attempt) {
    // The child receives into memory that this process sees as well, and is stopped when the first byte is there.
    auto* shared = static_cast<volatile unsigned char*>(
        mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(shared, MAP_FAILED);
    {
      const Child child([&](const std::string& id) {
        auto group = NcclGroup::Create(Library(), id, 2, 1, Ample());
        if (!group.ok()) _exit(3);
        const Piece piece = {const_cast<unsigned char*>(shared), kBytes};
        static_cast<void>((*group)->Broadcast({&piece, 1}, 0, nullptr, Ample()));
        raise(SIGSTOP);
      });
      const std::string id = UniqueId();
      child.Give(id);
      auto group = NcclGroup::Create(Library(), id, 2, 0, Ample());
      ASSERT_TRUE(group.ok()) << group.status();
      bool unfinished = false;
      std::thread killer([&] {
        while (shared[0] == 0) absl::SleepFor(absl::Microseconds(10));
        child.Signal(SIGSTOP);
        child.AwaitStop();
        unfinished = shared[kBytes - 1] == 0;
        child.Signal(SIGKILL);
      });
      std::vector<unsigned char> data(kBytes, 1);
      const Piece piece = {data.data(), kBytes};
      const absl::Status status = (*group)->Broadcast({&piece, 1}, 0, nullptr, Ample());
      killer.join();
      if (!status.ok()) {
        EXPECT_TRUE(absl::IsUnavailable(status)) << status;
        EXPECT_TRUE(unfinished);
        ++amid;
      }  // else what was left fitted into the sockets' buffers
    }
    munmap(const_cast<unsigned char*>(shared), kBytes);
  }
  EXPECT_EQ(amid, 1);
}

TEST(NcclGroup, TheRootDies) {
  const Child child(JoinAndStop(3, 0));
  const std::string id = UniqueId();
  child.Give(id);
  InThreads(2, [&](int i) {
    auto group = NcclGroup::Create(Library(), id, 3, 1 + i, Ample());
    ASSERT_TRUE(group.ok()) << group.status();
    if (i == 0) {
      child.AwaitStop();
      child.Signal(SIGKILL);
    }
    Bucket bucket({100});
    const absl::Status status = (*group)->Broadcast(bucket.pieces, 0, nullptr, Ample());
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  });
}

TEST(NcclGroup, CancelWhileCreating) {
  const std::string id = UniqueId();
  std::atomic<bool> cancelled = false;
  std::thread other([&] {
    absl::SleepFor(absl::Milliseconds(50));
    cancelled = true;
  });
  const absl::Status status =
      NcclGroup::Create(Library(), id, 2, 0, Ample(), /*max_ctas=*/0, [&] { return cancelled.load(); }).status();
  EXPECT_TRUE(absl::IsCancelled(status)) << status;
  other.join();
}

TEST(NcclGroup, CancelWhileBroadcastingOrBefore) {
  const std::vector<Group> groups = Groups(2);
  std::thread other([&] {
    absl::SleepFor(absl::Milliseconds(50));
    groups[0]->Cancel();
  });
  Bucket bucket({100});
  EXPECT_TRUE(absl::IsCancelled(groups[0]->Broadcast(bucket.pieces, 0, nullptr, Ample())));
  other.join();
  EXPECT_TRUE(absl::IsFailedPrecondition(groups[0]->Broadcast(bucket.pieces, 0, nullptr, Ample())));
  groups[1]->Cancel();
  EXPECT_TRUE(absl::IsCancelled(groups[1]->Broadcast(bucket.pieces, 0, nullptr, Ample())));
}

TEST(NcclGroup, AbortWhileIdle) {
  const std::vector<Group> groups = Groups(2);
  groups[0]->Abort();
  groups[0]->Abort();
  EXPECT_FALSE(groups[0]->healthy());
  Bucket bucket({100});
  const absl::Status status = groups[0]->Broadcast(bucket.pieces, 0, nullptr, Ample());
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("Abort() was called"));
  EXPECT_TRUE(absl::IsUnavailable(groups[1]->Broadcast(bucket.pieces, 0, nullptr, Ample())));
}

TEST(NcclGroup, WaitLooksAfterTheCommunicator) {
  const std::vector<Group> groups = Groups(2);
  int calls = 0;
  EXPECT_TRUE(groups[0]->Wait([&] { return ++calls == 5; }, "the fifth call", Ample()).ok());
  EXPECT_EQ(calls, 5);
  const absl::Status late = groups[0]->Wait([] { return false; }, "nothing", Soon());
  EXPECT_TRUE(absl::IsDeadlineExceeded(late)) << late;
  EXPECT_THAT(std::string(late.message()), HasSubstr("rank 0 of 2: the deadline passed while waiting for nothing"));
  EXPECT_TRUE(absl::IsAborted(groups[1]->Wait([] { return absl::AbortedError("the event"); }, "an event", Ample())));
  EXPECT_FALSE(groups[1]->healthy());
}

TEST(NcclGroup, NoLeakOverManyCommunicators) {
  Groups(2).clear();
  const size_t fds = Entries("/proc/self/fd"), threads = Entries("/proc/self/task");
  for (int i = 0; i < 200; ++i) {
    std::vector<Group> groups = Groups(2);
    if (i % 3 == 1) groups[i % 2]->Abort();
    InThreads(2, [&](int rank) { groups[rank].reset(); });
    if (i % 20 == 0) {
      EXPECT_TRUE(absl::IsDeadlineExceeded(NcclGroup::Create(Library(), UniqueId(), 2, 0, absl::Now()).status()));
    }
  }
  EXPECT_TRUE(Falls("/proc/self/fd", fds)) << fds << " before, now " << Entries("/proc/self/fd");
  EXPECT_TRUE(Falls("/proc/self/task", threads)) << threads << " before, now " << Entries("/proc/self/task");
}

// What NCCL forbids, the fake refuses: the tests above would not pass if NcclGroup did it.
TEST(FakeNccl, RefusesACallOnACommunicatorInProgress) {
  const nccl::Api api = Library()->api();
  nccl::UniqueId id;
  ASSERT_EQ(api.ncclGetUniqueId(&id), nccl::kSuccess);
  nccl::Config config;
  config.blocking = 0;
  nccl::Comm comm = nullptr;
  ASSERT_EQ(api.ncclCommInitRankConfig(&comm, 2, id, 0, &config), nccl::kInProgress);
  char byte = 0;
  EXPECT_EQ(api.ncclBroadcast(&byte, &byte, 1, nccl::kUint8, 0, comm, nullptr), nccl::kInvalidArgument);
  EXPECT_EQ(api.ncclCommFinalize(comm), nccl::kInvalidArgument);
  EXPECT_EQ(api.ncclCommDestroy(comm), nccl::kInvalidArgument);
  EXPECT_EQ(api.ncclCommAbort(comm), nccl::kSuccess);
}

}  // namespace
}  // namespace lockstep
