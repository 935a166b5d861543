// Products along the last dimension of two row-major operands: registers of one type, accumulated in float32.
#pragma once

#include "simd.h"

// Dot<T>: STEP elements a register; `load`, `load_part` (the rest is 0 and not read), `add` (lane-wise partial sums).
template <class T> struct Dot;

template <> struct Dot<float> {
    static constexpr int STEP = LANES;
    using Register = vf;
    INLINE Register load(const float *p) { return ::load(p); }
    INLINE Register load_part(const float *p, int64_t n) { return ::load_part(p, n); }
    INLINE void add(vf &total, Register a, Register b) { total += a * b; }
};

#ifdef TANDEM_BF16_DOT
template <> struct Dot<bf16> {
    static constexpr int STEP = 32;
    using Register = __m512bh;
    INLINE Register load(const bf16 *p) { return (Register)_mm512_loadu_si512(p); }
    INLINE Register load_part(const bf16 *p, int64_t n) {
        return (Register)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p);
    }
    INLINE void add(vf &total, Register a, Register b) { total = (vf)_mm512_dpbf16_ps((__m512)total, a, b); }
};
#else
// Each 32-bit lane holds two elements; both widen to float32 by a shift or a mask.
template <> struct Dot<bf16> {
    static constexpr int STEP = 2 * LANES;
    struct Register {
        vf even, odd;
    };
    INLINE Register load(const bf16 *p) {
        vu pair;
        memcpy(&pair, p, sizeof pair);
        return {(vf)(pair << 16), (vf)(pair & 0xffff0000u)};
    }
    INLINE Register load_part(const bf16 *p, int64_t n) {
        bf16 part[STEP] = {};
        memcpy(part, p, n * sizeof(bf16));
        return load(part);
    }
    INLINE void add(vf &total, Register a, Register b) {
        total += a.even * b.even;
        total += a.odd * b.odd;
    }
};
#endif

// Accumulators that a tile keeps in registers at once.
#ifdef TANDEM_AVX512
constexpr int TILE = 16;

// The sums of 16 vectors, in order: a tree of transpositions and additions, 45 instructions in place of 16 * 8.
INLINE vf sums(const vf *v) {
    __m512 pair[8], quad[4];
    for (int i = 0; i < 8; i++) {
        __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        quad[i] = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88), _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
    __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88), _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd));
    return (vf)_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

INLINE void store_sums(const vf *v, float *out) { store(out, sums(v)); }
#else
constexpr int TILE = 8;

INLINE void store_sums(const vf *v, float *out) {
    for (int i = 0; i < TILE; i++) out[i] = sum(v[i]);
}
#endif
