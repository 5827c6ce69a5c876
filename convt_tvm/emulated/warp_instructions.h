// What `cuda/warp_instructions.h` has, for the emulator. Included by device.h.
//
// An instruction of a warp is a meeting of its 32 lanes, at which each learns what the others gave. Who holds what is
// said element by element, as the PTX ISA does.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" {
unsigned emu_lane();
void emu_require_shared(const void* memory, size_t size);
void emu_require(bool condition);
const void* emu_meet(const void* mine, size_t size);
}

namespace convt {
struct Operands { unsigned a[4], b[2]; };

static inline void emu_read_matrices(unsigned (&d)[4], const void* row, bool transposed) {
  emu_require((uintptr_t)row % 16 == 0);
  emu_require_shared(row, 16);
  const auto rows = (const uint16_t* const*)emu_meet(&row, sizeof(row));
  const unsigned lane = emu_lane();
  for (unsigned matrix = 0; matrix < 4; matrix++) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; i++) {
      const unsigned first = lane / 4, second = lane % 4 * 2 + i;
      pair[i] = transposed ? rows[8 * matrix + second][first] : rows[8 * matrix + first][second];
    }
    memcpy(&d[matrix], pair, 4);
  }
}

static inline void load_matrices(unsigned (&d)[4], const void* row) { emu_read_matrices(d, row, false); }
static inline void load_transposed(unsigned (&d)[4], const void* row) { emu_read_matrices(d, row, true); }

static inline float emu_part(const half*, unsigned word, unsigned i) {
  const uint16_t bits = word >> 16 * i;
  half value;
  memcpy((void*)&value, &bits, 2);
  return (float)value;
}

static inline float emu_part(const nv_bfloat16*, unsigned word, unsigned i) {
  const unsigned bits = word >> 16 * i << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Tensor cores do not read what tf32 lacks.
static inline float emu_part(const float*, unsigned word, unsigned) {
  const unsigned bits = word & 0xffffe000;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The products of tensor cores are exact and summed in float32, here one after the other.
template <class T> static inline void emu_multiply(float* d, const unsigned* a, const unsigned* b) {
  Operands mine;
  memcpy(mine.a, a, sizeof(mine.a));
  memcpy(mine.b, b, sizeof(mine.b));
  const Operands* of = (const Operands*)emu_meet(&mine, sizeof(mine));
  const unsigned lane = emu_lane(), values = 4 / sizeof(T), columns = 4 * values;  // of a register, and of four lanes
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 2 * columns; k++) {
      const unsigned holder = k % columns / values, part = k % values;
      const float x = emu_part((const T*)0, of[row % 8 * 4 + holder].a[row / 8 + k / columns * 2], part);
      const float y = emu_part((const T*)0, of[column * 4 + holder].b[k / columns], part);
      d[i] += x * y;
    }
  }
}

static inline void multiply_f16(float* d, const unsigned* a, const unsigned* b) { emu_multiply<half>(d, a, b); }
static inline void multiply_bf16(float* d, const unsigned* a, const unsigned* b) { emu_multiply<nv_bfloat16>(d, a, b); }
static inline void multiply_tf32(float* d, const unsigned* a, const unsigned* b) { emu_multiply<float>(d, a, b); }

static inline float round_to_tf32(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000) != 0x7f800000) bits += 0x1000;
  bits &= 0xffffe000;
  memcpy(&value, &bits, 4);
  return value;
}

static inline unsigned lane_number() { return emu_lane(); }

static inline unsigned read_word(const float* address) {
  emu_require_shared(address, 4);
  unsigned word;
  memcpy(&word, address, 4);
  return word;
}

static inline void write_pair(float* address, float first, float second) {
  emu_require((uintptr_t)address % 8 == 0);
  emu_require_shared(address, 8);
  address[0] = first;
  address[1] = second;
}
}
