// Stands in for libcuda.so.1 where there is no driver: the entry points that libtvm_runtime_cuda.so imports.
//
// A module is a shared object that the emulator compiled; anything else, such as a real fatbin, cannot be loaded. A launch
// runs the blocks one after the other and the threads of a block as fibres, each up to its next barrier, in ascending or
// descending order. So threads are as far apart as barriers let them be, and what a missing barrier allows does happen.
// Lanes of a warp meet only at instructions of the whole warp.
// Shared memory is filled with NaN at the start of each block. An access outside of allocated memory (every allocation
// ends at a page that cannot be touched) or outside of an array of known size (compiled with -fsanitize=bounds) ends the
// launch with an error, and so does a barrier, or an instruction of a warp, that some threads never reach.
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda.h>
#include <dlfcn.h>
#include <string>
#include <utility>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

struct emu_dim3 { unsigned x, y, z; };
typedef void (*Kernel)(void**);

enum State { RUNNING, AT_BARRIER, AT_MEETING, DONE };
struct Fibre {
  State state;
  bool started;
  unsigned meetings;
  emu_dim3 index;
  void* stack;
  ucontext_t beginning;
  jmp_buf place;
};
struct Warp {
  unsigned arrived;
  // What each lane brings to a meeting. The next one has other memory, as lanes that go on do not wait for the others.
  alignas(16) char brought[2][32 * 32];
};

static const size_t STACK_BYTES = 256 << 10;
static const unsigned MAX_THREADS = 1024, LANES = 32;
static jmp_buf scheduler;
static std::vector<Fibre> fibres;
static Warp warps[MAX_THREADS / LANES];
static unsigned current, block_threads;
static Kernel kernel;
static void** arguments;
static bool descending;
static std::vector<std::pair<char*, size_t>> shared;
static sigjmp_buf trap;
static CUstream last_stream;
static unsigned launches;

// Without the system calls of swapcontext, which would take most of the time.
static void resume(Fibre& fibre) {
  if (_setjmp(scheduler)) return;
  if (fibre.started) _longjmp(fibre.place, 1);
  fibre.started = true;
  setcontext(&fibre.beginning);
}

static void wait_as(State state) {
  fibres[current].state = state;
  if (!_setjmp(fibres[current].place)) _longjmp(scheduler, 1);
}

extern "C" {
emu_dim3 emu_thread, emu_block, emu_block_size, emu_grid_size;

void emu_set_descending(int value) { descending = value; }
unsigned emu_launches() { return launches; }
CUstream emu_last_stream() { return last_stream; }

void emu_syncthreads() { wait_as(AT_BARRIER); }

void emu_poison(void* memory, size_t size) {
  for (const auto& array : shared)
    if (array.first == memory) return;
  shared.emplace_back((char*)memory, size);
  memset(memory, 0xff, size);
}

void emu_require(bool condition) {
  if (!condition) siglongjmp(trap, 1);
}

void emu_require_shared(const void* memory, size_t size) {
  for (const auto& array : shared)
    if ((char*)memory >= array.first && (char*)memory + size <= array.first + array.second) return;
  emu_require(false);
}

unsigned emu_lane() { return current % LANES; }

// What all lanes of the warp give, side by side, up to 32 bytes each; returns when all have.
const void* emu_meet(const void* mine, size_t size) {
  Warp& warp = warps[current / LANES];
  char* brought = warp.brought[fibres[current].meetings++ % 2];
  memcpy(brought + current % LANES * size, mine, size);
  if (++warp.arrived < LANES) return wait_as(AT_MEETING), brought;
  warp.arrived = 0;
  const unsigned first = current / LANES * LANES;
  for (unsigned i = first; i < first + LANES && i < block_threads; i++)
    if (fibres[i].state == AT_MEETING) fibres[i].state = RUNNING;
  return brought;
}
}

static void run_fibre() {
  for (;;) {
    kernel(arguments);
    wait_as(DONE);
  }
}

static CUresult run_block() {
  shared.clear();
  for (unsigned i = 0; i < block_threads; i++) fibres[i].state = RUNNING;
  for (;;) {
    unsigned found[DONE + 1] = {};
    for (unsigned i = 0; i < block_threads; i++) {
      current = descending ? block_threads - 1 - i : i;
      emu_thread = fibres[current].index;
      if (fibres[current].state == RUNNING) resume(fibres[current]);
    }
    for (unsigned i = 0; i < block_threads; i++) found[fibres[i].state]++;
    if (found[DONE] == block_threads) return CUDA_SUCCESS;
    if (found[RUNNING]) continue;
    if (found[AT_MEETING]) return CUDA_ERROR_ASSERT;
    if (found[DONE]) return CUDA_ERROR_LAUNCH_FAILED;
    for (unsigned i = 0; i < block_threads; i++) fibres[i].state = RUNNING;
  }
}

// Puts the threads of a block at the beginning of a kernel, wherever an earlier launch has left them.
static void prepare() {
  for (unsigned i = 0; i < block_threads; i++) {
    Fibre& fibre = fibres[i];
    getcontext(&fibre.beginning);
    fibre.beginning.uc_stack.ss_sp = fibre.stack;
    fibre.beginning.uc_stack.ss_size = STACK_BYTES;
    fibre.beginning.uc_link = nullptr;
    makecontext(&fibre.beginning, run_fibre, 0);
    fibre.index = {i % emu_block_size.x, i / emu_block_size.x % emu_block_size.y,
                   i / (emu_block_size.x * emu_block_size.y)};
    fibre.started = false;
    fibre.meetings = 0;
  }
  for (Warp& warp : warps) warp.arrived = 0;
}

static void on_trap(int) { siglongjmp(trap, 1); }

static CUresult run_grid() {
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
    prepare();
    for (unsigned z = 0; z < emu_grid_size.z && result == CUDA_SUCCESS; z++)
      for (unsigned y = 0; y < emu_grid_size.y && result == CUDA_SUCCESS; y++)
        for (unsigned x = 0; x < emu_grid_size.x && result == CUDA_SUCCESS; x++) {
          emu_block = {x, y, z};
          result = run_block();
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
    fibres.push_back({DONE, false, 0, {}, stack});
  }
  block_threads = threads;
  return run_grid();
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
    case CUDA_ERROR_ILLEGAL_ADDRESS: *name = "emulated kernel: access outside of its memory, or at a forbidden address"; break;
    case CUDA_ERROR_LAUNCH_FAILED: *name = "emulated kernel: barrier that not all threads of a block reach"; break;
    case CUDA_ERROR_ASSERT: *name = "emulated kernel: instruction of a warp that not all of its lanes reach"; break;
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
