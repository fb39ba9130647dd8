// Hard and soft suppression on a GPU: one thread block per group of boxes, all groups in one launch.
//
// A plain C interface without PyTorch's headers, loaded by utils/nms/backends.py: it compiles in
// seconds and works with every PyTorch. Compiled with -fmad=false it computes each IoU in float32 by
// the operations of _cpu_nms.pyx, so it keeps the same boxes to the last tie.

#include <cstdint>

#ifndef FEW_THREADS
#define FEW_THREADS 256    // per block if few boxes of a group are selected: many blocks run at once
#define MANY_THREADS 1024  // per block if many are; both are multiples of 32
#define MANY 1000
#endif
#ifndef MOST_BLOCKS
#define MOST_BLOCKS 8192  // more than run at once; with more groups a block takes several
#endif
#ifndef LAUNCH
#include <cuda_runtime.h>
#define LAUNCH(threads, blocks, stream, ...) \
    select_kernel<threads><<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif
#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C"
#endif

enum Method { HARD, LINEAR, GAUSSIAN };

struct Rule {
    float thresh;
    int64_t limit;
    int method;
    double sigma;
    float min_score;
    float extra;  // 1: a box from x1 to x2 is x2 - x1 + 1 wide; 0: x2 - x1
};

__device__ float overlap(float4 a, float4 b, float extra) {
    float width = fmaxf(fminf(a.z, b.z) - fmaxf(a.x, b.x) + extra, 0.0f);
    float height = fmaxf(fminf(a.w, b.w) - fmaxf(a.y, b.y) + extra, 0.0f);
    float inter = width * height;
    float area_a = (a.z - a.x + extra) * (a.w - a.y + extra);
    float area_b = (b.z - b.x + extra) * (b.w - b.y + extra);
    return inter / (area_a + area_b - inter);
}

// Larger for the higher score; of equal scores larger for the earlier box; never 0.
__device__ uint64_t priority(float score, int64_t position) {
    uint32_t bits = __float_as_uint(score + 0.0f);  // -0 becomes 0
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(~position);
}

// Returns the largest value of the block to all its threads.
template <int THREADS> __device__ uint64_t block_max(uint64_t value) {
    __shared__ uint64_t of_warp[THREADS / 32];
    for (int step = 16; step; step /= 2) {
        uint64_t other = __shfl_xor_sync(0xffffffffu, value, step);
        value = other > value ? other : value;
    }
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    for (int warp = 0; warp < THREADS / 32; ++warp)
        value = of_warp[warp] > value ? of_warp[warp] : value;
    __syncthreads();  // before the next call writes of_warp
    return value;
}

// Takes the arguments of nms_select. Each round selects the best box left in the group. One pass over
// the others decays their scores by their overlap (hard: drops them) and finds the next best box. The
// time of a group is proportional to its selected boxes times all its boxes.
template <int THREADS>
__global__ void select_kernel(const float4 *boxes, float *scores, int64_t *order,
                              const int64_t *starts, const int64_t *groups, Rule rule,
                              int64_t *kept, float *kept_scores) {
    for (int64_t group = blockIdx.x; group < *groups; group += gridDim.x) {
        int64_t first = starts[group], count = starts[group + 1] - first;
        float4 winner = {};
        for (int64_t taken = 0; taken < rule.limit; ++taken) {
            uint64_t best = 0;
            for (int64_t i = threadIdx.x; i < count; i += THREADS) {
                int64_t box = order[first + i];
                if (box < 0) continue;
                float score = scores[box];
                if (taken) {
                    float iou = overlap(winner, boxes[box], rule.extra);
                    if (rule.method == HARD && iou > rule.thresh) {
                        order[first + i] = -1;
                        continue;
                    }
                    if (rule.method == LINEAR && iou > rule.thresh) score *= 1 - iou;
                    // In double, then rounded: exp differs in the last bits only.
                    if (rule.method == GAUSSIAN && iou > 0)
                        score *= static_cast<float>(exp(-(static_cast<double>(iou) * iou) / rule.sigma));
                }
                if (rule.method != HARD) {
                    if (!(score >= rule.min_score)) {
                        order[first + i] = -1;
                        continue;
                    }
                    scores[box] = score;
                }
                uint64_t mine = priority(score, i);
                best = mine > best ? mine : best;
            }
            best = block_max<THREADS>(best);
            if (best == 0) break;
            int64_t place = first + static_cast<uint32_t>(~best);
            int64_t box = order[place];
            winner = boxes[box];
            __syncthreads();  // all threads have read order[place]
            if (threadIdx.x == 0) {
                kept[first + taken] = box;
                kept_scores[first + taken] = scores[box];
                order[place] = -1;
            }
            __syncthreads();
        }
    }
}

// Suppress within each group, on the current device, in stream order, without a copy to the host.
// All arrays are device memory:
//   boxes [N, 4] x1, y1, x2, y2; scores [N], no NaN, overwritten; order [N], the boxes sorted by
//   group, overwritten; starts [groups + 1 or more]: group g is order[starts[g]:starts[g + 1]];
//   groups [1]; kept [N], -1 on entry: from starts[g] on it receives the selected boxes of group g
//   in the order of selection; kept_scores [N] receives their scores at that time.
// most_groups: an upper bound of *groups. Returns a CUDA error code, 0 for success.
EXPORT int nms_select(const float *boxes, float *scores, int64_t *order, const int64_t *starts,
                      const int64_t *groups, int64_t most_groups, float thresh, int64_t limit,
                      int method, double sigma, float min_score, float extra, int64_t *kept,
                      float *kept_scores, void *stream) {
    if (most_groups == 0) return 0;
    Rule rule = {thresh, limit, method, sigma, min_score, extra};
    unsigned blocks = most_groups < MOST_BLOCKS ? most_groups : MOST_BLOCKS;
    cudaStream_t queue = static_cast<cudaStream_t>(stream);
    const float4 *corners = reinterpret_cast<const float4 *>(boxes);
    if (limit < MANY)
        LAUNCH(FEW_THREADS, blocks, queue, corners, scores, order, starts, groups, rule, kept,
               kept_scores);
    else
        LAUNCH(MANY_THREADS, blocks, queue, corners, scores, order, starts, groups, rule, kept,
               kept_scores);
    return cudaGetLastError();
}

// The version of the arguments, as utils/nms/backends.py expects it.
EXPORT int nms_interface(void) { return 2; }

// Returns 0 if the kernel can run on the current device, else a CUDA error code.
EXPORT int nms_check(void) {
    cudaFuncAttributes attributes;
    int code = cudaFuncGetAttributes(&attributes, select_kernel<FEW_THREADS>);
    cudaGetLastError();  // a later call must not report this error
    return code;
}

EXPORT const char *nms_error(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// Returns the compute capabilities of this library, as utils/build.py writes them.
EXPORT const char *nms_architectures(void) { return ARCHITECTURES; }
