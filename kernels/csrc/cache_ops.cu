// The kernels of the paged cache as torch operators; see ops.cu. They write into tensors handed to them, allocate nothing and read
// nothing on the host, so that a CUDA graph can replay them.
#include "decode.cuh"
#include "stable.cuh"

static void is(const Tensor& x, ScalarType type, int64_t numbers, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous() && x.numel() == numbers, what);
}

// What does not depend on the type.
struct Sizes {
  int batch, heads, groups, parts, page_bits, table_width, window, max_landmarks, store;
  float scale, eps;
};

template <int K, int R, class T>
static void start_decode(const DecodeStep<T>& step, int batch, cudaStream_t stream) {
  constexpr size_t bytes = decode_shared_floats<K, R, T>() * sizeof(float);
  static_assert(bytes <= 48 * 1024, "more shared memory has to be asked for");
  decode_step<K, R, T><<<batch * step.groups * step.parts, DECODE_THREADS, bytes, stream>>>(step);
  launched();
}

template <class T>
static void decode_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_weight, const Tensor& k_weight,
                      const Tensor& position, const Tensor& turns, const Tensor& axis, const Tensor& rows, const Tensor& landmark,
                      Tensor& state, const Tensor& marked, const Tensor& table, Tensor& pool, Tensor& out, Tensor& partial,
                      Tensor& arrived, const Sizes& sizes) {
  DecodeStep<T> step{(const T*)q.const_data_ptr(),
                     (const T*)k.const_data_ptr(),
                     (const T*)v.const_data_ptr(),
                     q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                     (const float*)q_weight.const_data_ptr(),
                     (const float*)k_weight.const_data_ptr(),
                     (const int64_t*)position.const_data_ptr(),
                     (const double*)turns.const_data_ptr(),
                     (const int*)axis.const_data_ptr(),
                     (const int*)rows.const_data_ptr(),
                     (const int*)state.const_data_ptr(),
                     (const int*)table.const_data_ptr(),
                     (const uint8_t*)landmark.const_data_ptr(),
                     (const uint8_t*)marked.const_data_ptr(),
                     (T*)pool.mutable_data_ptr(),
                     (int*)state.mutable_data_ptr(),
                     (T*)out.mutable_data_ptr(),
                     (float*)partial.mutable_data_ptr(),
                     (int*)arrived.mutable_data_ptr(),
                     sizes.heads, sizes.groups, sizes.parts, sizes.page_bits, sizes.table_width, sizes.window, sizes.max_landmarks,
                     sizes.store, sizes.scale, sizes.eps};
  int heads = sizes.heads / sizes.groups;
  bool small = q.size(2) == 64;
  auto run = heads > 4   ? (small ? start_decode<64, 8, T> : start_decode<128, 8, T>)
             : heads > 2 ? (small ? start_decode<64, 4, T> : start_decode<128, 4, T>)
                         : (small ? start_decode<64, 2, T> : start_decode<128, 2, T>);
  run(step, sizes.batch, stream_of(q));
}

static void step_of(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor position, Tensor turns, Tensor axis,
                    Tensor rows, Tensor landmark, Tensor state, Tensor marked, Tensor table, Tensor pool, Tensor out, Tensor partial,
                    Tensor arrived, int64_t window, int64_t max_landmarks, int64_t store, int64_t parts, double scale, double eps) {
  int64_t batch = q.size(0), heads = q.size(1), width = q.size(2), groups = k.size(1), page = pool.size(3), cached = state.size(0);
  for (const Tensor* x : {&q, &k, &v})
    STD_TORCH_CHECK(x->dim() == 3 && x->stride(2) == 1 && x->size(0) == batch && x->size(2) == width &&
                        x->scalar_type() == q.scalar_type(),
                    "q [B H K], k and v [B G K] must be of one type with channels side by side");
  STD_TORCH_CHECK(width == 64 || width == 128, "the head width must be 64 or 128");
  STD_TORCH_CHECK(v.size(1) == groups && heads % groups == 0 && heads / groups <= 8, "at most 8 query heads per kv head");
  STD_TORCH_CHECK(pool.dim() == 5 && pool.is_contiguous() && pool.scalar_type() == q.scalar_type() && pool.size(1) == 2 &&
                      pool.size(2) == groups && pool.size(4) == width && (page & (page - 1)) == 0,
                  "the pool must be contiguous [pages 2 G PAGE K] of the type of q, PAGE a power of two");
  STD_TORCH_CHECK((uintptr_t)pool.const_data_ptr() % 16 == 0, "the pool must begin at a multiple of 16 bytes");
  STD_TORCH_CHECK(parts >= 1 && parts <= DECODE_MAX_PARTS, "between 1 and 64 parts");
  is(q_weight, ScalarType::Float, width, "q_weight must be contiguous float32 [K]");
  is(k_weight, ScalarType::Float, width, "k_weight must be contiguous float32 [K]");
  is(position, ScalarType::Long, 3 * batch, "position must be contiguous int64 [B 3]");
  is(turns, ScalarType::Double, width / 2, "turns must be contiguous float64 [K/2]");
  is(axis, ScalarType::Int, width / 2, "axis must be contiguous int32 [K/2]");
  is(rows, ScalarType::Int, batch, "rows must be contiguous int32 [B]");
  is(landmark, ScalarType::Byte, batch, "landmark must be contiguous uint8 [B]");
  is(state, ScalarType::Int, 4 * cached, "state must be contiguous int32 [rows 4]");
  is(table, ScalarType::Int, cached * table.size(1), "table must be contiguous int32 [rows width]");
  is(out, q.scalar_type(), q.numel(), "out must be contiguous [B H K] of the type of q");
  STD_TORCH_CHECK(marked.scalar_type() == ScalarType::Byte && marked.is_contiguous(), "marked must be contiguous uint8 [rows window]");
  int64_t folded = heads / groups > 4 ? 8 : heads / groups > 2 ? 4 : 2;
  STD_TORCH_CHECK(partial.scalar_type() == ScalarType::Float && partial.is_contiguous() &&
                      partial.numel() >= (parts > 1 ? batch * groups * parts * folded * (width + 2) : 0),
                  "partial must hold B G parts R (K + 2) float32 numbers");
  STD_TORCH_CHECK(arrived.scalar_type() == ScalarType::Int && arrived.numel() >= batch * groups, "arrived must hold B G int32 zeros");
  if (batch == 0) return;
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  int bits = 0;
  while (page >> (bits + 1)) ++bits;
  Sizes sizes{(int)batch, (int)heads, (int)groups, (int)parts, bits, (int)table.size(1), (int)window, (int)max_landmarks, (int)store,
              (float)scale, (float)eps};
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Half || q.scalar_type() == ScalarType::BFloat16, "q must be bfloat16 or float16");
  auto run = q.scalar_type() == ScalarType::Half ? decode_of<fp16> : decode_of<bf16>;
  run(q, k, v, q_weight, k_weight, position, turns, axis, rows, landmark, state, marked, table, pool, out, partial, arrived, sizes);
}

static void advance(Tensor rows, Tensor landmark, Tensor state, Tensor marked) {
  int batch = rows.size(0);
  is(rows, ScalarType::Int, batch, "rows must be contiguous int32 [B]");
  is(landmark, ScalarType::Byte, batch, "landmark must be contiguous uint8 [B]");
  is(state, ScalarType::Int, 4 * state.size(0), "state must be contiguous int32 [rows 4]");
  is(marked, ScalarType::Byte, state.size(0) * marked.size(1), "marked must be contiguous uint8 [rows window]");
  if (batch == 0) return;
  torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  decode_advance<<<(batch + 127) / 128, 128, 0, stream_of(rows)>>>((const int*)rows.const_data_ptr(),
                                                                   (const uint8_t*)landmark.const_data_ptr(),
                                                                   (int*)state.mutable_data_ptr(), (uint8_t*)marked.mutable_data_ptr(),
                                                                   batch, (int)marked.size(1), 128);
  launched();
}

template <int K, class T>
static void store_of(const Tensor& k, const Tensor& v, const Tensor& weight, const Tensor& cosine, const Tensor& sine,
                     const Tensor& slot, Tensor& pool, Tensor& y, float eps, int blocks) {
  norm_rope_store<K, T><<<blocks, NORM_ROPE_THREADS, 0, stream_of(k)>>>(
      (const T*)k.const_data_ptr(), (const T*)v.const_data_ptr(), (const float*)weight.const_data_ptr(),
      (const float*)cosine.const_data_ptr(), (const float*)sine.const_data_ptr(), (const int64_t*)slot.const_data_ptr(),
      (T*)pool.mutable_data_ptr(), (T*)y.mutable_data_ptr(), k.size(0), k.size(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
      pool.size(3), eps, blocks);
  launched();
}

template <class T>
static void store_for(const Tensor& k, const Tensor& v, const Tensor& weight, const Tensor& cosine, const Tensor& sine,
                      const Tensor& slot, Tensor& pool, Tensor& y, float eps, int blocks) {
  auto run = k.size(2) == 64 ? store_of<64, T> : store_of<128, T>;
  run(k, v, weight, cosine, sine, slot, pool, y, eps, blocks);
}

static void norm_rope_store_op(Tensor k, Tensor v, Tensor weight, Tensor cosine, Tensor sine, Tensor slot, Tensor pool, Tensor y,
                               double eps, int64_t blocks) {
  int64_t tokens = k.size(0), groups = k.size(1), width = k.size(2);
  STD_TORCH_CHECK(k.dim() == 3 && v.dim() == 3 && k.stride(2) == 1 && v.stride(2) == 1 && v.size(0) == tokens && v.size(1) == groups &&
                      v.size(2) == width && k.scalar_type() == v.scalar_type(),
                  "k and v must be [T G K] of one type with channels side by side");
  STD_TORCH_CHECK(width == 64 || width == 128, "the head width must be 64 or 128");
  STD_TORCH_CHECK(pool.dim() == 5 && pool.is_contiguous() && pool.scalar_type() == k.scalar_type() && pool.size(1) == 2 &&
                      pool.size(2) == groups && pool.size(4) == width,
                  "the cache must be contiguous [pages 2 G PAGE K] of the type of k");
  is(weight, ScalarType::Float, width, "weight must be contiguous float32 [K]");
  is(cosine, ScalarType::Float, tokens * width / 2, "cos must be contiguous float32 [T K/2]");
  is(sine, ScalarType::Float, tokens * width / 2, "sin must be contiguous float32 [T K/2]");
  is(slot, ScalarType::Long, tokens, "slot must be contiguous int64 [T]");
  is(y, k.scalar_type(), k.numel(), "y must be contiguous [T G K] of the type of k");
  if (tokens == 0) return;
  torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  auto type = k.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "k must be float32, bfloat16 or float16");
  auto run = type == ScalarType::Float ? store_for<float> : type == ScalarType::Half ? store_for<fp16> : store_for<bf16>;
  run(k, v, weight, cosine, sine, slot, pool, y, (float)eps, (int)blocks);
}

STABLE_TORCH_LIBRARY_FRAGMENT(weft_cuda, m) {
  m.def(
      "decode_step(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor position, Tensor turns, Tensor axis, "
      "Tensor rows, Tensor landmark, Tensor(a!) state, Tensor marked, Tensor table, Tensor(b!) pool, Tensor(c!) out, "
      "Tensor(d!) partial, Tensor(e!) arrived, int window, int max_landmarks, int store, int parts, float scale, float eps) -> ()");
  m.def("decode_advance(Tensor rows, Tensor landmark, Tensor(a!) state, Tensor(b!) marked) -> ()");
  m.def(
      "norm_rope_store(Tensor k, Tensor v, Tensor weight, Tensor cosine, Tensor sine, Tensor slot, Tensor(a!) pool, Tensor(b!) y, "
      "float eps, int blocks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(weft_cuda, CUDA, m) {
  m.impl("decode_step", TORCH_BOX(&step_of));
  m.impl("decode_advance", TORCH_BOX(&advance));
  m.impl("norm_rope_store", TORCH_BOX(&norm_rope_store_op));
}
