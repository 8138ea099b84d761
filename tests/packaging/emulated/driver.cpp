// Runs one operator of a libnitp_ops.so without torch: this program is the torch that the library
// asks for.
//
//   driver LIBRARY FILE      FILE holds the operator's name and arguments; its tensors are
//   overwritten with the results
//
// Layout, all numbers of 8 bytes: length of the name, the name, number of arguments; each argument
// is a kind (0 none, 1 the 64 bits of a stack slot, 2 a tensor, 3 an optional tensor), then for a
// tensor the code of its dtype, the number of sizes, the sizes, the bytes (dense).
#include <dlfcn.h>

#include <cstdio>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "torch_abi.h"

struct AtenTensorOpaque {
  int64_t dtype;
  std::vector<int64_t> sizes;
  char* data;

  int64_t stride(size_t dim) const {
    int64_t product = 1;
    for (size_t d = dim + 1; d < sizes.size(); ++d) product *= sizes[d];
    return product;
  }
  int64_t numel() const { return sizes.empty() ? 1 : stride(0) * sizes[0]; }
};

namespace {

using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);
std::map<std::string, Kernel> kernels;
std::string implemented;                      // the dispatch key whose kernels are being registered
constexpr size_t kBytes[] = {8, 4, 2, 2, 8};  // float64, float32, bfloat16, float16, int64

int64_t number(const char*& at) {
  int64_t value;
  std::memcpy(&value, at, 8);
  at += 8;
  return value;
}

AtenTensorOpaque* tensor(const char*& at) {
  auto* made = new AtenTensorOpaque{number(at), std::vector<int64_t>(number(at)), nullptr};
  for (int64_t& size : made->sizes) size = number(at);
  made->data = const_cast<char*>(at);
  at += made->numel() * kBytes[made->dtype];
  return made;
}

}  // namespace

extern "C" {
AOTITorchError aoti_torch_library_init_def(const char*, const char*, uint32_t,
                                           TorchLibraryHandle*) {
  return 0;
}
AOTITorchError aoti_torch_library_init_impl(const char*, const char* key, const char*, uint32_t,
                                            TorchLibraryHandle*) {
  implemented = key;
  return 0;
}
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char*) { return 0; }
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, Kernel kernel, uint64_t) {
  if (implemented == "CPU") kernels[name] = kernel;
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) { return delete tensor, 0; }
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** result) {
  return *result = tensor->data, 0;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* result) {
  return *result = static_cast<int64_t>(tensor->sizes.size()), 0;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* result) {
  return *result = tensor->numel(), 0;
}
AOTITorchError aoti_torch_get_size(AtenTensorHandle tensor, int64_t dim, int64_t* result) {
  return *result = tensor->sizes.at(dim), 0;
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle tensor, int64_t dim, int64_t* result) {
  return *result = tensor->stride(dim), 0;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* result) {
  return *result = static_cast<int32_t>(tensor->dtype), 0;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* result) {
  return *result = 0, 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* result) {
  return *result = 0, 0;
}
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle, bool* result) {
  return *result = true, 0;
}
int32_t aoti_torch_dtype_float64() { return 0; }
int32_t aoti_torch_dtype_float32() { return 1; }
int32_t aoti_torch_dtype_bfloat16() { return 2; }
int32_t aoti_torch_dtype_float16() { return 3; }
int32_t aoti_torch_dtype_int64() { return 4; }
size_t aoti_torch_dtype_element_size(int32_t dtype) { return kBytes[dtype]; }
int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_device_type_cuda() { return 1; }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return 1; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 1; }
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t,
                                  void (*part)(int64_t, int64_t, void*), void* context) {
  return part(begin, end, context), 0;
}
AOTITorchError torch_get_num_threads(uint32_t* result) { return *result = 1, 0; }
}

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  std::fstream file(arguments[2], std::ios::in | std::ios::out | std::ios::binary);
  std::string content((std::istreambuf_iterator<char>(file)), {});
  const char* at = content.data();
  const int64_t length = number(at);
  const std::string name(at, length);
  at += length;
  std::vector<StableIValue> stack(number(at));
  for (StableIValue& slot : stack) {
    switch (number(at)) {
      case 0: slot = 0; break;
      case 1: slot = static_cast<StableIValue>(number(at)); break;
      case 2: slot = reinterpret_cast<StableIValue>(tensor(at)); break;
      case 3:
        slot = reinterpret_cast<StableIValue>(
            new StableIValue(reinterpret_cast<StableIValue>(tensor(at))));
    }
  }
  try {
    kernels.at(name)(stack.data(), stack.size(), 0);
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s: %s\n", name.c_str(), error.what()), 1;
  }
  file.clear();
  file.seekp(0);
  file.write(content.data(), static_cast<std::streamsize>(content.size()));
}
