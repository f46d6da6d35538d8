// pages.cu as a host library: `launch` stands for the driver's launch call.
#include "host.h"

#include "pages.cu"

using Kernel = void(char*, char*, const Run*, const Place*, unsigned, unsigned, unsigned);

extern "C" void launch(Kernel* kernel, unsigned grid, unsigned threads, char* cache, char* buffer,
                       const Run* runs, const Place* places, unsigned run_count,
                       unsigned place_count, unsigned parts) {
    run(kernel, grid, threads, cache, buffer, runs, places, run_count, place_count, parts);
}
