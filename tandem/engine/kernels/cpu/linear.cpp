// y = x W^T + b (+ residual) for few rows, where reading W is what takes the time. W is row-major, as checkpoints have it.
//
// Each row's sums are made in the same order whatever the number of rows, so that a row does not depend on its batch.
#include "dot.h"

namespace {

constexpr int BLOCK = 16; // outputs that are finished together

// `ROWS` rows of x against `OUTPUTS` rows of W; out[row * BLOCK + output].
template <class T, int ROWS, int OUTPUTS, bool FIRST>
INLINE void tile(const T *x, int64_t x_stride, const T *w, int64_t inputs, float *out) {
    static_assert(ROWS * OUTPUTS <= TILE && BLOCK % OUTPUTS == 0, "sums lie in registers");
    using D = Dot<T>;
    vf total[TILE] = {};
    int64_t i = 0;
    for (; i + D::STEP <= inputs; i += D::STEP) {
        typename D::Register weights[OUTPUTS];
#pragma GCC unroll 16
        for (int n = 0; n < OUTPUTS; n++) {
            // Rows are too short for the hardware to see where reading goes on: in the next block.
            if (FIRST) __builtin_prefetch(w + (n + BLOCK) * inputs + i, 0, 2);
            weights[n] = D::load(w + n * inputs + i);
        }
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++) {
            typename D::Register row = D::load(x + m * x_stride + i);
#pragma GCC unroll 16
            for (int n = 0; n < OUTPUTS; n++) D::add(total[m * OUTPUTS + n], row, weights[n]);
        }
    }
    if (i < inputs) {
        for (int m = 0; m < ROWS; m++) {
            typename D::Register row = D::load_part(x + m * x_stride + i, inputs - i);
            for (int n = 0; n < OUTPUTS; n++)
                D::add(total[m * OUTPUTS + n], row, D::load_part(w + n * inputs + i, inputs - i));
        }
    }
    float flat[TILE];
    store_sums(total, flat);
    for (int m = 0; m < ROWS; m++) memcpy(out + m * BLOCK, flat + m * OUTPUTS, OUTPUTS * sizeof(float));
}

// One row against one row: outputs that are left over when a block is not full.
template <class T> INLINE float single(const T *x, const T *w, int64_t inputs) {
    using D = Dot<T>;
    vf total = {};
    int64_t i = 0;
    for (; i + D::STEP <= inputs; i += D::STEP) D::add(total, D::load(x + i), D::load(w + i));
    if (i < inputs) D::add(total, D::load_part(x + i, inputs - i), D::load_part(w + i, inputs - i));
    return sum(total);
}

template <class T> struct Job {
    const T *x, *w, *bias, *residual;
    void *y;
    int64_t rows, inputs, outputs, x_stride, residual_stride;
    bool wide; // y is float32 whatever T is
};

template <class T> INLINE void finish(const Job<T> &job, int64_t row, int64_t first, int64_t count, const float *sums) {
    over(count, [&](int64_t i, int64_t n) {
        vf y = load_some(sums + i, n);
        if (job.bias) y += load_some(job.bias + first + i, n);
        if (job.residual) {
            // Rounded before it is added, as two operations would.
            T rounded[LANES];
            store(rounded, y);
            y = load(rounded) + load_some(job.residual + row * job.residual_stride + first + i, n);
        }
        if (job.wide)
            store_some((float *)job.y + row * job.outputs + first + i, y, n);
        else
            store_some((T *)job.y + row * job.outputs + first + i, y, n);
    });
}

template <class T, int ROWS, int OUTPUTS, bool FIRST>
INLINE void rows_of_block(const Job<T> &job, int64_t row, int64_t first) {
    alignas(64) float out[ROWS * BLOCK];
    const T *x = job.x + row * job.x_stride;
    for (int n = 0; n < BLOCK; n += OUTPUTS)
        tile<T, ROWS, OUTPUTS, FIRST>(x, job.x_stride, job.w + (first + n) * job.inputs, job.inputs, out + n);
    for (int m = 0; m < ROWS; m++) finish(job, row + m, first, BLOCK, out + m * BLOCK);
}

// The rows that meet a block's weights as they come from memory, as many as registers allow: their products cost no time
// of their own. Returns how many.
template <class T> INLINE int64_t first_rows(const Job<T> &job, int64_t first) {
    if constexpr (TILE >= 16) switch (job.rows < 8 ? job.rows : 8) {
        case 8: return rows_of_block<T, 8, 2, true>(job, 0, first), 8;
        case 7: return rows_of_block<T, 7, 2, true>(job, 0, first), 7;
        case 6: return rows_of_block<T, 6, 2, true>(job, 0, first), 6;
        case 5: return rows_of_block<T, 5, 2, true>(job, 0, first), 5;
        case 4: return rows_of_block<T, 4, 4, true>(job, 0, first), 4;
        case 3: return rows_of_block<T, 3, 4, true>(job, 0, first), 3;
        }
    if (job.rows >= 2) return rows_of_block<T, 2, TILE / 2, true>(job, 0, first), 2;
    if (job.rows == 0) return 0; // a chunk of which nothing is wanted
    return rows_of_block<T, 1, TILE, true>(job, 0, first), 1;
}

template <class T> void blocks(const Job<T> &job, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block * BLOCK, row = 0;
        if (first + BLOCK > job.outputs) {
            float out[BLOCK];
            for (; row < job.rows; row++) {
                for (int64_t n = first; n < job.outputs; n++)
                    out[n - first] = single(job.x + row * job.x_stride, job.w + n * job.inputs, job.inputs);
                finish(job, row, first, job.outputs - first, out);
            }
            continue;
        }
        row = first_rows(job, first);
        if constexpr (TILE >= 16)
            for (; row + 4 <= job.rows; row += 4) rows_of_block<T, 4, 4, false>(job, row, first);
        for (; row + 2 <= job.rows; row += 2) rows_of_block<T, 2, TILE / 2, false>(job, row, first);
        for (; row < job.rows; row++) rows_of_block<T, 1, TILE, false>(job, row, first);
    }
}

template <class T> void linear(const Job<T> &job, int threads) {
    share((job.outputs + BLOCK - 1) / BLOCK, threads, [&](int64_t begin, int64_t end) { blocks(job, begin, end); });
}

} // namespace

// [x, w, bias, residual, y, rows, inputs, outputs, x_stride, residual_stride, wide, threads]: x [rows, inputs], rows
// x_stride elements apart; w [outputs, inputs], bias [outputs] or null, both dense; residual [rows, outputs] or null;
// y [rows, outputs], dense, float32 when `wide`.
#define LINEAR(SUFFIX, T)                                                                                               \
    extern "C" void tandem_linear_##SUFFIX(const int64_t *a) {                                                          \
        linear<T>({at<T>(a[0]), at<T>(a[1]), at<T>(a[2]), at<T>(a[3]), at<void>(a[4]), a[5], a[6], a[7], a[8], a[9],    \
                   a[10] != 0},                                                                                         \
                  (int)a[11]);                                                                                          \
    }
LINEAR(bf16, bf16)
LINEAR(f32, float)
