// A CUDA device without a GPU, for CPU builds of torch.
//
// The kernels below are registered for torch's real CUDA dispatch key, so that `tensor.is_cuda`, the threads of the
// backward pass, autocast and GradScaler are torch's own code. There are two devices. Their memory cannot be read by
// the host (PROT_NONE) except within copies: code that takes a device's tensor for a CPU one ends in a segmentation
// fault. Every other operator copies its arguments to the CPU, is computed there, and copies the results back.
//
// What would make the host wait for a real GPU is counted by name. Tensors of different devices in one operator are an
// error, as they are on GPUs.
//
// Limits: nothing is asynchronous; there are no streams, no graphs, no generator and no sparse tensors; the `_foreach`
// operators fall apart into single ones; BatchNorm does not write its statistics back; whole models cannot be pickled
// on the device, as storages there cannot be made from Python.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

using at::Tensor;
using Lock = std::lock_guard<std::recursive_mutex>;

constexpr c10::DeviceIndex DEVICES = 2;
constexpr size_t PAGE = 4096;

std::recursive_mutex mutex;  // of all that follows: each device has its own thread in the backward pass
std::map<void*, size_t> blocks;  // the devices' memory: address and size
std::set<void*> pinned;          // host memory that copies can reach without waiting
std::map<std::string, int64_t> waits;
std::atomic<bool> refuses_float64{false};

thread_local c10::DeviceIndex current_device = 0;
thread_local int depth = 0;  // > 0 while a kernel is computed: what it calls in turn is not the program's doing

void count_wait(const std::string& name) {
  if (depth > 0) return;
  Lock lock(mutex);
  waits[name]++;
}

// ------------------------------------------------------------------------------------------------------- memory

void release(void* address) {
  Lock lock(mutex);
  auto block = blocks.find(address);
  if (block == blocks.end()) return;
  munmap(address, block->second);
  blocks.erase(block);
}

struct DeviceAllocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    size_t size = (std::max<size_t>(bytes, 1) + PAGE - 1) / PAGE * PAGE;
    void* address = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(address != MAP_FAILED, "the simulated CUDA device is out of memory");
    Lock lock(mutex);
    blocks[address] = size;
    return {address, address, &release, c10::Device(c10::kCUDA, current_device)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "copy_data() is not simulated"); }
};
DeviceAllocator device_allocator;

void release_pinned(void* address) {
  Lock lock(mutex);
  pinned.erase(address);
  free(address);
}

struct PinnedAllocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* address = aligned_alloc(64, (bytes / 64 + 1) * 64);
    Lock lock(mutex);
    pinned.insert(address);
    return {address, address, &release_pinned, c10::Device(c10::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

bool is_pinned(const Tensor& tensor) {
  Lock lock(mutex);
  return pinned.count(const_cast<void*>(tensor.storage().data())) > 0;
}

// Lets the host into the memory behind a device's tensor while this lives. The mutex must be held.
struct Opened {
  void* address = nullptr;
  size_t size = 0;

  explicit Opened(const Tensor& tensor) {
    if (!tensor.is_cuda()) return;
    auto block = blocks.find(const_cast<void*>(tensor.storage().data()));
    if (block == blocks.end()) return;
    address = block->first;
    size = block->second;
    mprotect(address, size, PROT_READ | PROT_WRITE);
  }
  ~Opened() {
    if (address) mprotect(address, size, PROT_NONE);
  }
};

// The same memory as a CPU tensor.
Tensor seen_by_host(const Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor.detach();
  auto* start = static_cast<char*>(const_cast<void*>(tensor.storage().data()));
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  return at::from_blob(start + tensor.storage_offset() * tensor.itemsize(), tensor.sizes(), tensor.strides(), options);
}

void copy_uncounted(const Tensor& from, const Tensor& to) {
  if (to.numel() == 0) return;
  Lock lock(mutex);
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  Opened opened_from(from), opened_to(to);
  Tensor source = seen_by_host(from), target = seen_by_host(to);
  if (from.is_cuda() && from.is_conj()) source = source.conj();
  if (from.is_cuda() && from.is_neg()) source = at::_neg_view(source);
  depth++;
  target.copy_(source.expand(target.sizes()));
  depth--;
}

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (from.numel() > 0 && self.device().type() != from.device().type()) {
    const Tensor& on_host = self.is_cuda() ? from : self;
    if (!non_blocking || !is_pinned(on_host)) count_wait(self.is_cuda() ? "copy to the device" : "copy to the host");
  }
  copy_uncounted(from, self);
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  return copy_(target, self, non_blocking);
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar_dense(const Tensor& self) {
  count_wait("aten::_local_scalar_dense");
  Tensor on_host = at::empty(self.sizes(), self.options().device(at::kCPU));
  copy_uncounted(self, on_host);
  return on_host.item();
}

// ------------------------------------------------------------------------------- empty tensors, sizes and views

struct OnDevice {  // allocates there while this lives
  c10::DeviceIndex before = current_device;

  explicit OnDevice(std::optional<at::Device> device) {
    if (device && device->has_index()) current_device = device->index();
  }
  ~OnDevice() { current_device = before; }
};

at::ScalarType checked(std::optional<at::ScalarType> given) {
  auto dtype = c10::dtype_or_default(given);
  bool is_wide = dtype == at::kDouble || dtype == at::kComplexDouble;
  TORCH_CHECK(!(is_wide && refuses_float64), "float64 is not supported on the simulated device");
  return dtype;
}

Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  OnDevice there(device);
  c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(size, &device_allocator, keys, checked(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  OnDevice there(device);
  c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, keys, checked(dtype));
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef symbolic, std::optional<at::MemoryFormat> format) {
  Lock lock(mutex);
  auto size = C10_AS_INTARRAYREF_SLOW(symbolic);
  size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.itemsize();
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    OnDevice there(self.device());
    Tensor larger = empty(static_cast<int64_t>(bytes), at::kByte, {}, self.device(), {}, {});
    if (storage->nbytes() > 0) {
      Opened opened_from(self), opened_to(larger);
      std::memcpy(const_cast<void*>(larger.storage().data()), storage->data(), storage->nbytes());
    }
    storage->set_data_ptr_noswap(larger.storage().unsafeGetStorageImpl()->set_data_ptr(at::DataPtr()));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Preserve) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

Tensor as_strided(
    const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset) start = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(
    Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  tensor->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  tensor->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}

Tensor& set_tensor(Tensor& self, const Tensor& from) {
  return set_storage(self, from.storage(), from.sym_storage_offset(), from.sym_sizes(), from.sym_strides());
}

// ------------------------------------------------------------------------------------------- every other operator

const std::set<std::string> ALWAYS_WAIT = {
    "aten::bincount",     "aten::equal",      "aten::is_nonzero",    "aten::masked_select",
    "aten::nonzero",      "aten::_unique2",   "aten::unique_dim",    "aten::unique_consecutive",
    "aten::repeat_interleave",
};
const std::set<std::string> TAKE_INDICES_OF_THE_HOST = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

// Whether torch counts the true elements of an index, which it does not where masked_fill() serves.
bool waits_for_indices(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  if (name != "aten::index" && name != "aten::_index_put_impl_") return false;
  if (name == "aten::_index_put_impl_" && arguments[2].toTensor().numel() == 1) return false;
  for (const auto& index : arguments[1].toListRef()) {
    if (index.isTensor() && index.toTensor().defined() && index.toTensor().scalar_type() == at::kBool) return true;
  }
  return false;
}

void check_devices(const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> arguments) {
  const std::string& name = schema.name();
  std::set<std::string> found;
  auto look_at = [&](const Tensor& tensor, bool is_written) {
    if (!tensor.defined()) return;
    bool is_number = tensor.is_cpu() && tensor.dim() == 0 && !is_written;
    if (!is_number && !(tensor.is_cpu() && TAKE_INDICES_OF_THE_HOST.count(name))) found.insert(tensor.device().str());
  };
  for (size_t i = 0; i < arguments.size(); i++) {
    auto* alias = schema.arguments()[i].alias_info();
    bool is_written = alias && alias->isWrite();
    if (arguments[i].isTensor()) look_at(arguments[i].toTensor(), is_written);
    if (arguments[i].isTensorList()) {
      for (const auto& tensor : arguments[i].toTensorVector()) look_at(tensor, is_written);
    }
  }
  TORCH_CHECK(
      found.size() < 2, "Expected all tensors to be on the same device, but found ", *found.begin(), " and ",
      *found.rbegin(), " in ", name);
}

void compute_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  if (depth == 0) {
    auto arguments = torch::jit::last(*stack, schema.arguments().size());
    check_devices(schema, arguments);
    if (ALWAYS_WAIT.count(schema.name()) || waits_for_indices(schema.name(), arguments)) count_wait(schema.name());
  }
  depth++;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    depth--;
    throw;
  }
  depth--;
}

// ------------------------------------------------------------------------------------- what torch asks of a device

struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::kCUDA;

  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  c10::Device getDevice() const override { return c10::Device(c10::kCUDA, current_device); }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return getStream(stream.device()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { count_wait("synchronize"); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, DeviceGuard);

struct CUDAHooks : at::CUDAHooksInterface {  // torch looks for this name
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const { return true; }  // these two override nothing in torch 2.6
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex current_device() const override { return ::current_device; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* address) const override {
    Lock lock(mutex);
    return pinned.count(const_cast<void*>(address)) > 0;
  }
};

}  // namespace

namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("resize_", resize_);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("unfold", at::native::unfold);
  library.impl("copy_", copy_);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar_dense);
}

// ------------------------------------------------------------------------------------ what device.py calls by ctypes

extern "C" {

void simulated_count_wait(const char* name) { count_wait(name); }

void simulated_reset_waits() {
  Lock lock(mutex);
  waits.clear();
}

// The counted waits as JSON, valid until the next call.
const char* simulated_waits() {
  static std::string json;
  Lock lock(mutex);
  json = "{";
  for (const auto& [name, count] : waits) {
    json += (json.size() > 1 ? ", \"" : "\"") + name + "\": " + std::to_string(count);
  }
  json += "}";
  return json.c_str();
}

void simulated_refuse_float64(bool refuse) { refuses_float64 = refuse; }
int simulated_current_device() { return current_device; }
void simulated_set_device(int index) { current_device = static_cast<c10::DeviceIndex>(index); }
}
