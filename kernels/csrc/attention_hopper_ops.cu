// Interval attention for Hopper as a torch operator; kernels/hopper_attention.py calls it and says what the tensors are. Its gradient
// is that of attention_ops.cu. `own` and `step` are the tile sizes that the table was made for.
#include "attention_checks.cuh"
#include "attention_hopper.cuh"

// The driver's function that describes a tensor to the copy engine, found at run time so that nothing links to the driver.
static decltype(&cuTensorMapEncodeTiled) encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  STD_TORCH_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess, "the NVIDIA driver is too old for tile maps: 12.0 or later");
  return (decltype(&cuTensorMapEncodeTiled))function;
}

// x [T H K] in boxes of 64 channels and `rows` rows, swizzled by 128 bytes; rows past the last one are zero.
static TileMap map_of(const Tensor& x, int rows) {
  TileMap map;
  bool half = x.scalar_type() == ScalarType::Half;
  cuuint64_t sizes[3] = {(cuuint64_t)x.size(2), (cuuint64_t)x.size(1), (cuuint64_t)x.size(0)};
  cuuint64_t strides[2] = {(cuuint64_t)x.stride(1) * 2, (cuuint64_t)x.stride(0) * 2};
  cuuint32_t box[3] = {64, 1, (cuuint32_t)rows}, every[3] = {1, 1, 1};
  static const auto encode = encoder();
  CUresult result = encode(&map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void*)x.const_data_ptr(),
                           sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "the copy engine takes no tensor with these strides: make q, k and v contiguous");
  return map;
}

template <class T, int D>
static void start(const HopperCall& call, int blocks, cudaStream_t stream) {
  constexpr int shared = HopperShape<D>::SHARED;
  cudaFuncSetAttribute(attention_hopper<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  attention_hopper<T, D><<<blocks, HOPPER_THREADS, shared, stream>>>(call);
}

static void run_hopper(Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, Tensor at, Tensor table, Tensor lives, Tensor out,
                       Tensor lse, double scale, int64_t own, int64_t step) {
  using S = HopperShape<64>;
  static_assert(S::OWN == HopperShape<128>::OWN && S::STEP == HopperShape<128>::STEP, "one table serves both widths");
  HopperCall call = {};
  call.attention = inputs(q, k, v, lse, scale);
  add_spans(call.attention, first, last, at, table, 7);
  STD_TORCH_CHECK(own == S::OWN && step == S::STEP && table.size(0) == (q.size(0) + own - 1) / own,
                  "the table was made for other tiles than this object was built with; build it again with `weft kernels build`");
  check_numbers(lives, ScalarType::Int, (q.size(0) + step - 1) / step * 2 * step, "lives");
  STD_TORCH_CHECK((uintptr_t)lives.const_data_ptr() % 16 == 0, "lives must lie on a multiple of 16 bytes");
  call.lives = (const int*)lives.const_data_ptr();
  call.attention.result = result_like(out, q);
  if (table.size(0) == 0 || q.size(1) == 0) return;
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  call.q = map_of(q, S::OWN / HOPPER_GROUPS);
  call.k = map_of(k, S::STEP);
  call.v = map_of(v, S::STEP);
  bool half = q.scalar_type() == ScalarType::Half, narrow = q.size(2) == 64;
  auto run = narrow ? (half ? start<fp16, 64> : start<bf16, 64>) : (half ? start<fp16, 128> : start<bf16, 128>);
  run(call, (int)(table.size(0) * q.size(1)), stream_of(q));
  launched();
}

STABLE_TORCH_LIBRARY_FRAGMENT(weft_cuda, m) {
  m.def(
      "attention_hopper(Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, Tensor at, Tensor table, Tensor lives, Tensor(a!) out, "
      "Tensor(b!) lse, float scale, int own, int step) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(weft_cuda, CUDA, m) { m.impl("attention_hopper", TORCH_BOX(&run_hopper)); }
