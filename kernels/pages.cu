// Gather and scatter of KV-cache pages. Tables, checks and launch: page_table.py, pages.py.
//
// Compiles with NVRTC, with hipRTC and, behind tests/kernels/host.h, as C++: no intrinsics, no
// shared memory, no includes.
//
// A page (one run of one block) is cut into tiles of LANES * UNROLL words; LANES neighbouring
// threads copy a tile, and each has UNROLL loads in flight before its first store. Tiles are dealt
// out by a stride over the whole grid, so any number of thread blocks copies everything. Blocks of
// one run come one after the other, as they do in a chunk.

struct Run {
    long long offset, stride, chunk_offset, nbytes;
};

struct Target {
    long long chunk;
    int index, block;
};

#define THREADS 256
#define LANES 32
#define UNROLL 4

template <typename Word, bool GATHER>
__device__ __forceinline__ void copy_pages(char* cache, char* buffer, const Run* runs,
                                           const Target* targets, unsigned run_count,
                                           unsigned target_count, unsigned parts) {
    const unsigned tiles = run_count * target_count * parts;
    const unsigned lane = threadIdx.x % LANES;
    const unsigned groups = gridDim.x * (THREADS / LANES);
    for (unsigned tile = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES; tile < tiles;
         tile += groups) {
        const unsigned page = tile / parts;
        const Run run = runs[page / target_count];
        const Target target = targets[page % target_count];
        char* in_cache = cache + run.offset + target.block * run.stride;
        char* in_buffer = buffer + target.chunk + run.chunk_offset + target.index * run.nbytes;
        const Word* from = reinterpret_cast<const Word*>(GATHER ? in_cache : in_buffer);
        Word* to = reinterpret_cast<Word*>(GATHER ? in_buffer : in_cache);
        const long long words = run.nbytes / (long long)sizeof(Word);
        const long long first = (long long)(tile % parts) * (LANES * UNROLL) + lane;
        Word held[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            if (first + i * LANES < words) held[i] = from[first + i * LANES];
        }
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            if (first + i * LANES < words) to[first + i * LANES] = held[i];
        }
    }
}

// Four thread blocks on a multiprocessor leave 64 registers to a thread: left to itself, the compiler
// aims at six and spills.
#define PAGES(name, Word, gather)                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                  \
        name(char* cache, char* buffer, const Run* runs, const Target* targets,                 \
             unsigned run_count, unsigned target_count, unsigned parts) {                      \
        copy_pages<Word, gather>(cache, buffer, runs, targets, run_count, target_count, parts); \
    }

PAGES(gather_16, uint4, true)
PAGES(gather_8, uint2, true)
PAGES(gather_4, unsigned, true)
PAGES(gather_2, unsigned short, true)
PAGES(gather_1, unsigned char, true)
PAGES(scatter_16, uint4, false)
PAGES(scatter_8, uint2, false)
PAGES(scatter_4, unsigned, false)
PAGES(scatter_2, unsigned short, false)
PAGES(scatter_1, unsigned char, false)
