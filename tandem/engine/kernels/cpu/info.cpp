// What this build can do, for people to read.
#include "simd.h"

extern "C" const char *tandem_features() {
#ifdef TANDEM_BF16_DOT
    return "AVX-512 with bfloat16 products";
#elif defined(TANDEM_AVX512)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__AVX__)
    return "AVX";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "128-bit vectors";
#endif
}

extern "C" int tandem_threads_supported() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
