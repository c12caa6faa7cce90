// What the operators of interval attention ask of their tensors, and the call that they make of them.
#pragma once
#include "attention_tiles.cuh"
#include "stable.cuh"

static inline void check_rows(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == like.size(0) && x.size(2) == like.size(2) && x.scalar_type() == like.scalar_type(),
                  name, " must be [T heads K] with the tokens, head width and type of q");
  STD_TORCH_CHECK(x.stride(2) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 && (uintptr_t)x.const_data_ptr() % 16 == 0, name,
                  " must have channels side by side and rows on multiples of 16 bytes");
}

static inline void check_numbers(const Tensor& x, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous() && x.numel() == count, name, " must be contiguous with ", count,
                  " numbers of its type");
}

static inline AttentionCall inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse, double scale) {
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

static inline void add_spans(AttentionCall& call, const Tensor& first, const Tensor& last, const Tensor& at, const Tensor& table, int columns) {
  check_numbers(first, ScalarType::Int, call.total, "first");
  check_numbers(last, ScalarType::Int, call.total, "last");
  check_numbers(at, ScalarType::Int, call.total, "at");
  check_numbers(table, ScalarType::Int, table.size(0) * columns, "table");
  call.first = (const int*)first.const_data_ptr();
  call.last = (const int*)last.const_data_ptr();
  call.at = (const int*)at.const_data_ptr();
  call.table = (const int*)table.const_data_ptr();
}

static inline void* result_like(const Tensor& result, const Tensor& x) {
  check_rows(result, x, "the result");
  STD_TORCH_CHECK(result.is_contiguous() && result.size(1) == x.size(1), "the result must be contiguous and of the size of its input");
  return result.mutable_data_ptr();
}
