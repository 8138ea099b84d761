// nitp_ops._C: what this build is. The operators live in libnitp_ops.so beside it, which both share.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

extern "C" const char* nitp_ops_instruction_set();
extern "C" bool nitp_ops_choose_instruction_set(const char* name);
extern "C" bool nitp_ops_has_gemm();

namespace {

struct Kernel {
  const char *name, *architecture;
  int registers, shared, stack, spills;
};

constexpr Kernel kKernels[] = {
#include <kernels.inc>
    {nullptr, nullptr, 0, 0, 0, 0},  // an array cannot be empty
};

pybind11::list words(const std::string& text) {
  pybind11::list list;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) list.append(word);
  return list;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of nitp_ops. Import torch first: the operator library takes its symbols from torch.";
  m.def(
      "instruction_set", [] { return std::string(nitp_ops_instruction_set()); },
      "The CPU instruction set that the row kernels and the products use: 'avx512_bf16', 'avx512', 'avx2' or "
      "'portable'.");
  m.def(
      "choose_instruction_set",
      [](const std::string& name) {
        if (!nitp_ops_choose_instruction_set(name.c_str())) {
          throw pybind11::value_error("choose_instruction_set: name is '" + name +
                                      "', expected 'portable' or one that this CPU has");
        }
      },
      "Row kernels and products of a lesser instruction set, for the whole process: to test and to compare them.");
  m.def("has_gemm", &nitp_ops_has_gemm, "Whether products of float32 and of bfloat16 on CPU are this library's own.");
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = NITP_BUILD_TORCH;
        const std::string cuda = NITP_BUILD_CUDA;
        info["cuda"] = cuda.empty() ? pybind11::object(pybind11::none()) : pybind11::str(cuda);
        info["cuda_architectures"] = words(NITP_BUILD_CUDA_ARCHITECTURES);
        info["compiler"] = NITP_BUILD_COMPILER;
        info["flags"] = NITP_BUILD_FLAGS;
        info["commit"] = NITP_BUILD_COMMIT;
        return info;
      },
      "What the library was built with: torch, cuda, cuda_architectures, compiler, flags, commit.");
  m.def(
      "kernels",
      [] {
        pybind11::list list;
        for (const Kernel& kernel : kKernels) {
          if (kernel.name == nullptr) break;
          pybind11::dict entry;
          entry["name"] = kernel.name;
          entry["architecture"] = kernel.architecture;
          entry["registers"] = kernel.registers;
          entry["shared"] = kernel.shared;
          entry["stack"] = kernel.stack;
          entry["spills"] = kernel.spills;
          list.append(entry);
        }
        return list;
      },
      "The CUDA kernels as the assembler reported them: name, architecture, registers a thread; bytes of static shared "
      "memory a block, of stack and of spills a thread. Empty without CUDA.");
}
