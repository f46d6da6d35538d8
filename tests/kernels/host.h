// What plain C++ needs in order to compile a kernel, and to run it one thread after the other.
// Only for kernels without shared memory, barriers or warp intrinsics.
#pragma once

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, gridDim;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

template <typename... Arguments>
void run(void (*kernel)(Arguments...), unsigned grid, unsigned threads, Arguments... arguments) {
    gridDim.x = grid;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) kernel(arguments...);
}
