// Operands of a GEMM in the order in which its tiles read them: panels of `Size` lines, in each
// panel word after word of depth, in each word line after line. Lines and depths that are not there
// are zeros.
#pragma once
#include "simd.h"

namespace nitp {
namespace NITP_TARGET {

NITP_HD int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Words from one panel to the next. With a depth of a power of two they would share sets of the
// caches but for the two lines more: packing the columns of bfloat16 dh took 1.5 and 1.9 cycles a
// word without them, 0.9 with. Their first words also take what a register holds more than the last
// word of a panel.
template <int Size>
NITP_HD int64_t panel(int64_t words) {
  return words * Size + 32;
}

// How far ahead of the loads the lines are fetched: in bytes along a line, in words across lines.
// Bfloat16 GEMMs took 0.97 of the libraries' time with it, 0.99 without (means over four shapes,
// one run each).
constexpr int64_t kAheadBytes = 256, kAheadWords = 8;

// `present` lines, dense along the depth, into the words of a panel.
template <int Size, class T>
NITP_HD void pack_lines(const T* lines, int64_t stride, int64_t present, int64_t depth,
                        uint32_t* into) {
  for (int64_t j = 0; j < depth;
       j += kLanes * in_word<T>, lines += kLanes * in_word<T>, into += kLanes * Size) {
    Words rows[kLanes];
    for (int64_t row = 0; row < kLanes; ++row) {
      rows[row] = no_words();
      if (row >= present) continue;
      rows[row] = load_line(lines + row * stride, depth - j);
      _mm_prefetch(reinterpret_cast<const char*>(lines + row * stride) + kAheadBytes, _MM_HINT_T0);
    }
    transpose(rows);
    const int64_t words = std::min<int64_t>(kLanes, parts_of(depth - j, in_word<T>));
    for (int64_t word = 0; word < words; ++word) put_words(into + word * Size, rows[word]);
  }
}

// Lines that are dense along the depth.
template <int Size, class T>
void pack_dense_lines(Operand<T> x, int64_t begin, int64_t end, int64_t from, int64_t depth,
                      uint32_t* out) {
  constexpr int64_t kWhole = std::min(Size, kLanes);
  for (int64_t i = begin; i < end; i += Size, out += panel<Size>(parts_of(depth, in_word<T>))) {
    for (int64_t part = 0; part < Size; part += kLanes) {
      const int64_t present = std::max<int64_t>(0, std::min(kWhole, end - i - part));
      const T* lines = x.data + (i + part) * x.line + from;
      if (present == kWhole) {  // a constant: no branches for lines that are not there
        pack_lines<Size>(lines, x.line, kWhole, depth, out + part);
      } else {
        pack_lines<Size>(lines, x.line, present, depth, out + part);
      }
    }
  }
}

// Lines that lie beside each other. All panels of a depth, then the next: their numbers are
// neighbours in memory.
template <int Size, class T>
void pack_neighbours(Operand<T> x, int64_t begin, int64_t end, int64_t from, int64_t depth,
                     uint32_t* out) {
  const int64_t next = panel<Size>(parts_of(depth, in_word<T>));
  const int64_t bytes = (end - begin) * static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < depth; j += in_word<T>) {
    const T* lines = x.data + begin + (from + j) * x.depth;
    for (int64_t row = kAheadWords * in_word<T>; row < (kAheadWords + 1) * in_word<T>; ++row) {
      const char* ahead = reinterpret_cast<const char*>(lines + row * x.depth);
      for (int64_t byte = 0; byte < bytes; byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T0);
    }
    uint32_t* into = out + j / in_word<T> * Size;
    for (int64_t i = begin; i < end; i += Size, lines += Size, into += next) {
      for (int64_t part = 0; part < Size; part += kLanes) {
        // lanes past the panel may hold lines of the next one: its own words overwrite them, or no
        // tile reads them
        const int64_t present = std::max<int64_t>(0, std::min<int64_t>(kLanes, end - i - part));
        put_words(into + part, load_words(lines + part, x.depth, j + 1 < depth, present));
      }
    }
  }
}

// The panels of lines [begin, end) at depths [from, from + depth).
template <int Size, class T>
void pack(Operand<T> x, int64_t begin, int64_t end, int64_t from, int64_t depth, uint32_t* out) {
  if (x.depth == 1) {
    pack_dense_lines<Size>(x, begin, end, from, depth, out);
  } else {
    pack_neighbours<Size>(x, begin, end, from, depth, out);
  }
}

}  // namespace NITP_TARGET
}  // namespace nitp
