// GEMMs by cells of `out`: a thread packs a part of the depth of both operands and multiplies panel
// by panel, a block of rows staying in its second-level cache while the columns stream past.
//
// The sum of a number of `out` is cut at the same depths whatever the threads and the other rows
// are: a row of the result has the same bits in every chunk.
#ifdef __AVX2__
#include <memory>
#include <new>

#include "tile.h"

namespace nitp {
namespace NITP_TARGET {

// Rows that are packed once for all threads stay in the last-level cache too.
constexpr int64_t kSharedBytes = 4 << 20;
// Cells are high, so that their columns are packed once; less high where their sums wait in
// float32.
constexpr int64_t kHeightAtMost = 8192, kHeightOfSums = 1024;

// The depth in parts of equal size, whole words.
struct Depth {
  int64_t whole, size;

  int64_t at(int64_t from) const { return std::max<int64_t>(0, std::min(size, whole - from)); }
  bool cut() const { return size < whole; }
  int64_t parts() const { return parts_of(whole, size); }
};

template <class T>
Depth depth_of(int64_t whole) {
  const int64_t words = parts_of(whole, in_word<T>);
  return {whole, parts_of(words, parts_of(words, kPart)) * in_word<T>};
}

// Memory at cache lines: one part for all threads, one for each. The calling thread keeps it: freed
// after each GEMM, it would fragment the heap between the chunks (the plan of four heads peaked at
// 206 to 232 MiB instead of 195).
class Scratch {
 public:
  void reserve(int64_t shared, int64_t words, int64_t threads) {
    shared_ = lines(shared), words_ = lines(words);
    const int64_t needed = shared_ + words_ * threads;
    if (needed <= capacity_) return;
    memory_.reset();  // before there is more
    capacity_ = 0;
    memory_.reset(static_cast<uint32_t*>(::operator new(static_cast<size_t>(needed) * 4, kLine)));
    capacity_ = needed;
  }
  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }
  uint32_t* shared() const { return memory_.get(); }
  uint32_t* of(int64_t thread) const { return memory_.get() + shared_ + words_ * thread; }
  static int64_t lines(int64_t words) { return parts_of(words, 16) * 16; }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(uint32_t* memory) const { ::operator delete(memory, kLine); }
  };
  int64_t shared_ = 0, words_ = 0, capacity_ = 0;
  std::unique_ptr<uint32_t, Free> memory_;
};

// [rows, columns] cells of at most `max_height` x `max_width`, the same number for each thread;
// among such grids the one that packs least, which is m once for every column of cells, n once for
// every row.
struct Grid {
  int64_t height, width, columns, cells;

  Grid(int64_t m, int64_t n, int64_t max_height, int64_t max_width, int64_t threads) : columns(0) {
    int64_t rows = 0;
    const int64_t least_rows = parts_of(m, max_height), least_columns = parts_of(n, max_width);
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

// The panels of a block of rows times the panels of columns: row by row of tiles where `out` is
// visited once, whose lines lie along rows in memory (the weight gradient gained 2 to 4 %), else
// column by column, which reads less of the packed numbers.
template <class T, class O>
void multiply(const uint32_t* rows, int64_t height, const uint32_t* columns, int64_t width,
              int64_t words, O* out, int64_t stride, bool add, bool along_rows,
              Prefetcher prefetcher) {
  const auto at = [&](int64_t i, int64_t j) {
    tile_of<T>(rows + i * panel<kHeight>(words), columns + j * panel<kWidth>(words), words,
               out + i * kHeight * stride + j * kWidth, stride,
               std::min<int64_t>(kHeight, height - i * kHeight),
               std::min<int64_t>(kWidth, width - j * kWidth), add, prefetcher);
  };
  const int64_t down = parts_of(height, kHeight), across = parts_of(width, kWidth);
  for (int64_t outer = 0; outer < (along_rows ? down : across); ++outer) {
    for (int64_t inner = 0; inner < (along_rows ? across : down); ++inner) {
      along_rows ? at(outer, inner) : at(inner, outer);
    }
  }
}

// out = sums, or out += sums.
template <class O>
void round_sums(const float* sums, int64_t sums_stride, O* out, int64_t stride, int64_t rows,
                int64_t columns, bool add) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += kWidth) {
      const float* at = sums + i * sums_stride + j;
      put(out + i * stride + j, sums_at(at), sums_at(at + kLanes),
          std::min<int64_t>(kWidth, columns - j), add);
    }
  }
}

// Lines [begin, end) at depths [from, from + depth): share `i` of `shares` of it, cut where memory
// is not dense.
template <class T>
void prefetch_lines(Prefetcher& prefetcher, Operand<T> x, int64_t begin, int64_t end, int64_t from,
                    int64_t depth, int64_t i, int64_t shares) {
  const bool dense = x.depth == 1;
  const int64_t count = dense ? end - begin : depth, stride = dense ? x.line : x.depth;
  const int64_t first_row = count * i / shares, rows = count * (i + 1) / shares - first_row;
  const T* data = x.data + begin * x.line + from * x.depth + first_row * stride;
  prefetcher.add(reinterpret_cast<const char*>(data), stride * sizeof(T),
                 (dense ? depth : end - begin) * sizeof(T), rows);
}

struct Cell {
  int64_t top, bottom, left, right;

  Cell(const Grid& grid, int64_t i, int64_t m, int64_t n)
      : top(i / grid.columns * grid.height),
        bottom(std::min(m, top + grid.height)),
        left(i % grid.columns * grid.width),
        right(std::min(n, left + grid.width)) {}
  bool empty() const { return top >= bottom || left >= right; }
};

// All rows of a, packed once for every thread: one part of the depth after another, `of_part` words
// each.
template <class T>
void pack_rows(Operand<T> a, int64_t m, Depth depth, uint32_t* out, int64_t of_part, Team team) {
  const int64_t share = parts_of(parts_of(m, kHeight), team.threads) * kHeight;
  team.run(team.threads, [&](int64_t thread) {
    const int64_t begin = std::min(m, share * thread), end = std::min(m, begin + share);
    for (int64_t part = 0; part < depth.parts(); ++part) {
      const int64_t from = part * depth.size, here = depth.at(from);
      const int64_t offset = begin / kHeight * panel<kHeight>(parts_of(here, in_word<T>));
      pack<kHeight>(a, begin, end, from, here, out + part * of_part + offset);
    }
  });
}

template <class T, class O>
void by_cells(const Gemm<T, O>& g, Team team) {
  const Depth depth = depth_of<T>(g.k);
  const int64_t words = depth.size / in_word<T>;
  const bool waits =
      sizeof(O) < 4 && depth.cut();  // the sums, in float32, for the rounding at their end
  const int64_t max_width = std::max<int64_t>(kWidth, kColumnBytes / (4 * words));
  const Grid grid(g.m, g.n, waits ? kHeightOfSums : kHeightAtMost, max_width, team.threads);
  const int64_t max_height = std::max<int64_t>(1, kBlockBytes / (4 * words * kHeight)) * kHeight;
  const int64_t block =
      parts_of(grid.height / kHeight, parts_of(grid.height, max_height)) * kHeight;
  // each thread would pack the same rows for each of its columns of cells
  const int64_t of_part_of_rows = parts_of(g.m, kHeight) * panel<kHeight>(words);
  const int64_t of_all_rows = depth.parts() * of_part_of_rows;
  const bool shares = grid.columns > team.threads && 4 * of_all_rows <= kSharedBytes;
  const int64_t of_columns = grid.width / kWidth * panel<kWidth>(words);
  const int64_t of_rows = shares ? 0 : Scratch::lines(block / kHeight * panel<kHeight>(words));
  Scratch& scratch = Scratch::of_this_thread();
  scratch.reserve(shares ? of_all_rows : 0,
                  of_columns + of_rows + (waits ? grid.height * grid.width : 0), team.threads);
  uint32_t* const all_rows = scratch.shared();
  if (shares) pack_rows(g.a, g.m, depth, all_rows, of_part_of_rows, team);
  team.run(team.threads, [&](int64_t thread) {
    uint32_t *const columns = scratch.of(thread), *const rows = columns + of_columns;
    float* const sums = reinterpret_cast<float*>(rows + of_rows);
    const int64_t of_thread = grid.cells / team.threads, last = of_thread * (thread + 1) - 1;
    for (int64_t i = of_thread * thread; i <= last; ++i) {
      const Cell cell(grid, i, g.m, g.n), after(grid, std::min(i + 1, last), g.m, g.n);
      if (cell.empty()) continue;
      const auto [top, bottom, left, right] = cell;
      const int64_t blocks = parts_of(bottom - top, block);
      for (int64_t from = 0; from < g.k; from += depth.size) {
        const int64_t here = depth.at(from), next = from + depth.size, there = depth.at(next);
        pack<kWidth>(g.b, left, right, from, here, columns);
        for (int64_t j = 0; j < blocks; ++j) {
          const int64_t begin = top + j * block, end = std::min(bottom, begin + block);
          Prefetcher prefetcher;
          if (!shares) {
            pack<kHeight>(g.a, begin, end, from, here, rows);
            if (j + 1 < blocks) {
              prefetch_lines(prefetcher, g.a, end, std::min(bottom, end + block), from, here, 0, 1);
            } else {
              prefetch_lines(prefetcher, g.a, top, std::min(bottom, top + block), next, there, 0,
                             1);
            }
          }
          if (there > 0) {
            prefetch_lines(prefetcher, g.b, left, right, next, there, j, blocks);
          } else if (i < last) {
            prefetch_lines(prefetcher, g.b, after.left, after.right, 0, depth.at(0), j, blocks);
          }
          const int64_t deep = parts_of(here, in_word<T>);
          const uint32_t* const of_part = all_rows + from / depth.size * of_part_of_rows;
          const uint32_t* const packed =
              shares ? of_part + begin / kHeight * panel<kHeight>(deep) : rows;
          if (waits) {
            multiply<T>(packed, end - begin, columns, right - left, deep,
                        sums + (begin - top) * grid.width, grid.width, from > 0, false, prefetcher);
          } else {
            multiply<T>(packed, end - begin, columns, right - left, deep,
                        g.out + begin * g.stride + left, g.stride, g.add || from > 0, !depth.cut(),
                        prefetcher);
          }
        }
      }
      if (waits) {
        round_sums(sums, grid.width, g.out + top * g.stride + left, g.stride, bottom - top,
                   right - left, g.add);
      }
    }
  });
}

#ifdef NITP_GEMM_OF_FLOAT
void gemm(const Gemm<float, float>& args, Team team) { by_cells(args, team); }
#endif
#ifdef NITP_GEMM_OF_BFLOAT16
void gemm(const Gemm<bfloat16, bfloat16>& args, Team team) { by_cells(args, team); }
void gemm(const Gemm<bfloat16, float>& args, Team team) { by_cells(args, team); }
#endif

}  // namespace NITP_TARGET
}  // namespace nitp
#endif
