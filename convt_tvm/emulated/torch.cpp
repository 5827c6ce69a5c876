// What a build of torch without CUDA lacks for tensors on a CUDA device: a guard of devices, and the stream that DLPack's
// exchange of tensors hands on.
#include <ATen/dlpack.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);

static void* stream;
static DLPackExchangeAPI exchange;

static int current_work_stream(DLDeviceType, int32_t, void** out) {
  *out = stream;
  return 0;
}

extern "C" {
void emu_set_stream(void* value) { stream = value; }

void* emu_exchange(const void* torchs) {
  exchange = *(const DLPackExchangeAPI*)torchs;
  exchange.current_work_stream = current_work_stream;
  return &exchange;
}
}
