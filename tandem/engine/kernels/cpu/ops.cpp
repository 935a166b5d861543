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

// A token that the table has not gets NaN: its sequence then ends with an error, and no foreign memory is read.
template <class T> void embed(const int64_t *tokens, const T *table, T *out, int64_t count, int64_t rows, int64_t size) {
    for (int64_t i = 0; i < count; i++) {
        if (tokens[i] >= 0 && tokens[i] < rows)
            memcpy(out + i * size, table + tokens[i] * size, size * sizeof(T));
        else
            memset((void *)(out + i * size), 0xff, size * sizeof(T));
    }
}

// Cosines and signed sines of each position, as `rotate` takes them.
template <class T>
void angles(const int64_t *positions, const float *frequencies, T *cos, T *sin, int64_t count, int64_t half,
            float scaling) {
    for (int64_t i = 0; i < count; i++, cos += 2 * half, sin += 2 * half)
        for (int64_t j = 0; j < half; j++) {
            float phase = (float)positions[i] * frequencies[j];
            cos[j] = cos[half + j] = round_to<T>(std::cos(phase) * scaling);
            sin[half + j] = round_to<T>(std::sin(phase) * scaling);
            sin[j] = round_to<T>(-std::sin(phase) * scaling);
        }
}

} // namespace

// rms_norm: [x, weight, out, outer, inner, size, outer_stride, inner_stride, eps, threads]
// rotate: [x, cos, sin, out, outer, inner, size, outer_stride, inner_stride, threads]
// gated: [activation, x, out, rows, inner, stride, threads]
// embed: [tokens, table, out, count, rows, size]
// angles: [positions, frequencies, cos, sin, count, half, scaling]
#define OPS(SUFFIX, T)                                                                                                  \
    extern "C" void tandem_rms_norm_##SUFFIX(const int64_t *a) {                                                        \
        rms_norm(at<T>(a[0]), at<T>(a[1]), at<T>(a[2]), {a[3], a[4], a[5], a[6], a[7]}, real(a[8]), (int)a[9]);         \
    }                                                                                                                   \
    extern "C" void tandem_rotate_##SUFFIX(const int64_t *a) {                                                          \
        rotate(at<T>(a[0]), at<T>(a[1]), at<T>(a[2]), at<T>(a[3]), {a[4], a[5], a[6], a[7], a[8]}, (int)a[9]);          \
    }                                                                                                                   \
    extern "C" void tandem_gated_##SUFFIX(const int64_t *a) {                                                           \
        gated((int)a[0], at<T>(a[1]), at<T>(a[2]), a[3], a[4], a[5], (int)a[6]);                                        \
    }                                                                                                                   \
    extern "C" void tandem_embed_##SUFFIX(const int64_t *a) {                                                           \
        embed(at<int64_t>(a[0]), at<T>(a[1]), at<T>(a[2]), a[3], a[4], a[5]);                                           \
    }                                                                                                                   \
    extern "C" void tandem_angles_##SUFFIX(const int64_t *a) {                                                          \
        angles(at<int64_t>(a[0]), at<float>(a[1]), at<T>(a[2]), at<T>(a[3]), a[4], a[5], real(a[6]));                   \
    }
OPS(bf16, bf16)
OPS(f32, float)

// Runs recorded calls, [function, arguments] each, in order.
extern "C" void tandem_replay(const int64_t *calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) ((void (*)(const int64_t *))calls[2 * i])(at<const int64_t>(calls[2 * i + 1]));
}
