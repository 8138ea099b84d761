// The CUDA row kernels as plain C++: each overload starts its kernel on a stream of the current device and returns.
#pragma once
#include "../arguments.h"

namespace nitp {
namespace cuda {

template <class T>
void run(const SwigluRows<T>&, int64_t rows, void* stream);
template <class T>
void run(const SwigluRowsBackward<T>&, int64_t rows, void* stream);
template <class T, class A>
void run(const AccumulateRows<T, A>&, int64_t rows, void* stream);
template <class T, class Out, class A>
void run(const ScaleRows<T, Out, A>&, int64_t rows, void* stream);
template <class P, class Z, class A>
void run(const AlignmentRows<P, Z, A>&, int64_t rows, void* stream);
template <class T, class A>
void run(const CrossEntropyRows<T, A>&, int64_t rows, void* stream);
template <class T, class A>
void run(const CrossEntropyGradientRows<T, A>&, int64_t rows, void* stream);

}  // namespace cuda
}  // namespace nitp
