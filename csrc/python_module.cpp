// nitp_ops._C: the C functions of libnitp_ops.so as a Python module. A convenience: the package
// itself reads the same functions by ctypes and never imports this.
#include <pybind11/pybind11.h>

#include <string>

extern "C" const char* nitp_ops_instruction_set();
extern "C" bool nitp_ops_choose_instruction_set(const char* name);
extern "C" bool nitp_ops_has_gemm();
extern "C" const char* nitp_ops_build_info();

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() =
      "Build information of nitp_ops. Import torch first: the operator library takes its symbols "
      "from torch.";
  m.def(
      "instruction_set", [] { return std::string(nitp_ops_instruction_set()); },
      "The CPU instruction set that the row kernels and the GEMMs use: 'avx512_bf16', 'avx512', "
      "'avx2' or 'portable'.");
  m.def(
      "choose_instruction_set",
      [](const std::string& name) {
        if (!nitp_ops_choose_instruction_set(name.c_str())) {
          throw pybind11::value_error("choose_instruction_set: name is '" + name +
                                      "', expected 'portable' or one that this CPU has");
        }
      },
      "Row kernels and GEMMs of a lesser instruction set, for the whole process: to test and to "
      "compare them.");
  m.def("has_gemm", &nitp_ops_has_gemm,
        "Whether GEMMs of float32 and of bfloat16 on CPU are this library's own.");
  m.def(
      "build_info",
      [] { return pybind11::module_::import("json").attr("loads")(nitp_ops_build_info()); },
      "What the library was built with: cuda, cuda_architectures, compiler, flags, commit, "
      "kernels.");
}
