// Interval attention as torch operators. kernels/cuda_attention.py calls them and says what the tensors are; it also gives them
// gradients. They write into tensors handed to them and return nothing. `own` and `step` are the tile sizes that the table was made
// for: an object that was built with others refuses.
#include "attention.cuh"
#include "stable.cuh"

using Step = AttentionStep;

static void check_rows(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == like.size(0) && x.size(2) == like.size(2) && x.scalar_type() == like.scalar_type(),
                  name, " must be [T heads K] with the tokens, head width and type of q");
  STD_TORCH_CHECK(x.stride(2) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 && (uintptr_t)x.const_data_ptr() % 16 == 0, name,
                  " must have channels side by side and rows on multiples of 16 bytes");
}

static void check_numbers(const Tensor& x, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous() && x.numel() == count, name, " must be contiguous with ", count,
                  " numbers of its type");
}

static AttentionCall inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse, double scale) {
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half, "q must be bfloat16 or float16");
  STD_TORCH_CHECK(q.dim() == 3 && (q.size(2) == 64 || q.size(2) == 128), "q must be [T H K] with a head width K of 64 or 128");
  check_rows(q, q, "q");
  check_rows(k, q, "k");
  check_rows(v, q, "v");
  STD_TORCH_CHECK(k.size(1) == v.size(1) && k.size(1) > 0 && q.size(1) % k.size(1) == 0, "query heads must be a multiple of kv heads");
  check_numbers(lse, ScalarType::Float, q.size(0) * q.size(1), "lse");
  AttentionCall call = {};
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.lse = (float*)lse.const_data_ptr();  // only the forward pass writes it
  call.q_t = q.stride(0), call.q_h = q.stride(1);
  call.k_t = k.stride(0), call.k_h = k.stride(1);
  call.v_t = v.stride(0), call.v_h = v.stride(1);
  call.total = (int)q.size(0);
  call.heads = (int)q.size(1);
  call.group = (int)(q.size(1) / k.size(1));
  call.scale = (float)scale;
  return call;
}

static void add_spans(AttentionCall& call, const Tensor& first, const Tensor& last, const Tensor& at, const Tensor& table, int columns) {
  check_numbers(first, ScalarType::Int, call.total, "first");
  check_numbers(last, ScalarType::Int, call.total, "last");
  check_numbers(at, ScalarType::Int, call.total, "at");
  check_numbers(table, ScalarType::Int, table.size(0) * columns, "table");
  call.first = (const int*)first.const_data_ptr();
  call.last = (const int*)last.const_data_ptr();
  call.at = (const int*)at.const_data_ptr();
  call.table = (const int*)table.const_data_ptr();
}

static void add_gradient(AttentionCall& call, const Tensor& grad, const Tensor& q, const Tensor& share) {
  check_rows(grad, q, "grad");
  STD_TORCH_CHECK(grad.is_contiguous() && grad.size(1) == q.size(1), "grad must be contiguous [T H K]");
  check_numbers(share, ScalarType::Float, q.size(0) * q.size(1), "share");
  call.grad = grad.const_data_ptr();
  call.share = (float*)share.const_data_ptr();  // only attention_share writes it
}

static void* result_like(const Tensor& result, const Tensor& x) {
  check_rows(result, x, "the result");
  STD_TORCH_CHECK(result.is_contiguous() && result.size(1) == x.size(1), "the result must be contiguous and of the size of its input");
  return result.mutable_data_ptr();
}

template <class T, int D>
static void start(Step step, const AttentionCall& call, int blocks, cudaStream_t stream) {
  int shared = attention_sizes<D>(step).shared;
  auto run = [&](auto kernel, auto... more) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    kernel<<<blocks, ATTENTION_THREADS, shared, stream>>>(call, more...);
  };
  if (step == Step::FORWARD) run(attention_forward<T, D>);
  else if (step == Step::SHARE) run(attention_share<T, D>);
  else if (step == Step::QUERY_GRAD) run(attention_query_grad<T, D>);
  else run(attention_key_grad<T, D>, step == Step::LANDMARK_GRAD);
}

static void start(Step step, const AttentionCall& call, int64_t blocks, const Tensor& q) {
  if (blocks == 0) return;
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  bool half = q.scalar_type() == ScalarType::Half, narrow = q.size(2) == 64;
  auto run = narrow ? (half ? start<fp16, 64> : start<bf16, 64>) : (half ? start<fp16, 128> : start<bf16, 128>);
  run(step, call, (int)blocks, stream_of(q));
  launched();
}

static void check_sizes(Step step, const Tensor& q, const Tensor& table, int64_t tokens, int64_t own, int64_t step_size) {
  AttentionSizes sizes = attention_sizes(step, (int)q.size(2));
  STD_TORCH_CHECK(sizes.own == own && sizes.step == step_size && table.size(0) == (tokens + own - 1) / own,
                  "the table was made for other tiles than this object was built with; build it again with `weft kernels build`");
}

static void run_forward(Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, Tensor at, Tensor table, Tensor out, Tensor lse,
                              double scale, int64_t own, int64_t step) {
  AttentionCall call = inputs(q, k, v, lse, scale);
  add_spans(call, first, last, at, table, 7);
  check_sizes(Step::FORWARD, q, table, q.size(0), own, step);
  call.result = result_like(out, q);
  start(Step::FORWARD, call, table.size(0) * q.size(1), q);
}

static void run_share(Tensor out, Tensor grad, Tensor share) {
  AttentionCall call = inputs(out, out, out, share, 1.0);
  add_gradient(call, grad, out, share);
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  call.out = out.const_data_ptr();
  int64_t rows = attention_sizes(Step::SHARE, (int)out.size(2)).own;
  start(Step::SHARE, call, (out.size(0) * out.size(1) + rows - 1) / rows, out);
}

static void run_query_grad(Tensor q, Tensor k, Tensor v, Tensor grad, Tensor lse, Tensor share, Tensor first, Tensor last,
                                 Tensor at, Tensor table, Tensor result, double scale, int64_t own, int64_t step) {
  AttentionCall call = inputs(q, k, v, lse, scale);
  add_gradient(call, grad, q, share);
  add_spans(call, first, last, at, table, 7);
  check_sizes(Step::QUERY_GRAD, q, table, q.size(0), own, step);
  call.result = result_like(result, q);
  start(Step::QUERY_GRAD, call, table.size(0) * q.size(1), q);
}

static void run_key_grad(Tensor q, Tensor k, Tensor v, Tensor grad, Tensor lse, Tensor share, Tensor first, Tensor last, Tensor at,
                               Tensor table, Tensor keys, Tensor values, double scale, int64_t own, int64_t step, bool gather) {
  AttentionCall call = inputs(q, k, v, lse, scale);
  add_gradient(call, grad, q, share);
  add_spans(call, first, last, at, table, 5);
  Step kind = gather ? Step::LANDMARK_GRAD : Step::KEY_GRAD;
  check_sizes(kind, q, table, q.size(0), own, step);
  call.result = result_like(keys, k);
  call.second = result_like(values, v);
  start(kind, call, table.size(0) * k.size(1), q);
}

STABLE_TORCH_LIBRARY_FRAGMENT(weft_cuda, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, Tensor at, Tensor table, Tensor(a!) out, "
      "Tensor(b!) lse, float scale, int own, int step) -> ()");
  m.def("attention_share(Tensor out, Tensor grad, Tensor(a!) share) -> ()");
  m.def(
      "attention_query_grad(Tensor q, Tensor k, Tensor v, Tensor grad, Tensor lse, Tensor share, Tensor first, Tensor last, Tensor at, "
      "Tensor table, Tensor(a!) result, float scale, int own, int step) -> ()");
  m.def(
      "attention_key_grad(Tensor q, Tensor k, Tensor v, Tensor grad, Tensor lse, Tensor share, Tensor first, Tensor last, Tensor at, "
      "Tensor table, Tensor(a!) keys, Tensor(b!) values, float scale, int own, int step, bool gather) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(weft_cuda, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&run_forward));
  m.impl("attention_share", TORCH_BOX(&run_share));
  m.impl("attention_query_grad", TORCH_BOX(&run_query_grad));
  m.impl("attention_key_grad", TORCH_BOX(&run_key_grad));
}
