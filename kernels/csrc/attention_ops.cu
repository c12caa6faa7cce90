// Interval attention as torch operators. kernels/cuda_attention.py calls them and says what the tensors are; it also gives them
// gradients. They write into tensors handed to them and return nothing. `own` and `step` are the tile sizes that the table was made
// for: an object that was built with others refuses.
#include "attention.cuh"
#include "attention_checks.cuh"

using Step = AttentionStep;

static void add_gradient(AttentionCall& call, const Tensor& grad, const Tensor& q, const Tensor& share) {
  check_rows(grad, q, "grad");
  STD_TORCH_CHECK(grad.is_contiguous() && grad.size(1) == q.size(1), "grad must be contiguous [T H K]");
  check_numbers(share, ScalarType::Float, q.size(0) * q.size(1), "share");
  call.grad = grad.const_data_ptr();
  call.share = (float*)share.const_data_ptr();  // only attention_share writes it
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
