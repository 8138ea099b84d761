// The part of PyTorch's stable C interface that this library calls, declared here, and four small
// classes over it.
//
// No header of torch is included: the library compiles where no torch is installed, and loads in
// every torch >= 2.11. tests/kernels/test_torch_abi.py compiles these declarations beside torch's
// own: a difference is a compile error.
//
// A boxed kernel gets a stack of 64-bit slots. An int64, a bool or a double lies in its slot bit by
// bit, a tensor as a handle that the kernel owns, an optional as 0 or as the address of a slot that
// the kernel deletes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- torch's C functions. Each returns 0, or an error code after printing the reason.

struct AtenTensorOpaque;
struct DeviceGuardOpaque;
struct TorchLibraryOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using DeviceGuardHandle = DeviceGuardOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using AOTITorchError = int32_t;
using StableIValue = uint64_t;

#pragma GCC visibility push(default)
extern "C" {
AOTITorchError aoti_torch_library_init_def(const char* library, const char* file, uint32_t line,
                                           TorchLibraryHandle* result);
AOTITorchError aoti_torch_library_init_impl(const char* library, const char* dispatch_key,
                                            const char* file, uint32_t line,
                                            TorchLibraryHandle* result);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle library, const char* schema);
AOTITorchError torch_library_impl(TorchLibraryHandle library, const char* name,
                                  void (*kernel)(StableIValue*, uint64_t, uint64_t),
                                  uint64_t abi_version);

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** result);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* result);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* result);
AOTITorchError aoti_torch_get_size(AtenTensorHandle tensor, int64_t dim, int64_t* result);
AOTITorchError aoti_torch_get_stride(AtenTensorHandle tensor, int64_t dim, int64_t* result);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* result);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* result);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* result);
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle tensor, bool* result);

int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_int64();
size_t aoti_torch_dtype_element_size(int32_t dtype);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();

AOTITorchError aoti_torch_create_device_guard(int32_t device_index, DeviceGuardHandle* result);
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                  void (*part)(int64_t begin, int64_t end, void* context),
                                  void* context);
AOTITorchError torch_get_num_threads(uint32_t* result);
}
#pragma GCC visibility pop

namespace nitp {
namespace torch_abi {

// The oldest torch that the library asks for, 2.11.0: kernels get their arguments as that version
// passes them.
constexpr uint64_t kVersion = (uint64_t{2} << 56) | (uint64_t{11} << 48);

inline void append(std::string& text, const char* part) { text += part; }
inline void append(std::string& text, int64_t number) { text += std::to_string(number); }

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  throw std::runtime_error(text);
}

// The message is formatted only where the condition fails.
#define NITP_CHECK(condition, ...)                          \
  do {                                                      \
    if (!(condition)) ::nitp::torch_abi::fail(__VA_ARGS__); \
  } while (false)

inline void check(AOTITorchError code, const char* what) {
  NITP_CHECK(code == 0, "nitp_ops: torch's ", what, " returned ", int64_t{code});
}

// ---- Tensors

enum class ScalarType { Double, Float, BFloat16, Half, Long, Other };

class Tensor {
  std::shared_ptr<AtenTensorOpaque> handle_;

  template <class Result, class Function, class... Arguments>
  Result get(Function function, Arguments... arguments) const {
    Result result{};
    check(function(handle_.get(), arguments..., &result), "tensor accessor");
    return result;
  }

 public:
  explicit Tensor(AtenTensorHandle owned) : handle_(owned, aoti_torch_delete_tensor_object) {}

  void* data_ptr() const { return get<void*>(aoti_torch_get_data_ptr); }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  int64_t size(int64_t dim) const { return get<int64_t>(aoti_torch_get_size, dim); }
  int64_t stride(int64_t dim) const { return get<int64_t>(aoti_torch_get_stride, dim); }
  bool is_contiguous() const { return get<bool>(aoti_torch_is_contiguous); }
  bool is_cpu() const { return device_type() == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type() == aoti_torch_device_type_cuda(); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  int64_t element_size() const {
    return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype()));
  }

  ScalarType scalar_type() const {
    const int32_t code = dtype();
    if (code == aoti_torch_dtype_float32()) return ScalarType::Float;
    if (code == aoti_torch_dtype_bfloat16()) return ScalarType::BFloat16;
    if (code == aoti_torch_dtype_int64()) return ScalarType::Long;
    if (code == aoti_torch_dtype_float64()) return ScalarType::Double;
    if (code == aoti_torch_dtype_float16()) return ScalarType::Half;
    return ScalarType::Other;
  }

 private:
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type); }
};

// ---- From a stack of slots to a C++ function

template <class T>
struct Unboxed {
  static_assert(std::is_same_v<T, int64_t> || std::is_same_v<T, double> || std::is_same_v<T, bool>);
  static T from(StableIValue slot) {
    T value;
    std::memcpy(&value, &slot, sizeof value);  // little endian: the low bytes
    return value;
  }
};

template <>
struct Unboxed<Tensor> {
  static Tensor from(StableIValue slot) { return Tensor(reinterpret_cast<AtenTensorHandle>(slot)); }
};

template <class T>
struct Unboxed<std::optional<T>> {
  static std::optional<T> from(StableIValue slot) {
    const std::unique_ptr<StableIValue> inner(reinterpret_cast<StableIValue*>(slot));
    return inner ? std::optional<T>(Unboxed<T>::from(*inner)) : std::nullopt;
  }
};

template <auto function>
struct Boxed;

template <class... Arguments, void (*function)(Arguments...)>
struct Boxed<function> {
  static void run(StableIValue* stack, uint64_t, uint64_t) {
    unboxed(stack, std::index_sequence_for<Arguments...>{});
  }

 private:
  template <size_t... indices>
  static void unboxed(StableIValue* stack, std::index_sequence<indices...>) {
    std::tuple<Arguments...> owned{Unboxed<Arguments>::from(stack[indices])...};
    std::apply(function, std::move(owned));
  }
};

// ---- Registration, while the library loads

#ifndef NITP_LIBRARY
#define NITP_LIBRARY \
  "nitp_ops"  // torch.ops.nitp_ops; tests register the same kernels under another name
#endif

// Why an operator could not be registered, or empty. An exception in a static constructor would end
// the process.
std::string& registration_error();

class Library {
  TorchLibraryHandle handle_ = nullptr;

  void note(AOTITorchError code, const char* what, const char* name) {
    if (code != 0 && registration_error().empty()) {
      registration_error() = std::string(what) + " of " + name + " failed";
    }
  }

 public:
  using Fill = void(Library&);

  // dispatch_key: nullptr for the schemas. After a first failure nothing more is registered.
  Library(const char* name, const char* dispatch_key, Fill* fill) {
    if (!registration_error().empty()) return;
    if (dispatch_key == nullptr) {
      note(aoti_torch_library_init_def(name, __FILE__, __LINE__, &handle_), "definition", name);
    } else {
      note(aoti_torch_library_init_impl(name, dispatch_key, __FILE__, __LINE__, &handle_),
           "implementation", name);
    }
    if (registration_error().empty()) fill(*this);
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  void def(const char* schema) {
    note(aoti_torch_library_def(handle_, schema), "definition", schema);
  }

  template <auto function>
  void impl(const char* name) {
    note(torch_library_impl(handle_, name, Boxed<function>::run, kVersion), "implementation", name);
  }
};

// ---- Devices and threads

class DeviceGuard {
  DeviceGuardHandle handle_ = nullptr;

 public:
  explicit DeviceGuard(int32_t index) {
    check(aoti_torch_create_device_guard(index, &handle_), "device guard");
  }
  ~DeviceGuard() { aoti_torch_delete_device_guard(handle_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

template <class Function>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Function& function) {
  const auto part = [](int64_t from, int64_t to, void* context) {
    (*static_cast<const Function*>(context))(from, to);
  };
  check(torch_parallel_for(begin, end, grain, part, const_cast<Function*>(&function)),
        "parallel_for");
}

inline int64_t num_threads() {
  uint32_t threads = 0;
  check(torch_get_num_threads(&threads), "get_num_threads");
  return threads;
}

}  // namespace torch_abi
}  // namespace nitp
