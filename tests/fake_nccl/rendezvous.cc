#include "tests/fake_nccl/rendezvous.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

namespace fake_nccl {
namespace {

using namespace lockstep::nccl;  // NOLINT: the results

constexpr char kMagic[8] = {'F', 'A', 'K', 'E', 'N', 'C', 'C', 'L'};

struct Address {  // what a unique id holds; the host is the loopback
  char magic[8];
  uint64_t nonce;
  uint64_t port;
};
static_assert(sizeof(Address) <= sizeof(UniqueId));

struct Hello {
  uint64_t nonce;
  int32_t nranks;
  int32_t rank;
  uint64_t port;
};

Address AddressOf(const UniqueId& id) {
  Address address;
  std::memcpy(&address, id.internal, sizeof(address));
  return address;
}

class Rendezvous {
 public:
  Rendezvous(Fd listener, uint64_t nonce) : listener_(std::move(listener)), nonce_(nonce), thread_([this] { Run(); }) {}
  ~Rendezvous() {
    stop_.Set();
    thread_.join();
  }

  int communicators = 0;  // of this process; guarded by the registry's mutex

 private:
  struct Visitor {
    Fd socket;
    Hello hello = {};
    size_t received = 0;  // bytes of hello
    bool whole() const { return received == sizeof(hello); }
  };

  void Run() {
    std::vector<Visitor> visitors;
    while (Serve(visitors)) {
    }
    listener_ = Fd();  // who comes later is refused
  }

  // Whether to go on.
  bool Serve(std::vector<Visitor>& visitors) {
    std::vector<pollfd> fds = {{stop_.fd(), POLLIN, 0}, {listener_.get(), POLLIN, 0}};
    for (const Visitor& visitor : visitors) fds.push_back({visitor.socket.get(), POLLIN, 0});
    if (poll(fds.data(), fds.size(), -1) < 0) return errno == EINTR;
    if (stop_.IsSet()) return false;
    // One that has died is forgotten, and another may come in its place.
    std::erase_if(visitors, [&](Visitor& visitor) {
      const auto fd =
          std::find_if(fds.begin(), fds.end(), [&](const pollfd& f) { return f.fd == visitor.socket.get(); });
      return fd->revents != 0 && !Read(visitor);
    });
    for (Fd socket = TryAccept(listener_.get()); socket.valid(); socket = TryAccept(listener_.get()))
      visitors.push_back({.socket = std::move(socket)});
    return !Complete(visitors);
  }

  // Whether it is there still.
  bool Read(Visitor& visitor) const {
    char beyond;
    char* to = visitor.whole() ? &beyond : reinterpret_cast<char*>(&visitor.hello) + visitor.received;
    const ssize_t got = recv(visitor.socket.get(), to, visitor.whole() ? 1 : sizeof(Hello) - visitor.received, 0);
    if (got < 0) return errno == EAGAIN || errno == EINTR;
    if (got == 0 || visitor.whole()) return false;
    visitor.received += got;
    return !visitor.whole() || visitor.hello.nonce == nonce_;
  }

  // Whether all is said: the ranks have come, or contradict one another.
  bool Complete(const std::vector<Visitor>& visitors) {
    std::map<int, const Visitor*> ranks;
    int nranks = 0;
    Result result = kSuccess;
    for (const Visitor& visitor : visitors) {
      if (!visitor.whole()) continue;
      if (nranks == 0) nranks = visitor.hello.nranks;
      if (visitor.hello.nranks != nranks || !ranks.emplace(visitor.hello.rank, &visitor).second) result = kInvalidUsage;
    }
    if (result == kSuccess && (nranks == 0 || ranks.size() < nranks)) return false;
    std::vector<uint64_t> answer = {static_cast<uint64_t>(result)};
    for (const auto& [rank, visitor] : ranks) answer.push_back(visitor->hello.port);
    answer.resize(result == kSuccess ? 1 + nranks : 1);
    for (const Visitor& visitor : visitors)  // one that has just died is missed soon enough
      if (visitor.whole()) Send(visitor.socket.get(), answer.data(), answer.size() * sizeof(answer[0]), stop_);
    return true;
  }

  Fd listener_;
  const uint64_t nonce_;
  Stop stop_;
  std::thread thread_;
};

struct Registry {
  std::mutex mutex;
  std::map<uint64_t, std::unique_ptr<Rendezvous>> by_nonce;
};
// Destroyed at exit, with the ids that nobody has used.
Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

uint64_t NonceOf(const UniqueId& id) {
  return AddressOf(id).nonce;
}

Result MakeUniqueId(UniqueId* id) {
  Fd listener;
  uint16_t port = 0;
  const Result result = Listen(&listener, &port);
  if (result != kSuccess) return result;
  std::random_device random;
  Address address = {.nonce = uint64_t{random()} << 32 | random(), .port = port};
  std::memcpy(address.magic, kMagic, sizeof(kMagic));
  std::memset(id, 0, sizeof(*id));
  std::memcpy(id->internal, &address, sizeof(address));
  const std::lock_guard lock(registry().mutex);
  registry().by_nonce[address.nonce] = std::make_unique<Rendezvous>(std::move(listener), address.nonce);
  return kSuccess;
}

void Join(const UniqueId& id) {
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().by_nonce.find(NonceOf(id));
  if (found != registry().by_nonce.end()) ++found->second->communicators;
}

Result Meet(const UniqueId& id, int nranks, int rank, uint16_t port, const Stop& stop, std::vector<uint16_t>* ports) {
  const Address address = AddressOf(id);
  if (std::memcmp(address.magic, kMagic, sizeof(kMagic)) != 0) {
    SetLastError("the unique id is not one of this library");
    return kInvalidArgument;
  }
  Fd socket;
  Result result = Connect(static_cast<uint16_t>(address.port), stop, &socket);
  const Hello hello = {.nonce = address.nonce, .nranks = nranks, .rank = rank, .port = port};
  if (result == kSuccess) result = Send(socket.get(), &hello, sizeof(hello), stop);
  uint64_t verdict = 0;
  if (result == kSuccess) result = Receive(socket.get(), &verdict, sizeof(verdict), stop);
  if (result != kSuccess) return result;
  if (verdict != kSuccess) {
    SetLastError("the ranks disagree on nranks (%d here), or one of them came twice (%d here)", nranks, rank);
    return static_cast<Result>(verdict);
  }
  std::vector<uint64_t> all(nranks);
  result = Receive(socket.get(), all.data(), all.size() * sizeof(all[0]), stop);
  ports->assign(all.begin(), all.end());
  return result;
}

void Leave(const UniqueId& id) {
  std::unique_ptr<Rendezvous> over;  // joined without the lock
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().by_nonce.find(NonceOf(id));
  if (found == registry().by_nonce.end() || --found->second->communicators > 0) return;
  over = std::move(found->second);
  registry().by_nonce.erase(found);
}

}  // namespace fake_nccl
