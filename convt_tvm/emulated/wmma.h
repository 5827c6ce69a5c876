// Warp-level matrix products: nvcuda::wmma as far as TVM's code uses it. Included by device.h.
//
// A lane holds its own 32nd of a fragment and nothing else, in an order that no code may rely on, as on a GPU. A product
// is a meeting of all 32 lanes of a warp. Fragments are read from and written to shared memory only, and what wmma
// demands of addresses is checked.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

extern "C" {
unsigned emu_lane();
void emu_require_shared(const void* memory, size_t size);
void emu_require(bool condition);
float* emu_warp_memory();
void emu_warp_product(unsigned depth);
}

namespace nvcuda { namespace wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
namespace precision { struct tf32 {}; }

static inline float __float_to_tf32(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000) != 0x7f800000) bits += 0x1000;
  bits &= 0xffffe000;
  memcpy(&value, &bits, 4);
  return value;
}

template <class T> struct emu_stored { typedef T type; };
template <> struct emu_stored<precision::tf32> { typedef float type; };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
  static const int rows = std::is_same<Use, matrix_b>::value ? K : M;
  static const int columns = std::is_same<Use, matrix_a>::value ? K : N;
  static const int num_elements = rows * columns / 32;
  typedef typename emu_stored<T>::type stored;
  stored x[num_elements];
  fragment() { memset((void*)x, 0xff, sizeof(x)); }
};

template <int M, int N, int K> static inline void fill_fragment(fragment<accumulator, M, N, K, float>& f, float value) {
  for (float& element : f.x) element = value;
}

template <class Stored> static inline void emu_require_matrix(const Stored* memory, unsigned distance, int lines, int length) {
  emu_require((uintptr_t)memory % 32 == 0 && distance * sizeof(Stored) % 16 == 0);
  emu_require_shared(memory, ((lines - 1) * distance + length) * sizeof(Stored));
}

template <class Use, int M, int N, int K, class T, class Layout>
static inline void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& f,
                                    const typename emu_stored<T>::type* memory, unsigned distance) {
  typedef fragment<Use, M, N, K, T, Layout> F;
  const bool by_row = std::is_same<Layout, row_major>::value;
  emu_require_matrix(memory, distance, by_row ? F::rows : F::columns, by_row ? F::columns : F::rows);
  for (int i = 0; i < F::num_elements; i++) {
    const int element = i * 32 + emu_lane(), row = element / F::columns, column = element % F::columns;
    f.x[i] = by_row ? memory[row * distance + column] : memory[column * distance + row];
  }
}

template <int M, int N, int K>
static inline void store_matrix_sync(float* memory, const fragment<accumulator, M, N, K, float>& f, unsigned distance,
                                     layout_t layout) {
  emu_require_matrix(memory, distance, 16, 16);
  for (int i = 0; i < M * N / 32; i++) {
    const int element = i * 32 + emu_lane(), row = element / N, column = element % N;
    memory[layout == mem_row_major ? row * distance + column : column * distance + row] = f.x[i];
  }
}

template <class F> static inline void emu_deposit(float* memory, const F& f) {
  for (int i = 0; i < F::num_elements; i++) memory[i * 32 + emu_lane()] = (float)f.x[i];
}

// The products of tensor cores are exact and summed in float32, here one after the other.
template <int K, class T, class A, class B>
static inline void mma_sync(fragment<accumulator, 16, 16, K, float>& d, const fragment<matrix_a, 16, 16, K, T, A>& a,
                            const fragment<matrix_b, 16, 16, K, T, B>& b, const fragment<accumulator, 16, 16, K, float>& c) {
  float* memory = emu_warp_memory();
  emu_deposit(memory, a);
  emu_deposit(memory + 256, b);
  emu_deposit(memory + 512, c);
  emu_warp_product(K);
  for (int i = 0; i < 8; i++) d.x[i] = memory[768 + i * 32 + emu_lane()];
}
}}
