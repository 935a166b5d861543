// What stands between the matrix products: normalisation, rotation, gates. float32 inside, rounded once.
#include "simd.h"

namespace {

// x [outer, inner, size]: elements of the last dimension are adjacent.
struct Shape {
    int64_t outer, inner, size, outer_stride, inner_stride;
};

template <class T> INLINE void normalise(const T *x, const T *weight, T *out, int64_t size, float eps) {
    vf squares = {};
    over(size, [&](int64_t i, int64_t n) {
        vf v = load_some(x + i, n);
        squares += v * v;
    });
    float scale = 1.0f / std::sqrt(sum(squares) / (float)size + eps);
    over(size, [&](int64_t i, int64_t n) {
        store_some(out + i, load_some(x + i, n) * scale * load_some(weight + i, n), n);
    });
}

template <class T> void rms_norm(const T *x, const T *weight, T *out, const Shape &s, float eps, int threads) {
    share(s.outer, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
            for (int64_t i = 0; i < s.inner; i++)
                normalise(x + row * s.outer_stride + i * s.inner_stride, weight, out + (row * s.inner + i) * s.size,
                          s.size, eps);
    });
}

template <class T>
void add_rms_norm(const T *x, const T *y, const T *weight, T *total, T *out, int64_t rows, int64_t size, float eps,
                  int threads) {
    share(rows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T *a = x + row * size, *b = y + row * size;
            T *t = total + row * size;
            over(size, [&](int64_t i, int64_t n) { store_some(t + i, load_some(a + i, n) + load_some(b + i, n), n); });
            normalise(t, weight, out + row * size, size, eps);
        }
    });
}

// Pairs (i, i + size / 2) by angles that the tables hold once for each element, signs included.
template <class T>
void rotate(const T *x, const T *cos, const T *sin, T *out, const Shape &s, int threads) {
    share(s.outer, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T *c = cos + row * s.size, *d = sin + row * s.size;
            for (int64_t head = 0; head < s.inner; head++) {
                const T *h = x + row * s.outer_stride + head * s.inner_stride;
                T *o = out + (row * s.inner + head) * s.size;
                int64_t half = s.size / 2;
                over(half, [&](int64_t i, int64_t n) {
                    vf low = load_some(h + i, n), high = load_some(h + half + i, n);
                    store_some(o + i, low * load_some(c + i, n) + high * load_some(d + i, n), n);
                    vf turned = high * load_some(c + half + i, n) + low * load_some(d + half + i, n);
                    store_some(o + half + i, turned, n);
                });
            }
        }
    });
}

enum Activation { SILU, GELU, GELU_TANH };

INLINE vf activate(int kind, vf x) {
    if (kind == SILU) return x / (1.0f + exponential(-x));
    if (kind == GELU) return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
    return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
}

template <class T, int KIND> void gated_rows(const T *x, T *out, int64_t rows, int64_t inner, int64_t stride, int threads) {
    share(rows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T *gate = x + row * stride, *up = gate + inner;
            over(inner, [&](int64_t i, int64_t n) {
                vf on = activate(KIND, load_some(gate + i, n));
                store_some(out + row * inner + i, on * load_some(up + i, n), n);
            });
        }
    });
}

template <class T> void gated(int kind, const T *x, T *out, int64_t rows, int64_t inner, int64_t stride, int threads) {
    if (kind == SILU) return gated_rows<T, SILU>(x, out, rows, inner, stride, threads);
    if (kind == GELU) return gated_rows<T, GELU>(x, out, rows, inner, stride, threads);
    return gated_rows<T, GELU_TANH>(x, out, rows, inner, stride, threads);
}

} // namespace

#define OPS(SUFFIX, T)                                                                                                  \
    extern "C" void tandem_rms_norm_##SUFFIX(const T *x, const T *weight, T *out, int64_t outer, int64_t inner,         \
                                             int64_t size, int64_t outer_stride, int64_t inner_stride, float eps,       \
                                             int threads) {                                                             \
        rms_norm(x, weight, out, {outer, inner, size, outer_stride, inner_stride}, eps, threads);                       \
    }                                                                                                                   \
    extern "C" void tandem_add_rms_norm_##SUFFIX(const T *x, const T *y, const T *weight, T *total, T *out,             \
                                                 int64_t rows, int64_t size, float eps, int threads) {                  \
        add_rms_norm(x, y, weight, total, out, rows, size, eps, threads);                                               \
    }                                                                                                                   \
    extern "C" void tandem_rotate_##SUFFIX(const T *x, const T *cos, const T *sin, T *out, int64_t outer,               \
                                           int64_t inner, int64_t size, int64_t outer_stride, int64_t inner_stride,     \
                                           int threads) {                                                               \
        rotate(x, cos, sin, out, {outer, inner, size, outer_stride, inner_stride}, threads);                            \
    }                                                                                                                   \
    extern "C" void tandem_gated_##SUFFIX(int kind, const T *x, T *out, int64_t rows, int64_t inner, int64_t stride,    \
                                          int threads) {                                                                \
        gated(kind, x, out, rows, inner, stride, threads);                                                              \
    }
OPS(bf16, bf16)
OPS(f32, float)
