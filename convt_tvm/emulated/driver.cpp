// Stands in for libcuda.so.1 where there is no driver: the entry points that libtvm_runtime_cuda.so imports.
//
// A module is a shared object that the emulator compiled; anything else, such as a real fatbin, cannot be loaded. A launch
// runs the blocks one after the other and the threads of a block as fibres, each up to its next barrier, in ascending or
// descending order. So threads are as far apart as barriers let them be, and what a missing barrier allows does happen.
// Shared memory is filled with NaN at the start of each block. An access outside of allocated memory (every allocation
// ends at a page that cannot be touched) or outside of an array of known size (compiled with -fsanitize=bounds) ends the
// launch with an error, and so does a barrier that some threads of a block never reach.
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda.h>
#include <dlfcn.h>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

struct emu_dim3 { unsigned x, y, z; };
typedef void (*Kernel)(void**);

enum State { RUNNING, AT_BARRIER, DONE };
struct Fibre {
  ucontext_t context;
  State state;
  emu_dim3 index;
  void* stack;
};

static const size_t STACK_BYTES = 256 << 10;
static const unsigned MAX_THREADS = 1024;
static ucontext_t scheduler;
static std::vector<Fibre> fibres;
static unsigned current;
static Kernel kernel;
static void** arguments;
static bool descending;
static std::vector<void*> poisoned;
static sigjmp_buf trap;
static CUstream last_stream;
static unsigned launches;

extern "C" {
emu_dim3 emu_thread, emu_block, emu_block_size, emu_grid_size;

void emu_set_descending(int value) { descending = value; }
unsigned emu_launches() { return launches; }
CUstream emu_last_stream() { return last_stream; }

void emu_syncthreads() {
  fibres[current].state = AT_BARRIER;
  swapcontext(&fibres[current].context, &scheduler);
}

void emu_poison(void* memory, size_t size) {
  for (void* done : poisoned)
    if (done == memory) return;
  poisoned.push_back(memory);
  memset(memory, 0xff, size);
}
}

static void enter() {
  kernel(arguments);
  fibres[current].state = DONE;
  swapcontext(&fibres[current].context, &scheduler);
}

static CUresult run_block(unsigned threads) {
  poisoned.clear();
  for (unsigned i = 0; i < threads; i++) {
    Fibre& fibre = fibres[i];
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = STACK_BYTES;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
    fibre.index = {i % emu_block_size.x, i / emu_block_size.x % emu_block_size.y,
                   i / (emu_block_size.x * emu_block_size.y)};
    fibre.state = RUNNING;
  }
  for (;;) {
    unsigned waiting = 0;
    for (unsigned i = 0; i < threads; i++) {
      current = descending ? threads - 1 - i : i;
      emu_thread = fibres[current].index;
      if (fibres[current].state == RUNNING) swapcontext(&scheduler, &fibres[current].context);
      waiting += fibres[current].state == AT_BARRIER;
    }
    if (waiting == 0) return CUDA_SUCCESS;
    if (waiting < threads) return CUDA_ERROR_LAUNCH_FAILED;
    for (unsigned i = 0; i < threads; i++) fibres[i].state = RUNNING;
  }
}

static void on_trap(int) { siglongjmp(trap, 1); }

static CUresult run_grid(unsigned threads) {
  struct sigaction caught = {}, segv, ill, bus;
  caught.sa_handler = on_trap;
  caught.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &caught, &segv);
  sigaction(SIGILL, &caught, &ill);
  sigaction(SIGBUS, &caught, &bus);
  volatile CUresult result = CUDA_SUCCESS;
  if (sigsetjmp(trap, 1)) {
    result = CUDA_ERROR_ILLEGAL_ADDRESS;
  } else {
    for (unsigned z = 0; z < emu_grid_size.z && result == CUDA_SUCCESS; z++)
      for (unsigned y = 0; y < emu_grid_size.y && result == CUDA_SUCCESS; y++)
        for (unsigned x = 0; x < emu_grid_size.x && result == CUDA_SUCCESS; x++) {
          emu_block = {x, y, z};
          result = run_block(threads);
        }
  }
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGILL, &ill, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  return result;
}

extern "C" {
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void**) {
  const unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (threads > MAX_THREADS || config->blockDimZ > 64 || config->gridDimY > 65535 || config->gridDimZ > 65535)
    return CUDA_ERROR_INVALID_VALUE;
  launches++;
  last_stream = config->hStream;
  kernel = (Kernel)function;
  arguments = parameters;
  emu_block_size = {config->blockDimX, config->blockDimY, config->blockDimZ};
  emu_grid_size = {config->gridDimX, config->gridDimY, config->gridDimZ};
  while (fibres.size() < threads) {
    void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fibres.push_back({{}, DONE, {}, stack});
  }
  return run_grid(threads);
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  static const char MAGIC[] = "convt-tvm emulated kernel";
  const char* bytes = (const char*)image;
  if (memcmp(bytes, MAGIC, sizeof(MAGIC))) return CUDA_ERROR_INVALID_IMAGE;
  uint64_t size;
  memcpy(&size, bytes + sizeof(MAGIC), sizeof(size));
  char path[] = "/tmp/convt-tvm-emulated-XXXXXX";
  const int file = mkstemp(path);
  if (file < 0) return CUDA_ERROR_OUT_OF_MEMORY;
  const bool written = write(file, bytes + sizeof(MAGIC) + sizeof(size), size) == (ssize_t)size;
  close(file);
  void* library = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  unlink(path);
  *module = (CUmodule)library;
  return library ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)dlsym((void*)module, (std::string("emu_") + name).c_str());
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }

CUresult cuGetErrorName(CUresult error, const char** name) {
  switch (error) {
    case CUDA_ERROR_ILLEGAL_ADDRESS: *name = "emulated kernel: access outside of its memory"; break;
    case CUDA_ERROR_LAUNCH_FAILED: *name = "emulated kernel: barrier that not all threads of a block reach"; break;
    case CUDA_ERROR_INVALID_IMAGE: *name = "device code for a GPU, and this machine has none"; break;
    case CUDA_ERROR_INVALID_VALUE: *name = "emulated kernel: more threads or blocks than a GPU takes"; break;
    default: *name = "stand-in for the CUDA driver"; break;
  }
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) { return cuGetErrorName(error, text); }

CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
}
