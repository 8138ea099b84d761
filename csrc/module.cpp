// nitp_ops._C: what this build is. The operators live in libnitp_ops.so beside it, which both share.
#include <pybind11/pybind11.h>

#include <string>

extern "C" const char* nitp_ops_instruction_set();
extern "C" bool nitp_ops_choose_instruction_set(const char* name);
extern "C" bool nitp_ops_has_onednn_matmul();

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of nitp_ops. Import torch first: the operator library takes its symbols from torch.";
  m.def(
      "instruction_set", [] { return std::string(nitp_ops_instruction_set()); },
      "The CPU instruction set that the row kernels use: 'avx512', 'avx2' or 'portable'.");
  m.def(
      "choose_instruction_set",
      [](const std::string& name) {
        if (!nitp_ops_choose_instruction_set(name.c_str())) {
          throw pybind11::value_error("choose_instruction_set: name is '" + name +
                                      "', expected 'portable' or one that this CPU has");
        }
      },
      "Row kernels of a lesser instruction set, for the whole process: to test and to compare them.");
  m.def("has_onednn_matmul", &nitp_ops_has_onednn_matmul,
        "Whether float32 products on CPU go to oneDNN directly (else torch.mm decides).");
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = NITP_BUILD_TORCH;
        info["cuda"] = pybind11::none();
        info["cuda_architectures"] = pybind11::list();
        info["compiler"] = NITP_BUILD_COMPILER;
        info["flags"] = NITP_BUILD_FLAGS;
        info["commit"] = NITP_BUILD_COMMIT;
        return info;
      },
      "What the library was built with: torch, cuda, cuda_architectures, compiler, flags, commit.");
}
