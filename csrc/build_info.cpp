// What this build is, as JSON: cuda, cuda_architectures, compiler, flags, commit and the
// assembler's report of every CUDA kernel (registers per thread; bytes of static shared memory per
// block, of stack and of spills per thread).
extern "C" __attribute__((visibility("default"))) const char* nitp_ops_build_info() {
  return
#include <build_info.inc>
      ;
}
