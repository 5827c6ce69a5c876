// What a build of torch without CUDA lacks for tensors on a CUDA device: a guard of devices, and the stream that DLPack's
// exchange of tensors hands on.
#include <ATen/dlpack.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstdint>
#include <sys/mman.h>
#include <unistd.h>

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);

static void* stream;

static int current_work_stream(DLDeviceType, int32_t, void** out) {
  *out = stream;
  return 0;
}

extern "C" {
void emu_set_stream(void* value) { stream = value; }

// In place, as tvm-ffi keeps the address of torch's table once it has seen a tensor; the table may be read-only.
int emu_take_exchange(DLPackExchangeAPI* torchs) {
  auto field = &torchs->current_work_stream;
  const uintptr_t size = sysconf(_SC_PAGESIZE), first = uintptr_t(field) & ~(size - 1);
  if (mprotect((void*)first, uintptr_t(field + 1) - first, PROT_READ | PROT_WRITE)) return -1;
  *field = current_work_stream;
  return 0;
}
}
