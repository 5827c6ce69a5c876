// Products of 16 x 16 matrices by one warp, with the names of nvcuda::wmma as far as TVM's code uses them.
//
// wmma demands that matrices begin at multiples of 32 bytes, by which rows of eight positions share banks in pairs, keeps
// float16 operands twice, and reads words of tf32 in an order that wants another skew. These are the instructions that it
// is made of, for which 16 bytes are enough. Both operands are column-major: for each depth the rows of A lie side by side,
// and for each column of B its depths. Fragments of eight deep products are of tf32, whatever type TVM gives them.
//
// A lane is 4 g + t. Its registers hold, by the PTX ISA's figures for mma.m16n8k16 and mma.m16n8k8 (of tf32 single values
// where there are pairs, and half as deep):
//   a: rows g, g + 8, g, g + 8; of depth 2 t and 2 t + 1, in the last two 8 more
//   b: depth 2 t and 2 t + 1, then 8 more, of column g; the same of column g + 8
//   sums: row g, columns 2 t and 2 t + 1; row g + 8; the same 8 columns on
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace convt {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct col_major {};
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment { unsigned x[4]; };
template <int K> struct fragment<accumulator, 16, 16, K, float, void> { float x[8]; };

template <int K, class T> __device__ __forceinline__ void fill_fragment(fragment<accumulator, 16, 16, K, T>& f, float value) {
  for (int i = 0; i < 8; i++) f.x[i] = value;
}

template <class T>
__device__ __forceinline__ void load_matrix_sync(fragment<matrix_a, 16, 16, 16, T, col_major>& f, const T* a, unsigned distance) {
  const unsigned lane = lane_number();
  load_transposed(f.x, a + (lane % 8 + lane / 16 * 8) * distance + lane / 8 % 2 * 8);
}

template <class T>
__device__ __forceinline__ void load_matrix_sync(fragment<matrix_a, 16, 16, 8, T, col_major>& f, const float* a, unsigned distance) {
  const unsigned lane = lane_number();
  for (unsigned i = 0; i < 4; i++) f.x[i] = read_word(a + (lane % 4 + i / 2 * 4) * distance + lane / 4 + i % 2 * 8);
}

template <int K, class T, class Stored>
__device__ __forceinline__ void load_matrix_sync(fragment<matrix_b, 16, 16, K, T, col_major>& f, const Stored* b, unsigned distance) {
  const unsigned lane = lane_number();
  load_matrices(f.x, b + (lane % 8 + lane / 16 * 8) * distance + lane / 8 % 2 * (16 / sizeof(Stored)));
}

template <class T> struct Multiply;
template <> struct Multiply<half> {
  static __device__ __forceinline__ void add(float* d, const unsigned* a, const unsigned* b) { multiply_f16(d, a, b); }
};
template <> struct Multiply<nv_bfloat16> {
  static __device__ __forceinline__ void add(float* d, const unsigned* a, const unsigned* b) { multiply_bf16(d, a, b); }
};

template <int K, class T>
__device__ __forceinline__ void mma_sync(fragment<accumulator, 16, 16, K, float>& d,
                                         const fragment<matrix_a, 16, 16, K, T, col_major>& a,
                                         const fragment<matrix_b, 16, 16, K, T, col_major>& b,
                                         const fragment<accumulator, 16, 16, K, float>& c) {
  for (int i = 0; i < 8; i++) d.x[i] = c.x[i];
  for (int half = 0; half < 2; half++) {
    if constexpr (K == 8)
      multiply_tf32(d.x + 4 * half, a.x, b.x + 2 * half);
    else
      Multiply<T>::add(d.x + 4 * half, a.x, b.x + 2 * half);
  }
}

template <int K, class T>
__device__ __forceinline__ void store_matrix_sync(float* d, const fragment<accumulator, 16, 16, K, T>& f, unsigned distance, layout_t) {
  const unsigned lane = lane_number();
  for (unsigned i = 0; i < 4; i++)
    write_pair(d + (lane / 4 + i % 2 * 8) * distance + lane % 4 * 2 + i / 2 * 8, f.x[2 * i], f.x[2 * i + 1]);
}
}
