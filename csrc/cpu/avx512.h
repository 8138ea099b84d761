// The processor's own instructions.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 about its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
