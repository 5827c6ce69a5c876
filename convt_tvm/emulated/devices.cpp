// The part of the stand-in for libcuda.so.1 that describes devices. It is as if there were no GPU until one is shown.
#include <cstdio>
#include <cuda.h>

static int capability;

extern "C" {
// A GPU of this compute capability, such as 90; 0 for none.
void emu_show_gpu(int value) { capability = value; }

CUresult cuInit(unsigned) { return capability ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = capability ? 1 : 0, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability % 10; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  snprintf(name, size, "emulated");
  return CUDA_SUCCESS;
}
}
