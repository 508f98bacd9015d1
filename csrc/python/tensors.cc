// SPDX-License-Identifier: Apache-2.0
#include "python/tensors.h"

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/stream.h"

namespace py = pybind11;

namespace fullbeam {
namespace {

// The DLPack ABI (version 0.x capsules, "dltensor"), as its specification lays it out.
struct DlDevice {
  std::int32_t type, id;
};
struct DlDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t num_dims;
  DlDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};
// What a type offers at __dlpack_c_exchange_api__ from version 1.3 on; `view` borrows all from the
// array, and may be null. Both functions return 0, or set a Python error.
struct DlExchangeApi {
  std::uint32_t major, minor;
  const void* previous;
  void *allocate, *export_array, *import_array;
  int (*view)(void* array, DlTensor* out);
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};
constexpr int kDlCpu = 1, kDlCuda = 2, kDlCudaHost = 3;
constexpr int kDlInt = 0, kDlUInt = 1, kDlFloat = 2, kDlBFloat = 4;

DType parse_dtype(int code, int bits) {
  if (code == kDlFloat && bits == 32) return DType::f32;
  if (code == kDlFloat && bits == 16) return DType::f16;
  if (code == kDlFloat && bits == 64) return DType::f64;
  if (code == kDlBFloat && bits == 16) return DType::bf16;
  if (code == kDlInt && bits == 32) return DType::i32;
  if (code == kDlInt && bits == 64) return DType::i64;
  if (code == kDlUInt && bits == 32) return DType::u32;
  if (code == kDlUInt && bits == 64) return DType::u64;
  if (code == kDlUInt && bits == 8) return DType::u8;
  throw TypeError(
      "must have dtype float32, float16, bfloat16, float64, int32, int64, uint32, uint64 or "
      "uint8, got DLPack code " +
      std::to_string(code) + " with " + std::to_string(bits) + " bits");
}

int code_of_kind(char kind) {
  switch (kind) {
    case 'f':
      return kDlFloat;
    case 'i':
      return kDlInt;
    case 'u':
      return kDlUInt;
    default:
      return -1;
  }
}

// What is the same for all arrays of a type.
struct ArrayType {
  const DlExchangeApi* api;  // null: only the protocol's Python methods
  bool is_torch;
};

// The device of the CUDA arrays that this thread has seen since its last op.
struct CallDevice {
  const ArrayType* type;  // null: there were none
  int idx;
};
thread_local CallDevice call_device{};

void set_dims(TensorView& view, std::int64_t num_dims) {
  if (num_dims > TensorView::kMaxDims) {
    throw std::invalid_argument("array: dimensions must be at most 4, got " +
                                std::to_string(num_dims));
  }
  view.num_dims = static_cast<int>(num_dims);
}

void from_numpy(py::handle source, TensorView& view) {
  const auto array = py::reinterpret_borrow<py::array>(source);
  const py::dtype dtype = array.dtype();
  if (dtype.byteorder() == '>') throw TypeError("must be little-endian, got big-endian");
  view.dtype = parse_dtype(code_of_kind(dtype.kind()), static_cast<int>(dtype.itemsize()) * 8);
  view.device = kHostDevice;
  view.is_writable = array.writeable();
  view.data = const_cast<void*>(array.data());
  set_dims(view, array.ndim());
  for (int i = 0; i < view.num_dims; ++i) {
    if (array.strides(i) % dtype.itemsize() != 0) {
      throw std::invalid_argument("array: strides must be multiples of the item size, got " +
                                  std::to_string(array.strides(i)));
    }
    view.shape[i] = array.shape(i);
    view.strides[i] = array.strides(i) / dtype.itemsize();
  }
}

const ArrayType& type_of(py::handle source) {
  // Guarded by the interpreter's lock; entries keep their addresses.
  static auto* known = new std::unordered_map<PyObject*, ArrayType>;  // never freed
  const py::handle type = py::type::handle_of(source);
  const auto found = known->find(type.ptr());
  if (found != known->end()) return found->second;
  ArrayType entry{nullptr, py::hasattr(type, "is_cuda")};
  if (py::hasattr(type, "__dlpack_c_exchange_api__")) {
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    void* api = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (api == nullptr) throw py::error_already_set();
    entry.api = static_cast<const DlExchangeApi*>(api);
    if (entry.api->major != 1 || entry.api->view == nullptr) entry.api = nullptr;
  }
  type.inc_ref();  // its address stays its own
  return known->emplace(type.ptr(), entry).first->second;
}

void from_dltensor(const DlTensor& t, const ArrayType& type, TensorView& view) {
  const int device = t.device.type;
  if (device != kDlCpu && device != kDlCuda && device != kDlCudaHost) {
    throw TypeError("must be on a CPU or a CUDA device, got DLPack device type " +
                    std::to_string(device));
  }
  if (t.dtype.lanes != 1)
    throw TypeError("must have a dtype of one lane, got " + std::to_string(t.dtype.lanes));
  view.dtype = parse_dtype(t.dtype.code, t.dtype.bits);
  view.device = device == kDlCuda ? Device::cuda : kHostDevice;
  view.device_idx = device == kDlCuda ? t.device.id : 0;
  if (device == kDlCuda) call_device = {&type, t.device.id};
  view.is_writable = true;
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  set_dims(view, t.num_dims);
  std::int64_t dense = 1;
  for (int i = view.num_dims - 1; i >= 0; --i) {
    view.shape[i] = t.shape[i];
    view.strides[i] = t.strides == nullptr ? dense : t.strides[i];
    dense *= t.shape[i];
  }
  if (t.data == nullptr && dense != 0)
    throw TypeError("must have memory, got none, as a fake tensor has");
}

// Fast, but without the protocol's checks: false for an array that needs them, which a torch tensor
// without a gradient doesn't, on the CPU and on CUDA devices.
bool from_exchange_api(py::handle source, const ArrayType& type, TensorView& view) {
  if (type.api == nullptr || !type.is_torch) return false;
  static auto* requires_grad = new py::str("requires_grad");  // never freed
  if (source.attr(*requires_grad).ptr() == Py_True) return false;
  DlTensor t;
  if (type.api->view(source.ptr(), &t) != 0) {
    PyErr_Clear();  // the protocol says it better
    return false;
  }
  if (t.device.type != kDlCpu && t.device.type != kDlCuda) return false;
  from_dltensor(t, type, view);
  return true;
}

void from_dlpack(py::handle source, const ArrayType& type, TensorView& view, py::object& owner) {
  // The producer must not wait: CUDA ops go to its own current stream (torch's), or it has the
  // default stream, number 1 of the protocol, wait for its work.
  const bool is_cuda =
      source.attr("__dlpack_device__")().cast<std::pair<int, int>>().first == kDlCuda;
  const py::object capsule =
      is_cuda ? source.attr("__dlpack__")(py::arg("stream") = type.is_torch ? -1 : 1)
              : source.attr("__dlpack__")();
  auto* managed = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (managed == nullptr) throw py::error_already_set();
  from_dltensor(managed->tensor, type, view);
  owner = capsule;  // an unconsumed capsule frees the tensor itself when it goes
}

void read_view(py::handle source, TensorView& view, py::object& owner) {
  if (py::isinstance<py::array>(source)) {
    from_numpy(source, view);
    owner = py::reinterpret_borrow<py::object>(source);
    return;
  }
  const ArrayType& type = type_of(source);
  if (from_exchange_api(source, type, view)) {
    owner = py::reinterpret_borrow<py::object>(source);
  } else if (py::hasattr(source, "__dlpack__")) {
    from_dlpack(source, type, view, owner);
  } else {
    throw TypeError("must be a numpy array or support __dlpack__, got " +
                    std::string(py::str(py::type::of(source).attr("__name__"))));
  }
}

}  // namespace

void view_of(py::handle source, TensorView& view, py::object& owner) {
  try {
    read_view(source, view, owner);
  } catch (const TypeError& error) {
    view.fault = error.what();
  }
}

bool set_current_stream() {
  if (call_device.type == nullptr) return false;
  const auto [type, idx] = std::exchange(call_device, {});
  void* handle = nullptr;
  if (type->is_torch && type->api != nullptr && type->api->current_stream != nullptr) {
    if (type->api->current_stream(kDlCuda, idx, &handle) != 0) throw py::error_already_set();
  } else if (type->is_torch) {
    static auto* ask = new py::object(
        py::module_::import("torch._C").attr("_cuda_getCurrentRawStream"));  // never freed
    handle = reinterpret_cast<void*>((*ask)(idx).cast<std::uintptr_t>());
  }
  current_stream() = {handle, idx};
  return true;
}

}  // namespace fullbeam
