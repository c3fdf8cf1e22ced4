// A second device for machines without a GPU. It computes on the CPU, refuses operations that mix devices as CUDA does,
// and counts operations, copies and waits. torch calls such a backend PrivateUse1.
#include <torch/extension.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <string>
#include <unordered_map>
#include <unordered_set>

using namespace at;

static const DeviceType KIND = DeviceType::PrivateUse1;
static const Device DEVICE(KIND, 0);
static std::unordered_map<std::string, long> counts;
static bool strict = true;   // whether operations that mix devices are refused

// ---- memory, streams and random numbers: those of the CPU

struct Memory final : public c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes ? bytes : 1);
    return {data, data, &c10::free_cpu, DEVICE};
  }
  DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
static Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return KIND; }
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, DEVICE); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { counts["event"]++; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : public at::PrivateUse1HooksInterface {
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static auto generator = at::detail::createCPUGenerator(1);
    return generator;
  }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(1); }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = memory.allocate(bytes);
    memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    auto* impl = storage.unsafeGetStorageImpl();
    impl->set_data_ptr_noswap(std::move(data));
    impl->set_nbytes(bytes);
  }
};
static Hooks hooks;

// ---- tensors: made, copied, viewed and resized

static ScalarType type_of(std::optional<ScalarType> given) {
  return given.value_or(typeMetaToScalarType(get_default_dtype()));
}

static Tensor dev_empty(IntArrayRef sizes, std::optional<ScalarType> type, std::optional<Layout>, std::optional<Device>,
                    std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type_of(type),
                                   format);
}

static Tensor dev_empty_strided(IntArrayRef sizes, IntArrayRef strides, std::optional<ScalarType> type,
                            std::optional<Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type_of(type));
}

static Tensor as_cpu(const Tensor& t) {   // the same memory, seen as a CPU tensor
  if (!t.device().is_privateuseone()) return t;
  auto options = TensorOptions().dtype(t.dtype()).device(kCPU);
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), options);
}

static Tensor on_device(const Tensor& t) {   // a copy
  auto out = at::empty_strided(t.sizes(), t.strides(), t.options().device(DEVICE));
  as_cpu(out).copy_(t);
  return out;
}

static Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  bool leaves = from.device().is_privateuseone(), arrives = to.device().is_privateuseone();
  if (leaves != arrives) counts[std::string(leaves ? "D2H" : "H2D") + (non_blocking ? " non_blocking" : "")]++;
  as_cpu(to).copy_(as_cpu(from));
  return to;
}

static Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

static Scalar item(const Tensor& t) {
  counts["item"]++;
  return at::_local_scalar_dense(as_cpu(t));
}

static Tensor dev_view(const Tensor& t, IntArrayRef sizes) { return at::native::view(t, sizes); }

static Tensor dev_as_strided(const Tensor& t, IntArrayRef sizes, IntArrayRef strides, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, sizes, strides, offset);
}

static Tensor dev_reshape_alias(const Tensor& t, IntArrayRef sizes, IntArrayRef strides) {
  return at::native::_reshape_alias(t, sizes, strides);
}

static const Tensor& dev_resize(const Tensor& t, IntArrayRef sizes, std::optional<MemoryFormat>) {
  auto* impl = t.unsafeGetTensorImpl();
  size_t bytes = (c10::multiply_integers(sizes) + t.storage_offset()) * t.element_size();
  if (t.storage().nbytes() < bytes) hooks.resizePrivateUse1Bytes(t.storage(), bytes);
  impl->set_sizes_contiguous(sizes);
  return t;
}

static Tensor& set_part(Tensor& t, Storage storage, int64_t offset, IntArrayRef sizes, IntArrayRef strides) {
  return at::native::set_storage_cpu_(t, storage, offset, sizes, strides);
}

static Tensor& set_storage(Tensor& t, Storage storage) {
  int64_t count = storage.nbytes() / t.itemsize();
  return at::native::set_storage_cpu_(t, storage, 0, {count}, {});
}

static bool dev_is_set_to(const Tensor& a, const Tensor& b) {
  return a.storage().data() == b.storage().data() && a.sizes() == b.sizes();
}

// ---- operations: convolutions by hand, all others by a fallback that looks at the devices first

static Tensor dev_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
                          IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                          int64_t groups) {
  counts["ops"]++;
  TORCH_CHECK(x.device() == weight.device(), "Expected all tensors to be on the same device: convolution on ",
              x.device(), " and ", weight.device());
  bool biased = bias.has_value() && bias->defined();
  auto added = biased ? std::optional<Tensor>(as_cpu(*bias)) : std::nullopt;
  return on_device(at::convolution(as_cpu(x), as_cpu(weight), added, stride, padding, dilation, transposed,
                                   output_padding, groups));
}

static std::tuple<Tensor, Tensor, Tensor> dev_convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  counts["ops"]++;
  auto found = at::convolution_backward(as_cpu(grad), as_cpu(x), as_cpu(weight), weight.size(0), stride, padding,
                                        dilation, transposed, output_padding, groups, wanted);
  auto moved = [](const Tensor& t) { return t.defined() ? on_device(t) : t; };
  return {moved(std::get<0>(found)), moved(std::get<1>(found)), moved(std::get<2>(found))};
}

// operations whose answer's shape, or a check of their own, depends on values: on CUDA the host reads those
static const std::unordered_set<std::string> WAITS = {
    "aten::nonzero", "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::masked_select", "aten::bincount", "aten::is_nonzero", "aten::equal", "aten::repeat_interleave",
    "aten::multinomial", "aten::histc", "aten::_linalg_check_errors"};

// What an operation costs on CUDA beyond its kernels: `numbers` are its arguments without dimensions on the CPU.
static void count_waits(const std::string& name, bool here, long numbers, bool fills, long masks, long indices) {
  if (WAITS.count(name)) counts["wait " + name]++;
  if (masks) counts["wait bool index"] += masks;
  if (indices) counts["H2D"] += indices;   // an index on the CPU is copied to what it looks into
  if (here && numbers && name.find("aten::where") == 0) counts["H2D"] += numbers;   // `where` copies a Python number
  if (fills && name.find("aten::masked_fill") == 0) counts["item"]++;   // and this reads a tensor of no dimensions
}

static void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  // as CUDA does, an index may lie on the CPU, and a number (a tensor of no dimensions) anywhere
  bool indexing = name.find("index") != std::string::npos;
  bool here = false, elsewhere = false, fills = false;
  long numbers = 0, masks = 0, indices = 0;
  std::string shape;
  auto look = [&](const Tensor& t, bool may_lie_elsewhere) {
    if (!t.defined()) return;
    fills = t.device().is_privateuseone() && t.dim() == 0;   // of the last one
    if (t.device().is_privateuseone()) here = true;
    else if (t.device().is_cpu() && t.dim() == 0) numbers++;
    else if (t.device().is_cpu() && !may_lie_elsewhere) {
      elsewhere = true;
      shape = c10::str(t.sizes());
    }
  };
  for (const auto& a : arguments) {
    if (a.isTensor()) look(a.toTensor(), false);
    else if (a.isList())
      for (const IValue e : a.toListRef())
        if (e.isTensor()) {
          const Tensor& t = e.toTensor();
          look(t, indexing);
          if (!indexing || name == "aten::index" || !t.defined()) continue;   // which makes numbers of masks itself
          masks += t.scalar_type() == kBool;
          indices += t.device().is_cpu();
        }
  }
  TORCH_CHECK(!(strict && here && elsewhere), "Expected all tensors to be on the same device, but found at least two "
              "devices, ", DEVICE, " and cpu! In ", name, ", sizes on the CPU: ", shape);
  count_waits(name, here, numbers, fills, masks, indices);
  counts["ops"]++;
  auto before = counts;
  at::native::cpu_fallback(op, stack, false);
  for (auto kind : {"D2H", "H2D", "D2H non_blocking", "H2D non_blocking"}) counts[kind] = before[kind];
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", dev_empty);
  m.impl("empty_strided", dev_empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("view", dev_view);
  m.impl("as_strided", dev_as_strided);
  m.impl("_reshape_alias", dev_reshape_alias);
  m.impl("resize_", dev_resize);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("set_.source_Storage", set_storage);
  m.impl("is_set_to", dev_is_set_to);
  m.impl("unfold", at::native::unfold);
  // torch's own for other devices takes contiguous images alone
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("convolution_overrideable", dev_convolution);
  m.impl("convolution_backward_overrideable", dev_convolution_backward);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("init", [] { at::RegisterPrivateUse1HooksInterface(&hooks); });
  m.def("counts", [] { return counts; });
  m.def("reset", [] { counts.clear(); });
  m.def("strict", [](bool on) { strict = on; });
}
