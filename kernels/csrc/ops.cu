// The CUDA kernels as torch operators, on torch's stable ABI: one shared object serves torch 2.11 and later and any CPython.
// Operators write into tensors handed to them and return nothing: a returned alias cannot pass torch.compile.
#include "norm_rope.cuh"
#include "stable.cuh"

static void check(const Tensor& x, const Tensor& weight, const Tensor& cosine, const Tensor& sine) {
  STD_TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1, "x must be [T H K] with channels side by side");
  STD_TORCH_CHECK(x.size(2) == 64 || x.size(2) == 128, "the head width must be 64 or 128");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::Float,
                  "x must be bfloat16, float16 or float32");
  for (const Tensor* table : {&weight, &cosine, &sine})
    STD_TORCH_CHECK(table->scalar_type() == ScalarType::Float && table->is_contiguous(), "tables must be contiguous float32");
  STD_TORCH_CHECK(weight.numel() == x.size(2), "weight must be [K]");
  STD_TORCH_CHECK(cosine.numel() == x.size(0) * x.size(2) / 2 && sine.numel() == cosine.numel(), "cos and sin must be [T K/2]");
}

static void check_result(const Tensor& result, const Tensor& x) {
  STD_TORCH_CHECK(result.is_contiguous() && result.numel() == x.numel() && result.scalar_type() == x.scalar_type(),
                  "the result must be contiguous and of the size and type of x");
}

template <int K, class T>
static void forward(const Tensor& x, const Tensor& weight, const Tensor& cosine, const Tensor& sine, Tensor& y, float eps, int blocks) {
  norm_rope_forward<K, T><<<blocks, NORM_ROPE_THREADS, 0, stream_of(x)>>>(
      (const T*)x.const_data_ptr(), (const float*)weight.const_data_ptr(), (const float*)cosine.const_data_ptr(),
      (const float*)sine.const_data_ptr(), (T*)y.mutable_data_ptr(), x.size(0), x.size(1), x.stride(0), x.stride(1), eps, blocks);
  launched();
}

template <int K, class T>
static void backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& cosine, const Tensor& sine, Tensor& dx,
                     Tensor& parts, float eps) {
  norm_rope_backward<K, T><<<parts.size(0), NORM_ROPE_THREADS, NORM_ROPE_THREADS / 32 * K * sizeof(float), stream_of(x)>>>(
      (const T*)dy.const_data_ptr(), (const T*)x.const_data_ptr(), (const float*)weight.const_data_ptr(),
      (const float*)cosine.const_data_ptr(), (const float*)sine.const_data_ptr(), (T*)dx.mutable_data_ptr(),
      (float*)parts.mutable_data_ptr(), x.size(0), x.size(1), x.stride(0), x.stride(1), eps, (int)parts.size(0));
  launched();
}

static void qk_norm_rope(Tensor x, Tensor weight, Tensor cosine, Tensor sine, Tensor y, double eps, int64_t blocks) {
  check(x, weight, cosine, sine);
  check_result(y, x);
  if (x.numel() == 0) return;
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  bool small = x.size(2) == 64;
  auto run = x.scalar_type() == ScalarType::BFloat16 ? (small ? forward<64, bf16> : forward<128, bf16>)
             : x.scalar_type() == ScalarType::Half   ? (small ? forward<64, fp16> : forward<128, fp16>)
                                                     : (small ? forward<64, float> : forward<128, float>);
  run(x, weight, cosine, sine, y, (float)eps, (int)blocks);
}

static void qk_norm_rope_backward(Tensor dy, Tensor x, Tensor weight, Tensor cosine, Tensor sine, Tensor dx, Tensor parts,
                                  double eps) {
  check(x, weight, cosine, sine);
  check_result(dx, x);
  check_result(dy, x);
  STD_TORCH_CHECK(parts.dim() == 2 && parts.size(1) == x.size(2) && parts.scalar_type() == ScalarType::Float && parts.is_contiguous(),
                  "weight parts must be contiguous float32 [blocks K]");
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  bool small = x.size(2) == 64;
  auto run = x.scalar_type() == ScalarType::BFloat16 ? (small ? backward<64, bf16> : backward<128, bf16>)
             : x.scalar_type() == ScalarType::Half   ? (small ? backward<64, fp16> : backward<128, fp16>)
                                                     : (small ? backward<64, float> : backward<128, float>);
  run(dy, x, weight, cosine, sine, dx, parts, (float)eps);
}

STABLE_TORCH_LIBRARY(weft_cuda, m) {
  m.def("qk_norm_rope(Tensor x, Tensor weight, Tensor cosine, Tensor sine, Tensor(a!) y, float eps, int blocks) -> ()");
  m.def(
      "qk_norm_rope_backward(Tensor dy, Tensor x, Tensor weight, Tensor cosine, Tensor sine, Tensor(a!) dx, Tensor(b!) parts, "
      "float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(weft_cuda, CUDA, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
}
