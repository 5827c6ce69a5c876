// The device half: what CUDA C++ that TVM generates needs to compile as C++. Included before a translated kernel.
#pragma once
#include <cuda_runtime.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
using std::max;
using std::min;

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#ifndef __forceinline__
#define __forceinline__ inline
#endif

struct emu_dim3 { unsigned x, y, z; };
extern "C" {
extern emu_dim3 emu_thread, emu_block, emu_block_size, emu_grid_size;
void emu_syncthreads();
void emu_poison(void* memory, size_t size);
}
#define threadIdx emu_thread
#define blockIdx emu_block
#define blockDim emu_block_size
#define gridDim emu_grid_size
#define __syncthreads() emu_syncthreads()

template <class T> static inline T emu_ldg(const T* address) { return *address; }
#define __ldg(address) emu_ldg(address)

#include "warp_instructions.h"
#include "warp_matrix.h"

// A vector's access to an array: aligned, and inside of it as far as its size is known.
template <class Vector, class Array> static inline Vector* emu_vector(Array& array, ptrdiff_t index) {
  Vector* address = (Vector*)(&array[0] + index);
  emu_require((uintptr_t)address % sizeof(Vector) == 0);
  if (std::is_array<Array>::value)
    emu_require(index >= 0 && (char*)(address + 1) <= (char*)&array[0] + sizeof(array));
  return address;
}
