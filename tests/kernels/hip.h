// The part of HIP's own headers that pages.cu uses, for a clang without ROCm. Definitions as in
// hip/amd_detail/amd_hip_runtime.h and amd_hip_vector_types.h (MIT licence).
#pragma once

#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))

typedef unsigned uint2 __attribute__((ext_vector_type(2)));
typedef unsigned uint4 __attribute__((ext_vector_type(4)));

#define COORDINATE(type, name, expression)                       \
    struct type {                                                \
        __declspec(property(get = get_x)) unsigned x;            \
        __device__ unsigned get_x() const { return expression; } \
    };                                                           \
    extern const __device__ __attribute__((weak)) type name;

COORDINATE(ThreadIndex, threadIdx, __builtin_amdgcn_workitem_id_x())
COORDINATE(BlockIndex, blockIdx, __builtin_amdgcn_workgroup_id_x())
COORDINATE(GridSize, gridDim, __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x())
