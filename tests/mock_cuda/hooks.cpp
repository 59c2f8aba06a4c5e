// Tells torch that a CUDA device is there. Must be loaded before torch is imported: torch keeps the first hooks that it finds, and without
// them autograd says that there is no accelerator.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <set>
#include <mutex>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

const c10::impl::DeviceGuardImplInterface* guard() {
  return c10::impl::device_guard_impl_registry[static_cast<int>(DeviceType::CUDA)].load();
}

DeviceIndex current() {
  return guard() ? guard()->getDevice().index() : 0;
}

void set_current(DeviceIndex index) {
  if (guard()) guard()->setDevice(Device(DeviceType::CUDA, index));
}

std::mutex pinned_lock;
std::set<const void*> pinned;

// Host memory that knows that it is pinned.
struct PinnedAllocator final : public c10::Allocator {
  static void release(void* data) {
    {
      std::lock_guard<std::mutex> held(pinned_lock);
      pinned.erase(data);
    }
    std::free(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    if (data) {
      std::lock_guard<std::mutex> held(pinned_lock);
      pinned.insert(data);
    }
    return {data, data, &release, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

struct Hooks final : public at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  int getNumGPUs() const override { return guard() ? guard()->deviceCount() : 1; }
  DeviceIndex deviceCount() const override { return getNumGPUs(); }
  DeviceIndex current_device() const override { return current(); }
  DeviceIndex getCurrentDevice() const override { return current(); }
  void setCurrentDevice(DeviceIndex index) const override { set_current(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    const DeviceIndex before = current();
    set_current(index);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> held(pinned_lock);
    return pinned.count(data) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void deviceSynchronize(DeviceIndex) const override {
    if (guard()) guard()->synchronizeDevice(current());
  }
};

}  // namespace

namespace at {
using CUDAHooks = ::Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
