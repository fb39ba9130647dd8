// Runs a CUDA kernel on the CPU, to test its logic without a GPU.
//
// A C++ compiler includes this file before a .cu file. Thread blocks run one after the other. The
// threads of a block are fibers. Each fiber runs to its next barrier before another one continues;
// the fibers of a warp also meet in their shuffles. A warp runs as far as it can before another warp.
// The order changes from barrier to barrier, so a missing __syncthreads() shows. A barrier that not
// all threads reach aborts. The file defines only what utils/nms/_cuda_nms.cu uses.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define FEW_THREADS 64
#define MANY_THREADS 96
#define MANY 20
#define MOST_BLOCKS 2
#define __global__ static
#define __device__ static
#define __shared__ static
#define LAUNCH(threads, blocks, stream, ...) \
    fibers::launch(threads, blocks, [&] { select_kernel<threads>(__VA_ARGS__); })

struct float4 { float x, y, z, w; };
struct Index { unsigned x; };
static Index threadIdx, blockIdx, gridDim;

namespace fibers {

enum Barrier { NONE, BLOCK, BEFORE_READING, AFTER_READING, END };

static ucontext_t scheduler, contexts[MANY_THREADS];
static Barrier at[MANY_THREADS];
static uint64_t exchanged[MANY_THREADS];
static std::function<void()> body;

static void wait(Barrier barrier) {
    unsigned me = threadIdx.x;
    at[me] = barrier;
    swapcontext(&contexts[me], &scheduler);
    threadIdx.x = me;
}

static void run() {
    body();
    at[threadIdx.x] = END;
}

static void same_barrier(unsigned a, unsigned b) {
    if (at[a] == at[b]) return;
    std::fprintf(stderr, "threads %u and %u are at different barriers\n", a, b);
    std::abort();
}

static void launch(unsigned threads, unsigned blocks, std::function<void()> kernel) {
    static std::mt19937 random;
    static std::vector<char> stacks(MANY_THREADS << 16);
    std::vector<unsigned> warps(threads / 32), lanes(32);
    std::iota(warps.begin(), warps.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    body = kernel;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        for (unsigned i = 0; i < threads; ++i) {
            getcontext(&contexts[i]);
            contexts[i].uc_stack.ss_sp = &stacks[i << 16];
            contexts[i].uc_stack.ss_size = 1 << 16;
            contexts[i].uc_link = &scheduler;
            makecontext(&contexts[i], run, 0);
            at[i] = NONE;
        }
        while (at[0] != END) {
            std::shuffle(warps.begin(), warps.end(), random);
            for (unsigned warp : warps) {
                do {
                    std::shuffle(lanes.begin(), lanes.end(), random);
                    for (unsigned lane : lanes) {
                        threadIdx.x = 32 * warp + lane;
                        swapcontext(&scheduler, &contexts[threadIdx.x]);
                    }
                    for (unsigned lane : lanes) same_barrier(32 * warp, 32 * warp + lane);
                } while (at[32 * warp] != BLOCK && at[32 * warp] != END);
            }
            for (unsigned warp : warps) same_barrier(0, 32 * warp);
        }
    }
}

}  // namespace fibers

static void __syncthreads() { fibers::wait(fibers::BLOCK); }

static uint64_t __shfl_xor_sync(unsigned, uint64_t value, int step) {
    fibers::exchanged[threadIdx.x] = value;
    fibers::wait(fibers::BEFORE_READING);
    uint64_t other = fibers::exchanged[threadIdx.x ^ step];
    fibers::wait(fibers::AFTER_READING);
    return other;
}

static uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

typedef int cudaError_t;
typedef void *cudaStream_t;
struct cudaFuncAttributes {};
static int cudaGetLastError() { return 0; }
template <class Kernel> static int cudaFuncGetAttributes(cudaFuncAttributes *, Kernel) { return 0; }
static const char *cudaGetErrorString(cudaError_t) { return "none"; }
