// The fibers of simt.h, and the settings that tests reach through ctypes.
#include "simt.h"

#include <algorithm>
#include <numeric>

thread_local Index threadIdx, blockIdx, blockDim;

namespace nitp {
namespace simt {

Settings settings;
Block* block = nullptr;

namespace {
std::vector<StaticShared*> every_static_shared;
}

StaticShared::StaticShared(size_t size) : size(size), bytes(new char[size]) {
  poison();
  every_static_shared.push_back(this);
}

void StaticShared::poison() { std::memset(bytes.get(), kPoison, size); }

Block::Block(int threads, int64_t shared_bytes, std::function<void()> body)
    : fibers_(threads),
      warps_(threads / kWarpSize),
      shared_(new char[shared_bytes]),
      shared_bytes_(shared_bytes),
      body_(std::move(body)),
      random_(0) {
  all.members = threads;
  for (Warp& warp : warps_) warp.meeting.members = kWarpSize;
  for (int i = 0; i < threads; ++i) {
    fibers_[i].index = i;
    fibers_[i].stack.resize(kStackBytes);
  }
}

void Block::enter() {
  block->body_();
  block->now_->done = true;
  // the thread's last word: those that wait for it in vain are found by the scheduler
}

std::vector<unsigned> Block::order() {
  std::vector<unsigned> order(fibers_.size());
  std::iota(order.begin(), order.end(), 0u);
  if (settings.order == Settings::backward) std::reverse(order.begin(), order.end());
  if (settings.order == Settings::shuffled) std::shuffle(order.begin(), order.end(), random_);
  return order;
}

void Block::run(unsigned index) {
  block = this;
  blockIdx = {index};
  blockDim = {static_cast<unsigned>(fibers_.size())};
  std::memset(shared_.get(), kPoison, shared_bytes_);
  for (StaticShared* memory : every_static_shared) memory->poison();
  for (Fiber& fiber : fibers_) {
    fiber.done = false;
    fiber.waits_for = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Block::enter, 0);
  }
  size_t done = 0;
  for (bool moved = true; moved && done < fibers_.size();) {
    moved = false;
    for (const unsigned i : order()) {
      Fiber& fiber = fibers_[i];
      const bool waits = fiber.waits_for && fiber.waits_for->round == fiber.round;
      if (fiber.done || waits) continue;
      moved = true;
      now_ = &fiber;
      threadIdx = {i};
      swapcontext(&scheduler_, &fiber.context);
      done += fiber.done;
    }
  }
  if (done < fibers_.size()) throw std::runtime_error("simt: threads wait at a barrier that others never reach");
}

void Block::meet(Meeting& meeting) {
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  now_->waits_for = &meeting;
  now_->round = meeting.round;
  swapcontext(&now_->context, &scheduler_);
  now_->waits_for = nullptr;
}

uint32_t Block::shuffle(uint32_t word, int lane) {
  Warp& warp = warps_[threadIdx.x / kWarpSize];
  uint32_t* slots = warp.slots[warp.meeting.round % 2];
  slots[threadIdx.x % kWarpSize] = word;
  meet(warp.meeting);
  return slots[lane];
}

}  // namespace simt
}  // namespace nitp

extern "C" __attribute__((visibility("default"))) void simt_set(int64_t order, int64_t shared_bytes) {
  nitp::simt::settings = {static_cast<nitp::simt::Settings::Order>(order), shared_bytes};
}
