// pages.cu as a host library: `launch` stands for the driver's launch call.
#include "host.h"

#include "pages.cu"

using Kernel = void(char*, char*, const Run*, const Target*, unsigned, unsigned, unsigned);

extern "C" void launch(Kernel* kernel, unsigned grid, unsigned threads, char* cache, char* buffer,
                       const Run* runs, const Target* targets, unsigned run_count,
                       unsigned target_count, unsigned parts) {
    run(kernel, grid, threads, cache, buffer, runs, targets, run_count, target_count, parts);
}
