// Products by cells of `out`: a thread packs a part of the depth of both operands and multiplies panel by panel, a
// block of rows staying in its second-level cache while the columns stream past.
//
// The sum of a number of `out` is cut at the same depths whatever the threads and the other rows are: a row's product
// is the same in every chunk.
#ifdef __AVX512F__
#include "gemm.h"

#include <memory>
#include <new>

#include "gemm_tile.h"

namespace nitp {
namespace NITP_TARGET {

// Depth of a part, in words: a tile of it takes about 8 us and reads and writes `out` once.
constexpr int64_t kPart = 1024;
// Packed rows stay in the second-level cache, packed columns in the last-level one.
constexpr int64_t kBlockBytes = 256 << 10, kColumnBytes = 2 << 20;
// Cells are high, so that their columns are packed once; less high where their sums wait in float32.
constexpr int64_t kHeightAtMost = 8192, kHeightOfSums = 1024;

// The depth in parts of equal size, whole words.
struct Depth {
  int64_t whole, size;

  int64_t at(int64_t from) const { return std::max<int64_t>(0, std::min(size, whole - from)); }
  bool cut() const { return size < whole; }
};

template <class T>
Depth depth_of(int64_t whole) {
  const int64_t words = parts_of(whole, in_word<T>);
  return {whole, parts_of(words, parts_of(words, kPart)) * in_word<T>};
}

// Memory at cache lines, a piece for each thread. It stays with the thread that asks for products: given back after
// each, it would cut the heap where chunks come and go (the plan of four heads peaked at 206 to 232 MiB instead of
// 195).
class Scratch {
 public:
  void reserve(int64_t words, int64_t threads) {
    words_ = lines(words);
    if (words_ * threads <= capacity_) return;
    memory_.reset();  // before there is more
    capacity_ = 0;
    memory_.reset(static_cast<uint32_t*>(::operator new(static_cast<size_t>(words_ * threads) * 4, kLine)));
    capacity_ = words_ * threads;
  }
  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }
  uint32_t* of(int64_t thread) const { return memory_.get() + words_ * thread; }
  static int64_t lines(int64_t words) { return parts_of(words, 16) * 16; }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(uint32_t* memory) const { ::operator delete(memory, kLine); }
  };
  int64_t words_ = 0, capacity_ = 0;
  std::unique_ptr<uint32_t, Free> memory_;
};

// [rows, columns] cells of at most `highest` x `widest`, the same number for each thread; among such grids the one
// that packs least, which is m once for every column of cells, n once for every row.
struct Grid {
  int64_t height, width, columns, cells;

  Grid(int64_t m, int64_t n, int64_t highest, int64_t widest, int64_t threads) : columns(0) {
    int64_t rows = 0;
    const int64_t least_rows = parts_of(m, highest), least_columns = parts_of(n, widest);
    for (int64_t r = least_rows; r < least_rows + threads; ++r) {
      int64_t c = least_columns;
      while (r * c % threads != 0) ++c;
      if (columns == 0 || c * m + r * n < columns * m + rows * n) rows = r, columns = c;
    }
    cells = rows * columns;
    height = parts_of(parts_of(m, kHeight), rows) * kHeight;
    width = parts_of(parts_of(n, kWidth), columns) * kWidth;
  }
};

// The panels of a block of rows times the panels of columns.
template <class T, class O>
void multiply(const uint32_t* rows, int64_t height, const uint32_t* columns, int64_t width, int64_t words, O* out,
              int64_t stride, bool add, Ahead ahead) {
  for (int64_t j = 0; j < width; j += kWidth) {
    for (int64_t i = 0; i < height; i += kHeight) {
      tile_of<T>(rows + i * words, columns + j * words, words, out + i * stride + j, stride,
                 std::min<int64_t>(kHeight, height - i), std::min<int64_t>(kWidth, width - j), add, ahead);
    }
  }
}

// out = sums, or out += sums.
template <class O>
void round_sums(const float* sums, int64_t sums_stride, O* out, int64_t stride, int64_t rows, int64_t columns,
                bool add) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += kWidth) {
      const float* at = sums + i * sums_stride + j;
      put(out + i * stride + j, _mm512_load_ps(at), _mm512_load_ps(at + 16), std::min<int64_t>(kWidth, columns - j),
          add);
    }
  }
}

// Lines [begin, end) at depths [from, from + depth): share `i` of `shares` of it, cut where memory is not dense.
template <class T>
void come_next(Ahead& ahead, Operand<T> x, int64_t begin, int64_t end, int64_t from, int64_t depth, int64_t i,
               int64_t shares) {
  const bool dense = x.depth == 1;
  const int64_t count = dense ? end - begin : depth, stride = dense ? x.line : x.depth;
  const int64_t first_row = count * i / shares, rows = count * (i + 1) / shares - first_row;
  const T* data = x.data + begin * x.line + from * x.depth + first_row * stride;
  ahead.add(reinterpret_cast<const char*>(data), stride * sizeof(T), (dense ? depth : end - begin) * sizeof(T), rows);
}

template <class T, class O>
void by_cells(const Gemm<T, O>& g, Team team) {
  const Depth depth = depth_of<T>(g.k);
  const int64_t words = depth.size / in_word<T>;
  const bool waits = sizeof(O) < 4 && depth.cut();  // the sums, in float32, for the rounding at their end
  const int64_t widest = std::max<int64_t>(kWidth, kColumnBytes / (4 * words));
  const Grid grid(g.m, g.n, waits ? kHeightOfSums : kHeightAtMost, widest, team.threads);
  const int64_t block = std::min(grid.height, std::max<int64_t>(1, kBlockBytes / (4 * words * kHeight)) * kHeight);
  const int64_t of_columns = grid.width * words, of_rows = Scratch::lines(block * words);
  Scratch& scratch = Scratch::of_this_thread();
  scratch.reserve(of_columns + of_rows + (waits ? grid.height * grid.width : 0), team.threads);
  team.run(team.threads, [&](int64_t thread) {
    uint32_t *const columns = scratch.of(thread), *const rows = columns + of_columns;
    float* const sums = reinterpret_cast<float*>(rows + of_rows);
    for (int64_t i = grid.cells / team.threads * thread; i < grid.cells / team.threads * (thread + 1); ++i) {
      const int64_t top = i / grid.columns * grid.height, bottom = std::min(g.m, top + grid.height);
      const int64_t left = i % grid.columns * grid.width, right = std::min(g.n, left + grid.width);
      if (top >= bottom || left >= right) continue;
      const int64_t blocks = parts_of(bottom - top, block);
      for (int64_t from = 0; from < g.k; from += depth.size) {
        const int64_t here = depth.at(from), next = from + depth.size, there = depth.at(next);
        pack<kWidth>(g.b, left, right, from, here, columns);
        for (int64_t j = 0; j < blocks; ++j) {
          const int64_t begin = top + j * block, end = std::min(bottom, begin + block);
          pack<kHeight>(g.a, begin, end, from, here, rows);
          Ahead ahead;
          if (j + 1 < blocks) {
            come_next(ahead, g.a, end, std::min(bottom, end + block), from, here, 0, 1);
          } else {
            come_next(ahead, g.a, top, std::min(bottom, top + block), next, there, 0, 1);
          }
          come_next(ahead, g.b, left, right, next, there, j, blocks);
          const int64_t of_part = parts_of(here, in_word<T>);
          if (waits) {
            multiply<T>(rows, end - begin, columns, right - left, of_part, sums + (begin - top) * grid.width,
                        grid.width, from > 0, ahead);
          } else {
            multiply<T>(rows, end - begin, columns, right - left, of_part, g.out + begin * g.stride + left, g.stride,
                        g.add || from > 0, ahead);
          }
        }
      }
      if (waits) {
        round_sums(sums, grid.width, g.out + top * g.stride + left, g.stride, bottom - top, right - left, g.add);
      }
    }
  });
}

#ifdef __AVX512BF16__
void gemm(const Gemm<bfloat16, bfloat16>& product, Team team) { by_cells(product, team); }
void gemm(const Gemm<bfloat16, float>& product, Team team) { by_cells(product, team); }
#else
void gemm(const Gemm<float, float>& product, Team team) { by_cells(product, team); }
#endif

}  // namespace NITP_TARGET
}  // namespace nitp
#endif
