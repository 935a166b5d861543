// Vectors of as many floats as the machine has lanes, and what every kernel here needs of them.
//
// Written in GCC's vector extensions, which compile for any processor; intrinsics stand only where they pay.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define TANDEM_AVX512 1
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
#if defined(TANDEM_AVX512) && defined(__AVX512BF16__)
#define TANDEM_BF16_DOT 1
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

// The upper half of a float32.
struct bf16 {
    uint16_t bits;
};

constexpr float INF = std::numeric_limits<float>::infinity();

INLINE vf splat(float x) { return x - (vf){}; }

INLINE float to_float(float x) { return x; }

INLINE float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

// To nearest, ties to even, as torch rounds; a NaN stays one.
INLINE vu round_bits(vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (x == x) ? rounded : (vu){} + 0x7fc0;
}

INLINE vf load(const float *p) {
    vf out;
    memcpy(&out, p, sizeof out);
    return out;
}

INLINE vf load(const bf16 *p) {
    vh half;
    memcpy(&half, p, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

INLINE void store(float *p, vf x) { memcpy(p, &x, sizeof x); }

INLINE void store(bf16 *p, vf x) {
#ifdef TANDEM_BF16_DOT
    __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    memcpy(p, &half, sizeof half);
#else
    vh half = __builtin_convertvector(round_bits(x), vh);
    memcpy(p, &half, sizeof half);
#endif
}

// The first n < LANES elements; the rest is 0 and not read.
template <class T> INLINE vf load_part(const T *p, int64_t n) {
    T part[LANES] = {};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}

template <class T> INLINE void store_part(T *p, vf x, int64_t n) {
    T part[LANES];
    store(part, x);
    memcpy(p, part, n * sizeof(T));
}

// Arguments are 64-bit words: pointers, numbers, and the bits of doubles.
template <class T> INLINE T *at(int64_t word) { return (T *)(uintptr_t)word; }

INLINE float real(int64_t word) {
    double x;
    memcpy(&x, &word, 8);
    return (float)x;
}

template <class T> INLINE T round_to(float x) {
    T out;
    store_part(&out, splat(x), 1);
    return out;
}

// Runs body(index, elements) over n elements, the last of which may be fewer than a vector.
template <class F> INLINE void over(int64_t n, F body) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) body(i, (int64_t)LANES);
    if (i < n) body(i, n - i);
}

template <class T> INLINE vf load_some(const T *p, int64_t n) { return n == LANES ? load(p) : load_part(p, n); }

template <class T> INLINE void store_some(T *p, vf x, int64_t n) {
    if (n == LANES)
        store(p, x);
    else
        store_part(p, x, n);
}

INLINE float sum(vf x) {
#ifdef TANDEM_AVX512
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
#endif
}

INLINE float largest(vf x) {
#ifdef TANDEM_AVX512
    return _mm512_reduce_max_ps((__m512)x);
#else
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
#endif
}

// e^x to about 1e-7 of itself; 0 below -87, e^88 above 88. A NaN stays one.
INLINE vf exponential(vf x) {
    vf bounded = x < -87.0f ? splat(-87.0f) : x;
    bounded = bounded > 88.0f ? splat(88.0f) : bounded;
    const float shift = 12582912.0f; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    vf turned = bounded * 1.44269504f + shift;
    vf whole = turned - shift;
    vf rest = bounded - whole * 0.693359375f;
    rest = rest - whole * -2.12194440e-4f;
    vf series = 1.9875691500e-4f * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    vf power = (vf)(((vi)turned + (127 - 0x4b400000)) << 23);
    vf out = series * power;
    return x < -87.0f ? (vf){} : out;
}

INLINE vf hyperbolic_tangent(vf x) {
    vf square = x * x;
    vf small = x * (1.0f + square * (-0.333333333f + square * (0.133333333f + square * -0.0539682540f)));
    vf large = 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
    return (square < 0.0225f) ? small : large;
}

// Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
INLINE vf error_function(vf x) {
    vf size = x < 0.0f ? -x : x;
    vf t = 1.0f / (1.0f + 0.3275911f * size);
    vf series = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    vf out = 1.0f - series * exponential(-size * size);
    return x < 0.0f ? -out : out;
}

// Runs body(first, last) over [0, count) on so many threads; one thread never meets OpenMP.
template <class F> static inline void share(int64_t count, int threads, F body) {
    if (threads > count) threads = (int)count;
    if (threads <= 1) {
        body((int64_t)0, count);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
    for (int thread = 0; thread < threads; thread++) body(count * thread / threads, count * (thread + 1) / threads);
}

// Runs body(index) over [0, count): for tasks of unequal length.
template <class F> static inline void share_unevenly(int64_t count, int threads, F body) {
    if (threads > count) threads = (int)count;
    if (threads <= 1) {
        for (int64_t i = 0; i < count; i++) body(i);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic)
#endif
    for (int64_t i = 0; i < count; i++) body(i);
}
