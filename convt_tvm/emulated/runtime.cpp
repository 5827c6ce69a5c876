// Stands in for libcudart.so.13 where there is no driver: device memory is host memory, streams do everything at once.
#include <cstdint>
#include <cstring>
#include <ctime>
#include <cuda_runtime_api.h>
#include <map>
#include <sys/mman.h>
#include <unistd.h>

static std::map<void*, std::pair<void*, size_t>> allocations;
// While a graph is captured, what may not be captured fails as it does on a GPU. (Launches run at once.)
static bool capturing;

extern "C" {
void cuda_emu_set_capturing(int value) { capturing = value; }

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    default: *value = 1; break;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  memset(properties, 0, sizeof(*properties));
  strcpy(properties->name, "emulated");
  return cudaSuccess;
}

// The end of each allocation, rounded up to 16 bytes, is followed by a page that cannot be touched.
cudaError_t cuda_emu_allocate(void** address, size_t size) {
  const size_t page = sysconf(_SC_PAGESIZE), used = (size + 15) & ~size_t(15);
  const size_t whole = (used + page - 1) / page * page + 2 * page;
  char* start = (char*)mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
  memset(start + page, 0xff, whole - 2 * page);
  mprotect(start, page, PROT_NONE);
  mprotect(start + whole - page, page, PROT_NONE);
  *address = start + whole - page - used;
  allocations[*address] = {start, whole};
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, size_t size) {
  return capturing ? cudaErrorStreamCaptureUnsupported : cuda_emu_allocate(address, size);
}

cudaError_t cudaFree(void* address) {
  const auto found = allocations.find(address);
  if (found != allocations.end()) {
    munmap(found->second.first, found->second.second);
    allocations.erase(found);
  }
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** address, size_t size) { return cudaMalloc(address, size); }
cudaError_t cudaFreeHost(void* address) { return cudaFree(address); }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = size_t(1) << 33, cudaSuccess; }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  return capturing ? cudaErrorStreamCaptureUnsupported : (memmove(to, from, size), cudaSuccess);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t) {
  return memmove(to, from, size), cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = (cudaEvent_t) new timespec, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete (timespec*)event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return clock_gettime(CLOCK_MONOTONIC, (timespec*)event), cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t first, cudaEvent_t second) {
  const timespec &a = *(timespec*)first, &b = *(timespec*)second;
  return *ms = (b.tv_sec - a.tv_sec) * 1e3 + (b.tv_nsec - a.tv_nsec) * 1e-6, cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t) { return "stand-in for the CUDA runtime"; }
const char* cudaGetErrorString(cudaError_t) { return "stand-in for the CUDA runtime"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaErrorNotSupported; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*) { return cudaErrorNotSupported; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long) { return cudaErrorNotSupported; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaErrorNotSupported; }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaErrorNotSupported; }
}
