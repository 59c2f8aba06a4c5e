// A "cuda" device for a torch that was built for the CPU. Its memory is the host's and its arithmetic is the CPU's, but tensors say cuda:N
// to C++ and Python alike. Operators refuse tensors of two devices, fresh memory is 0xFF (NaN), the backward pass runs in autograd's device
// thread, and whatever would make the host wait for a real device is reported to a Python function.
//
// Not shown: asynchrony, streams that run beside each other, real kernels, NCCL, speed.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorUtils.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;
using c10::Stream;

thread_local DeviceIndex current = 0;
thread_local std::map<DeviceIndex, c10::StreamId> streams;
std::atomic<DeviceIndex> device_count{4};
std::atomic<c10::StreamId> last_stream{0};

// What is reported: waits of the host to `observer`, and how often each operator was called.

PyObject* observer = nullptr;
std::atomic<bool> counting{false};
std::mutex counts_lock;
std::map<std::string, long> counts;

void report(const char* kind, const std::string& what) {
  if (observer == nullptr) return;
  pybind11::gil_scoped_acquire gil;
  try {
    const pybind11::handle function(observer);
    function(pybind11::str(kind), pybind11::str(what));
  } catch (pybind11::error_already_set& error) {
    error.restore();
    PyErr_Print();
  }
}

void count(const std::string& name) {
  if (!counting) return;
  std::lock_guard<std::mutex> held(counts_lock);
  counts[name]++;
}

// Devices and streams. A stream is a number: whatever is given to one has happened when the call returns.

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  DeviceType type() const override { return static_type; }
  Device getDevice() const override { return Device(static_type, current); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return device_count; }

  DeviceIndex index_of(Device device) const { return device.index() < 0 ? current : device.index(); }
  Stream stream(DeviceIndex index, c10::StreamId id) const { return Stream(Stream::UNSAFE, Device(static_type, index), id); }
  Stream getStream(Device device) const override { return stream(index_of(device), streams[index_of(device)]); }
  Stream getDefaultStream(Device device) const override { return stream(index_of(device), 0); }
  Stream getNewStream(Device device, int) const override { return stream(index_of(device), ++last_stream); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream exchangeStream(Stream to) const override {
    const Stream before = getStream(to.device());
    streams[index_of(to.device())] = to.id();
    return before;
  }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { report("synchronize", "stream"); }

  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override { report("synchronize", "event"); }
  void synchronizeDevice(const DeviceIndex) const override { report("synchronize", "device"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// Memory. Each device counts its own bytes, now and at most.

struct Bytes {
  std::atomic<int64_t> now{0}, most{0};
};
Bytes bytes_of[64];

struct Block {
  DeviceIndex device;
  int64_t bytes;
};
std::mutex blocks_lock;
std::map<void*, Block> blocks;

struct DeviceAllocator final : public c10::Allocator {
  static void release(void* data) {
    std::lock_guard<std::mutex> held(blocks_lock);
    const auto found = blocks.find(data);
    if (found != blocks.end()) {
      bytes_of[found->second.device].now -= found->second.bytes;
      blocks.erase(found);
    }
    std::free(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    const size_t rounded = (bytes + 511) / 512 * 512;
    void* data = bytes ? std::aligned_alloc(512, rounded) : nullptr;
    if (data) {
      std::memset(data, 0xFF, bytes);
      std::lock_guard<std::mutex> held(blocks_lock);
      blocks[data] = {current, static_cast<int64_t>(rounded)};
      Bytes& used = bytes_of[current];
      used.now += static_cast<int64_t>(rounded);
      used.most = std::max(used.most.load(), used.now.load());
    }
    return {data, data, &release, Device(DeviceType::CUDA, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceAllocator device_allocator;

void resize_bytes(const c10::Storage& storage, size_t bytes) {
  c10::DataPtr fresh = device_allocator.allocate(bytes);
  if (bytes && storage.nbytes()) std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
  if (storage.nbytes()) std::memset(storage.mutable_data_ptr().get(), 0xFE, storage.nbytes());  // for whoever still reads the old memory
  storage.set_data_ptr_noswap(std::move(fresh));
  storage.set_nbytes(bytes);
}

// The same memory under the name of another device.

void release_storage(void* kept) {
  delete static_cast<c10::Storage*>(kept);
}

c10::Storage alias(const c10::Storage& storage, Device device, c10::Allocator* allocator) {
  auto* kept = new c10::Storage(storage);
  c10::DataPtr data(storage.mutable_data_ptr().get(), kept, &release_storage, device);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, true);
}

Tensor tensor_over(c10::Storage&& storage, c10::DispatchKey key, const Tensor& like) {
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) made._set_conj(true);
  return made;
}

bool on_device(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == DeviceType::CUDA;
}

Tensor as_cpu(const Tensor& tensor) {
  if (!on_device(tensor)) return tensor;
  auto storage = alias(tensor.storage(), Device(DeviceType::CPU), c10::GetAllocator(DeviceType::CPU));
  return tensor_over(std::move(storage), c10::DispatchKey::CPU, tensor);
}

// Every operator without a kernel below runs the CPU's kernel on aliases of its arguments.

struct Aliased {
  Tensor device, cpu;
};

Tensor as_device(const Tensor& tensor, const std::vector<Aliased>& given) {
  if (!tensor.defined() || tensor.device().type() != DeviceType::CPU) return tensor;
  for (const auto& pair : given) {
    if (tensor.is_same(pair.cpu)) return pair.device;
    const void* data = tensor.storage().data();
    if (data != nullptr && pair.cpu.storage().data() == data) {
      return tensor_over(c10::Storage(pair.device.storage()), c10::DispatchKey::CUDA, tensor);
    }
  }
  return tensor_over(alias(tensor.storage(), Device(DeviceType::CUDA, current), &device_allocator), c10::DispatchKey::CUDA, tensor);
}

struct Arguments {
  std::string name;
  std::vector<Aliased> given;
  std::vector<Tensor> of_host;

  IValue to_cpu(const IValue& value) {
    if (value.isTensor()) {
      const Tensor tensor = value.toTensor();
      if (!on_device(tensor)) {
        if (tensor.defined()) of_host.push_back(tensor);
        return value;
      }
      given.push_back({tensor, as_cpu(tensor)});
      return given.back().cpu;
    }
    if (value.isGenerator()) {
      TORCH_CHECK(
          value.toGenerator().device().type() == DeviceType::CUDA, "mock cuda: ", name,
          ": expected a generator of the device 'cuda', found one of 'cpu'");
    }
    if (value.isDevice() && value.toDevice().type() == DeviceType::CUDA) return IValue(Device(DeviceType::CPU));
    if (value.isList()) {
      const auto list = value.toList();
      auto converted = c10::impl::GenericList(list.elementType());
      converted.reserve(list.size());
      for (size_t i = 0; i < list.size(); i++) converted.push_back(to_cpu(list.get(i)));
      return converted;
    }
    return value;
  }

  IValue to_device(const IValue& value) const {
    if (value.isTensor()) return as_device(value.toTensor(), given);
    if (value.isList()) {
      const auto list = value.toList();
      auto converted = c10::impl::GenericList(list.elementType());
      for (size_t i = 0; i < list.size(); i++) converted.push_back(to_device(list.get(i)));
      return converted;
    }
    return value;
  }
};

const std::set<std::string> WAITING = {
    "aten::nonzero", "aten::nonzero_numpy", "aten::masked_select", "aten::bincount", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal", "aten::is_nonzero"};
const std::set<std::string> INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};

// Real operators refuse a tensor of another device, but for numbers in tensors without dimensions and for indices, which are copied.
void check_devices(const Arguments& arguments) {
  if (arguments.given.empty()) return;
  const bool indexes = INDEXING.count(arguments.name) > 0;
  for (const auto& tensor : arguments.of_host) {
    if (tensor.dim() == 0) continue;
    TORCH_CHECK(
        indexes, "mock cuda: ", arguments.name, ": expected all tensors on one device, found ", tensor.sizes(), " on cpu and others on ",
        arguments.given[0].device.device());
    report("H2D blocking", arguments.name + " by an index of the host");
  }
  for (const auto& pair : arguments.given) {
    TORCH_CHECK(
        pair.device.device() == arguments.given[0].device.device(), "mock cuda: ", arguments.name, ": expected all tensors on one device, found ",
        pair.device.device(), " and ", arguments.given[0].device.device());
  }
}

void report_waits(const Arguments& arguments) {
  const auto& name = arguments.name;
  if (WAITING.count(name)) report("waits", name);
  if (!INDEXING.count(name)) return;
  for (const auto& pair : arguments.given) {
    if (pair.device.scalar_type() == at::kBool && !pair.device.is_same(arguments.given[0].device)) report("waits", name + " by a mask");
  }
}

// An `out` tensor may have got other sizes or other memory.
void adopt_changes(const Arguments& arguments) {
  for (const auto& pair : arguments.given) {
    if (pair.cpu.storage().data() != pair.device.storage().data()) {
      auto storage = alias(pair.cpu.storage(), pair.device.device(), &device_allocator);
      pair.device.storage().set_data_ptr_noswap(std::move(storage.mutable_data_ptr()));
      pair.device.storage().set_nbytes(pair.cpu.storage().nbytes());
    }
    if (pair.cpu.sizes() != pair.device.sizes() || pair.cpu.strides() != pair.device.strides()) {
      pair.device.unsafeGetTensorImpl()->set_sizes_and_strides(pair.cpu.sizes(), pair.cpu.strides(), pair.cpu.storage_offset());
    }
  }
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t num_arguments = schema.arguments().size();
  Arguments arguments{schema.name(), {}, {}};
  count(arguments.name);
  torch::jit::Stack inner;
  for (const auto& value : torch::jit::last(stack, num_arguments).vec()) inner.push_back(arguments.to_cpu(value));
  check_devices(arguments);
  report_waits(arguments);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(&inner);
  }
  adopt_changes(arguments);
  torch::jit::drop(*stack, num_arguments);
  for (const auto& value : inner) stack->push_back(arguments.to_device(value));
}

// Kernels of the device's own: making, copying, viewing.

class OnDevice {
 public:
  explicit OnDevice(std::optional<Device> device) : before_(current) {
    if (device && device->index() >= 0) current = device->index();
  }
  ~OnDevice() { current = before_; }

 private:
  DeviceIndex before_;
};

Tensor make_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>) {
  const OnDevice here(device);
  const auto type = c10::dtype_or_default(dtype);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), type);
}

Tensor make_empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const OnDevice here(device);
  const auto type = c10::dtype_or_default(dtype);
  return at::detail::empty_generic(size, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), type, format);
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  const bool to = on_device(self), from = on_device(source);
  count(to ? (from ? "copy_ D2D" : "copy_ H2D") : "copy_ D2H");
  if (self.numel() && to && !from) {
    // An asynchronous copy from pageable memory may wait for what the stream has to do; a number in a tensor without dimensions, too.
    report(!non_blocking ? "H2D blocking" : source.is_pinned() ? "H2D pinned" : "H2D pageable", "copy_");
  }
  if (self.numel() && !to && from) report(non_blocking && self.is_pinned() ? "D2H pinned" : "D2H", "copy_");
  Tensor target = as_cpu(self);
  target.copy_(as_cpu(source));
  return self;
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  Tensor to = target;
  copy_(to, source, non_blocking);
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

c10::Scalar local_scalar(const Tensor& self) {
  report("item", "_local_scalar_dense");
  return at::_local_scalar_dense(as_cpu(self));
}

Tensor strided_view(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  Tensor view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(self.storage_offset()));
  return view;
}

Tensor sized_view(const Tensor& self, c10::IntArrayRef size) {
  const std::vector<int64_t> inferred = at::infer_size(size, self.numel());
  const auto stride = at::detail::computeStride(self.sizes(), self.strides(), inferred);
  TORCH_CHECK(stride.has_value(), "view size is not compatible with the input tensor's size and stride");
  return strided_view(self, inferred, *stride, self.storage_offset());
}

Tensor reshape_alias(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return strided_view(self, size, stride, self.storage_offset());
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  self.unsafeGetTensorImpl()->generic_set_sizes_contiguous(size);
  const size_t needed = (self.storage_offset() + self.numel()) * self.itemsize();
  if (needed > self.storage().nbytes()) resize_bytes(self.storage(), needed);
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  std::vector<int64_t> strides(stride.begin(), stride.end());
  if (strides.empty() && !size.empty()) {
    strides.resize(size.size());
    int64_t step = 1;
    for (int dim = static_cast<int>(size.size()) - 1; dim >= 0; dim--) {
      strides[dim] = step;
      step *= size[dim];
    }
  }
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, strides, offset);
  return self;
}

Tensor& set_whole(Tensor& self, c10::Storage storage) {
  return set_storage(self, storage, 0, {static_cast<int64_t>(storage.nbytes() / self.itemsize())}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// CUDA counts whole numbers, which the CPU refuses.
Tensor histc(const Tensor& self, int64_t bins, const c10::Scalar& min, const c10::Scalar& max) {
  count("aten::histc");
  const Tensor values = as_cpu(self);
  const Tensor counts = at::isIntegralType(values.scalar_type(), false)
      ? at::histc(values.to(at::kDouble), bins, min, max).to(values.scalar_type())
      : at::histc(values, bins, min, max);
  return as_device(counts, {});
}

// CUDA has kernels of its own for RMS norms, one in each pass, which compute in float32 or wider. These, too, go through the rows once: the
// host's time for an operator should be one operator's.
using Pair = std::tuple<Tensor, Tensor>;

Pair rms_norm(const Tensor& input, c10::IntArrayRef shape, const std::optional<Tensor>& weight, std::optional<double> eps) {
  count("aten::_fused_rms_norm");
  TORCH_CHECK(shape.size() == 1 && weight && eps, "mock cuda: norms of one dimension, with a weight and an epsilon, are all it has");
  const Tensor x = as_cpu(input).contiguous(), w = as_cpu(*weight).contiguous(), y = at::empty_like(x);
  auto sizes = x.sizes().vec();
  sizes.back() = 1;
  const Tensor inverse = at::empty(sizes, x.options().dtype(at::toOpMathType(x.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "rms_norm", [&] {
    using Wide = at::opmath_type<scalar_t>;
    const auto *xs = x.const_data_ptr<scalar_t>(), *ws = w.const_data_ptr<scalar_t>();
    auto *ys = y.mutable_data_ptr<scalar_t>();
    auto *inverses = inverse.mutable_data_ptr<Wide>();
    const int64_t width = shape[0], rows = inverse.numel();
    for (int64_t row = 0; row < rows; row++, xs += width, ys += width) {
      Wide squares = 0;
      for (int64_t i = 0; i < width; i++) squares += Wide(xs[i]) * Wide(xs[i]);
      inverses[row] = 1 / std::sqrt(squares / width + static_cast<Wide>(*eps));
      for (int64_t i = 0; i < width; i++) ys[i] = Wide(xs[i]) * inverses[row] * Wide(ws[i]);
    }
  });
  return {as_device(y, {}), as_device(inverse, {})};
}

Pair rms_norm_backward(
    const Tensor& gradient, const Tensor& input, c10::IntArrayRef shape, const Tensor& inverse, const std::optional<Tensor>& weight,
    std::array<bool, 2> wanted) {
  count("aten::_fused_rms_norm_backward");
  const Tensor x = as_cpu(input).contiguous(), dy = as_cpu(gradient).contiguous(), w = as_cpu(*weight).contiguous();
  const Tensor dx = at::empty_like(x), dw = at::zeros({shape[0]}, as_cpu(inverse).options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "rms_norm_backward", [&] {
    using Wide = at::opmath_type<scalar_t>;
    const auto *xs = x.const_data_ptr<scalar_t>(), *dys = dy.const_data_ptr<scalar_t>(), *ws = w.const_data_ptr<scalar_t>();
    const auto *inverses = inverse.const_data_ptr<Wide>();
    auto *dxs = dx.mutable_data_ptr<scalar_t>();
    auto *dws = dw.mutable_data_ptr<Wide>();
    const int64_t width = shape[0], rows = inverse.numel();
    for (int64_t row = 0; row < rows; row++, xs += width, dys += width, dxs += width) {
      const Wide scale = inverses[row];
      Wide along = 0;
      for (int64_t i = 0; i < width; i++) {
        along += Wide(dys[i]) * Wide(ws[i]) * Wide(xs[i]) * scale;
        dws[i] += Wide(dys[i]) * Wide(xs[i]) * scale;
      }
      for (int64_t i = 0; i < width; i++) dxs[i] = scale * (Wide(dys[i]) * Wide(ws[i]) - Wide(xs[i]) * scale * along / width);
    }
  });
  return {wanted[0] ? as_device(dx, {}) : Tensor(), wanted[1] ? as_device(dw.to(x.scalar_type()), {}) : Tensor()};
}

void record_stream(Tensor&, Stream) {}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &make_empty);
  library.impl("empty_strided", &make_strided);
  library.impl("copy_", &copy_);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("as_strided", &strided_view);
  library.impl("view", &sized_view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("resize_", &resize_);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_whole);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("record_stream", &record_stream);
  // CUDA has kernels of its own that take many tensors at once; without these lines torch would take the tensors one by one.
  // torch warns of each kernel that replaces another.
  struct Silent : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  } silent;
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  const std::string many = "aten::_foreach_";
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.compare(0, many.size(), many) || name.overload_name.find("out") != std::string::npos) continue;
    const auto overload = name.overload_name.empty() ? "" : "." + name.overload_name;
    library.impl((name.name.substr(6) + overload).c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
  library.impl("histc", &histc);
  library.impl("_fused_rms_norm", &rms_norm);
  library.impl("_fused_rms_norm_backward", &rms_norm_backward);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  c10::SetAllocator(DeviceType::CUDA, &device_allocator);
  module.def("observe", [](pybind11::object function) { observer = function.is_none() ? nullptr : function.release().ptr(); });
  module.def("as_cpu", &as_cpu);
  module.def("count_operators", [](bool on) {
    std::lock_guard<std::mutex> held(counts_lock);
    counting = on;
    if (on) counts.clear();
  });
  module.def("operators", [] {
    std::lock_guard<std::mutex> held(counts_lock);
    return counts;
  });
  module.def("current_device", [] { return static_cast<int>(current); });
  module.def("set_device", [](int index) { current = static_cast<DeviceIndex>(index); });
  module.def("device_count", [] { return static_cast<int>(device_count.load()); });
  module.def("set_device_count", [](int number) { device_count = static_cast<DeviceIndex>(number); });
  module.def("memory", [](int index) { return std::pair(bytes_of[index].now.load(), bytes_of[index].most.load()); });
  module.def("reset_peak_memory", [](int index) { bytes_of[index].most = bytes_of[index].now.load(); });
  module.def("resize_storage", [](const Tensor& tensor, int64_t bytes) { resize_bytes(tensor.storage(), bytes); });
}
