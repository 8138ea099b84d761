// The row kernel of the cross-entropy with a cluster and threads that the caller chooses, for
// benchmarks/suites/geometry.py.
#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>

#include "../../csrc/cuda/cross_entropy/cross_entropy.cu"

namespace nitp {
namespace cuda {

using Rows = CrossEntropyRows<bfloat16, float>;

static void with_geometry(const Rows& a, int64_t rows, int blocks, int threads, void* stream) {
  const auto by_cluster = cross_entropy_rows<Cluster, bfloat16, float, Kind::plain>;
  const auto by_block = cross_entropy_rows<OneBlock, bfloat16, float, Kind::plain>;
  const int64_t packs = a.columns * sizeof(bfloat16) / kPackBytes;
  const int resident = std::max(1, kMaxRowThreads<bfloat16> / threads);
  const Plan p = plan(multiprocessor(), packs, kInRegisters<Kind::plain>,
                      sizeof(Scratch<Cluster, float>), blocks, threads, resident);
  if (blocks > 1 && blocks > largest_cluster(by_cluster, threads, p.shared_bytes())) {
    throw std::runtime_error("the device has no such clusters");
  }
  launch(blocks > 1 ? by_cluster : by_block, Blocks(rows * blocks, blocks), threads,
         p.shared_bytes(), stream, a, p.in_shared);
}

}  // namespace cuda
}  // namespace nitp

// Loss and gradient of dense rows with one label each; nullptr, or why not. stats: [2, rows].
extern "C" __attribute__((visibility("default"))) const char* nitp_geometry(
    void* logits, const int64_t* labels, const float* scale, float* stats, float* target_logit,
    int64_t* prediction, int64_t rows, int64_t columns, int blocks, int threads, void* stream) {
  static thread_local std::string reason;
  nitp::cuda::Rows a{};
  a.logits = static_cast<decltype(a.logits)>(logits), a.labels = labels, a.row_scale = scale,
  a.stats = stats;
  a.target_logit = target_logit, a.prediction = prediction, a.columns = columns, a.targets = 1;
  a.logits_stride = columns, a.stats_stride = rows, a.ignore_index = -100, a.logit_scale = 1,
  a.gradient = true;
  try {
    nitp::cuda::with_geometry(a, rows, blocks, threads, stream);
    return nullptr;
  } catch (const std::exception& error) {
    reason = error.what();
    return reason.c_str();
  }
}
