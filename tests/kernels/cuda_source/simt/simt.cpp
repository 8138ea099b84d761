// The fibers of simt.h, and the settings that tests reach through ctypes. launch.h includes simt.h.
#include <algorithm>
#include <numeric>

#include "../../../../csrc/cuda/pack.h"

thread_local Index threadIdx, blockIdx, blockDim;

namespace nitp {
namespace simt {

Settings settings;
int device = 0, questions = 0;
Cluster* cluster = nullptr;
int last_cluster = 0;

namespace {
std::vector<StaticShared*> every_static_shared;
}

StaticShared::StaticShared(size_t size) : size(size) {
  for (int rank = 0; rank < cuda::kMaxCluster; ++rank) {
    of_block.emplace_back(new char[size]);
    std::memset(of_block.back().get(), kPoison, size);
  }
  every_static_shared.push_back(this);
}

Cluster::Cluster(int blocks, int threads, int64_t shared_bytes, std::function<void()> body)
    : blocks_(blocks),
      stacks_(new char[blocks * threads * kStackBytes]),
      shared_bytes_(shared_bytes),
      body_(std::move(body)),
      random_(0) {
  last_cluster = blocks;
  all.members = blocks * threads;
  for (Block& block : blocks_) {
    block.fibers.resize(threads);
    block.warps.resize(threads / kWarpSize);
    for (Warp& warp : block.warps) warp.meeting.members = kWarpSize;
    block.all.members = threads;
    block.shared.reset(new char[shared_bytes]);
  }
}

void Cluster::enter() {
  cluster->body_();
  cluster->block().fibers[threadIdx.x].done = true;
  // the thread's last word: those that wait for it in vain are found by the scheduler
}

std::vector<unsigned> Cluster::order(size_t count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.order == Settings::backward) std::reverse(order.begin(), order.end());
  if (settings.order == Settings::shuffled) std::shuffle(order.begin(), order.end(), random_);
  return order;
}

void Cluster::poison(unsigned rank) {
  std::memset(blocks_[rank].shared.get(), kPoison, shared_bytes_);
  for (StaticShared* memory : every_static_shared) {
    std::memset(memory->of_block[rank].get(), kPoison, memory->size);
  }
}

void Cluster::run(unsigned first_block) {
  cluster = this;
  char* stack = stacks_.get();
  for (unsigned rank = 0; rank < blocks_.size(); ++rank) {
    blocks_[rank].done = 0;
    blocks_[rank].mail = {};
    blocks_[rank].messages.clear();
    poison(rank);
    for (Fiber& fiber : blocks_[rank].fibers) {
      fiber.done = false;
      fiber.waits_for = nullptr;
      fiber.copies.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stack;
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Cluster::enter, 0);
      stack += kStackBytes;
    }
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (const unsigned rank : order(blocks_.size())) moved |= run_block(rank, first_block + rank);
  }
  for (const Block& block : blocks_) {
    if (block.done < block.fibers.size()) {
      throw std::runtime_error("simt: threads wait at a barrier that others never reach");
    }
  }
}

bool Cluster::run_block(unsigned rank, unsigned index) {
  Block& block = blocks_[rank];
  bool ever = false;
  for (bool moved = true; moved && block.done < block.fibers.size();) {
    moved = false;
    for (const unsigned i : order(block.fibers.size())) {
      Fiber& fiber = block.fibers[i];
      const bool waits = fiber.waits_for && fiber.waits_for->round == fiber.round;
      if (fiber.done || waits) continue;
      ever = moved = true;
      rank_ = static_cast<int>(rank);
      threadIdx = {i};
      blockIdx = {index};
      blockDim = {static_cast<unsigned>(block.fibers.size())};
      swapcontext(&scheduler_, &fiber.context);
      if (!error_.empty()) throw std::runtime_error("simt: " + error_);
      block.done += fiber.done;
    }
  }
  if (ever && block.done == block.fibers.size()) poison(rank);
  return ever;
}

void Cluster::meet(Meeting& meeting) {
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  wait(meeting, meeting.round);
}

void Cluster::wait(Meeting& meeting, int64_t round) {
  Fiber& now = block().fibers[threadIdx.x];
  now.waits_for = &meeting;
  now.round = round;
  swapcontext(&now.context, &scheduler_);
  now.waits_for = nullptr;
}

// The barrier's arrival; inboxes_are_open waits for it, and here no thread goes on before all have
// opened.
void Cluster::open_inbox() {
  if (threadIdx.x == 0) block().mail.members = size();
}

void Cluster::send(const void* here, const void* message, size_t size, int rank) {
  char* there = static_cast<char*>(peer(here, rank));
  const char* bytes = static_cast<const char*>(message);
  Block& to = blocks_[rank];
  to.messages.push_back(
      [there, sent = std::string(bytes, size)] { std::memcpy(there, sent.data(), sent.size()); });
  if (++to.mail.arrived == to.mail.members) ++to.mail.round;
}

void Cluster::await_messages() {
  Block& mine = block();
  if (mine.mail.members == 0) fail("an inbox that was never opened");
  if (mine.mail.round == 0) wait(mine.mail, 0);
  for (const auto& arrives : mine.messages) arrives();
  mine.messages.clear();
}

uint32_t Cluster::shuffle(uint32_t word, int lane) {
  Warp& warp = block().warps[threadIdx.x / kWarpSize];
  uint32_t* slots = warp.slots[warp.meeting.round % 2];
  slots[threadIdx.x % kWarpSize] = word;
  meet(warp.meeting);
  return slots[lane];
}

void* Cluster::peer(const void* here, int rank) {
  if (rank < 0 || rank >= size()) fail("the cluster has no block of this rank");
  const Block& of = blocks_[rank];
  if (of.mail.members == 0) fail("a message to a block whose inbox is not open");
  if (of.done == of.fibers.size()) fail("a message to a block that has ended");
  const auto offset_in = [&](const char* mine, size_t size) {
    const std::ptrdiff_t offset = static_cast<const char*>(here) - mine;
    return offset >= 0 && offset < static_cast<std::ptrdiff_t>(size) ? offset : -1;
  };
  for (StaticShared* memory : every_static_shared) {
    const std::ptrdiff_t offset = offset_in(memory->of_block[rank_].get(), memory->size);
    if (offset >= 0) return memory->of_block[rank].get() + offset;
  }
  const std::ptrdiff_t offset = offset_in(block().shared.get(), shared_bytes_);
  if (offset < 0) fail("a peer's memory is asked for by what is not shared memory");
  return of.shared.get() + offset;
}

void Cluster::fail(const std::string& what) {
  error_ = what;
  setcontext(&scheduler_);
  std::abort();
}

}  // namespace simt
}  // namespace nitp

extern "C" __attribute__((visibility("default"))) void simt_set(int64_t order, int64_t shared_bytes,
                                                                int64_t cluster, int64_t threads) {
  ++nitp::simt::device;
  nitp::simt::settings = {static_cast<nitp::simt::Settings::Order>(order), shared_bytes, cluster,
                          threads};
}

extern "C" __attribute__((visibility("default"))) int simt_questions() {
  return nitp::simt::questions;
}

extern "C" __attribute__((visibility("default"))) int simt_last_cluster() {
  return nitp::simt::last_cluster;
}

// How pack.h lays `columns` out over packs of `width` elements: tiles of a row and threads of a
// tile.
extern "C" __attribute__((visibility("default"))) void simt_tiles(int64_t columns, int64_t width,
                                                                  int64_t* out) {
  using namespace nitp::cuda;
  const Tiles t = width == 2   ? tiles<2>(columns)
                  : width == 4 ? tiles<4>(columns)
                               : tiles<8>(columns);
  out[0] = t.of_row, out[1] = t.threads;
}
