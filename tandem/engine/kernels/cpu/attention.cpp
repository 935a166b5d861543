// Attention over paged KV: reads keys and values where the pages are, with an online softmax in float32.
//
// One new token (decode): each key is read once for all query heads of its group (Milakov and Gimelshein 2018,
// arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Several (a chunk): tiles of queries against blocks of keys, as
// small matrix products on transposed keys.
#include <vector>

#include "dot.h"

// Mirrors `_Plan` and `_Layer` in native.py.
struct Plan {
    int64_t rows;
    const int64_t *starts;  // [rows]
    const int64_t *counts;  // [rows]
    const int64_t *tokens;  // [rows] index of each row's first token in the batch
    const int64_t *table;   // page numbers of all rows
    const int64_t *offsets; // [rows] where a row's page 0 would stand in `table`; only visible pages do
    int64_t page_size;
    int64_t tasks;
    const int64_t *task_rows;   // [tasks]
    const int64_t *task_firsts; // [tasks] first of the row's new tokens in this task
    int64_t tile;               // new tokens in a task
};

struct Layer {
    void *keys, *values; // [slots, kv_heads, dim]
    int64_t heads, kv_heads, dim;
    int64_t window; // 0: none
    float scale, softcap; // softcap 0: none
    int32_t threads;
};

template <class T> struct Tensors {
    const T *query, *key, *value; // new tokens; heads and tokens at strides
    T *out;                       // [tokens, heads, dim]
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
};

namespace {

constexpr int BLOCK = 64; // keys whose scores are held at once

// Scratch of one thread, kept between calls.
float *scratch(size_t floats) {
    static thread_local std::vector<float> memory;
    if (memory.size() < floats + 16) memory.resize(floats + 16);
    return (float *)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
}

INLINE int64_t slot_of(const Plan &plan, int64_t row, int64_t position) {
    return plan.table[plan.offsets[row] + position / plan.page_size] * plan.page_size + position % plan.page_size;
}

// Element offsets of `count` tokens from `first` on, in a plane, for one KV head.
INLINE void locate(const Plan &plan, const Layer &layer, int64_t row, int64_t head, int64_t first, int64_t count,
                   int64_t *offsets) {
    const int64_t *pages = plan.table + plan.offsets[row];
    int64_t page = first / plan.page_size, within = first % plan.page_size;
    int64_t stride = layer.kv_heads * layer.dim;
    for (int64_t i = 0; i < count; page++, within = 0) {
        int64_t slot = pages[page] * plan.page_size + within;
        int64_t end = i + plan.page_size - within < count ? i + plan.page_size - within : count;
        for (; i < end; i++, slot++) offsets[i] = slot * stride + head * layer.dim;
    }
}

template <class T>
void write(const Plan &plan, const Layer &layer, const Tensors<T> &t, int64_t row, int64_t first, int64_t count,
           int64_t head) {
    T *keys = (T *)layer.keys, *values = (T *)layer.values;
    for (int64_t i = first; i < first + count; i++) {
        int64_t slot = slot_of(plan, row, plan.starts[row] + i), token = plan.tokens[row] + i;
        int64_t at = (slot * layer.kv_heads + head) * layer.dim;
        memcpy(keys + at, t.key + token * t.key_token + head * t.key_head, layer.dim * sizeof(T));
        memcpy(values + at, t.value + token * t.value_token + head * t.value_head, layer.dim * sizeof(T));
    }
}

INLINE int64_t first_visible(const Layer &layer, int64_t position) {
    return layer.window > 0 && position >= layer.window ? position - layer.window + 1 : 0;
}

INLINE vf scaled(vf score, const Layer &layer) {
    score *= layer.scale;
    return layer.softcap > 0 ? layer.softcap * hyperbolic_tangent(score / layer.softcap) : score;
}

// Turns BLOCK scores into weights in place, given the largest and the sum so far; returns what the past is scaled by.
INLINE float soften(float *scores, float &best, float &total) {
    vf most = splat(-INF);
    for (int i = 0; i < BLOCK; i += LANES) {
        vf s = load(scores + i);
        most = s > most ? s : most;
    }
    float higher = largest(most);
    higher = higher > best ? higher : best;
    if (higher == -INF) higher = 0; // nothing is visible yet
    float past = exponential(splat(best - higher))[0];
    vf added = {};
    for (int i = 0; i < BLOCK; i += LANES) {
        vf weight = exponential(load(scores + i) - higher);
        added += weight;
        store(scores + i, weight);
    }
    total = total * past + sum(added);
    best = higher;
    return past;
}

// Scores of TILE keys, all of which are read, against one query.
template <class T> INLINE void score(const T *query, const T *const *keys, int64_t dim, float *out) {
    using D = Dot<T>;
    vf total[TILE] = {};
    int64_t i = 0;
    for (; i + D::STEP <= dim; i += D::STEP) {
        typename D::Register q = D::load(query + i);
#pragma GCC unroll 16
        for (int k = 0; k < TILE; k++) D::add(total[k], q, D::load(keys[k] + i));
    }
    if (i < dim) {
        typename D::Register q = D::load_part(query + i, dim - i);
        for (int k = 0; k < TILE; k++) D::add(total[k], q, D::load_part(keys[k] + i, dim - i));
    }
    store_sums(total, out);
}

// out[query][dim] += weights[query][0..count) * values, for QUERIES queries; VECTORS vectors of dim at once.
template <class T, int QUERIES, int VECTORS>
INLINE void gather_values(const float *weights, const T *values, const int64_t *offsets, int64_t count, float *out,
                          int64_t dim, int64_t n) {
    vf total[QUERIES][VECTORS];
    for (int q = 0; q < QUERIES; q++)
        for (int v = 0; v < VECTORS; v++) total[q][v] = load_some(out + q * dim + v * LANES, n);
    for (int64_t k = 0; k < count; k++) {
        vf value[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) value[v] = load_some(values + offsets[k] + v * LANES, n);
#pragma GCC unroll 8
        for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) total[q][v] += weights[q * BLOCK + k] * value[v];
    }
    for (int q = 0; q < QUERIES; q++)
        for (int v = 0; v < VECTORS; v++) store_some(out + q * dim + v * LANES, total[q][v], n);
}

template <class T, int QUERIES>
INLINE void add_values_of(const float *weights, const T *values, const int64_t *offsets, int64_t count, float *out,
                          int64_t dim) {
    int64_t i = 0;
    for (; i + 2 * LANES <= dim; i += 2 * LANES)
        gather_values<T, QUERIES, 2>(weights, values + i, offsets, count, out + i, dim, LANES);
    for (; i + LANES <= dim; i += LANES)
        gather_values<T, QUERIES, 1>(weights, values + i, offsets, count, out + i, dim, LANES);
    if (i < dim) gather_values<T, QUERIES, 1>(weights, values + i, offsets, count, out + i, dim, dim - i);
}

template <class T>
INLINE void add_values(const float *weights, const T *values, const int64_t *offsets, int64_t count, float *out,
                       int64_t dim, int64_t queries) {
    int64_t q = 0;
    for (; q + 4 <= queries; q += 4) add_values_of<T, 4>(weights + q * BLOCK, values, offsets, count, out + q * dim, dim);
    for (; q + 2 <= queries; q += 2) add_values_of<T, 2>(weights + q * BLOCK, values, offsets, count, out + q * dim, dim);
    for (; q < queries; q++) add_values_of<T, 1>(weights + q * BLOCK, values, offsets, count, out + q * dim, dim);
}

INLINE void rescale(float *out, int64_t dim, float factor) {
    if (factor != 1.0f) over(dim, [&](int64_t i, int64_t n) { store_some(out + i, load_some(out + i, n) * factor, n); });
}

template <class T> INLINE void put(const float *from, float total, T *to, int64_t dim) {
    float factor = 1.0f / total;
    over(dim, [&](int64_t i, int64_t n) { store_some(to + i, load_some(from + i, n) * factor, n); });
}

// One new token of one row, and the query heads of one KV head.
template <class T> void decode(const Plan &plan, const Layer &layer, const Tensors<T> &t, int64_t row, int64_t head) {
    int64_t group = layer.heads / layer.kv_heads, dim = layer.dim, token = plan.tokens[row];
    int64_t end = plan.starts[row] + 1, begin = first_visible(layer, end - 1);
    const T *keys = (const T *)layer.keys, *values = (const T *)layer.values;
    float *out = scratch(group * (dim + BLOCK + 2)), *scores = out + group * dim, *best = scores + group * BLOCK;
    float *total = best + group;
    for (int64_t i = 0; i < group * dim; i++) out[i] = 0;
    for (int64_t g = 0; g < group; g++) best[g] = -INF, total[g] = 0;
    int64_t offsets[BLOCK];
    for (int64_t first = begin; first < end; first += BLOCK) {
        int64_t count = end - first < BLOCK ? end - first : BLOCK;
        locate(plan, layer, row, head, first, count, offsets);
        for (int64_t k = 0; k < count; k += TILE) {
            const T *tile[TILE];
            for (int64_t i = 0; i < TILE; i++) tile[i] = keys + offsets[k + i < count ? k + i : count - 1];
            for (int64_t g = 0; g < group; g++)
                score(t.query + token * t.query_token + (head * group + g) * t.query_head, tile, dim,
                      scores + g * BLOCK + k);
        }
        for (int64_t g = 0; g < group; g++) {
            float *mine = scores + g * BLOCK;
            for (int64_t k = 0; k < count; k += LANES) store(mine + k, scaled(load(mine + k), layer));
            for (int64_t k = count; k < BLOCK; k++) mine[k] = -INF;
            rescale(out + g * dim, dim, soften(mine, best[g], total[g]));
        }
        add_values(scores, values, offsets, count, out, dim, group);
    }
    for (int64_t g = 0; g < group; g++)
        put(out + g * dim, total[g], t.out + (token * layer.heads + head * group + g) * dim, dim);
}

// How a tile of queries meets transposed keys: 32-bit units of one float32 or two bfloat16.
template <class T> struct Unit;
template <> struct Unit<float> {
    static constexpr int SIZE = 1;
    INLINE void add(vf &total, uint32_t query, vu key) {
        float q;
        memcpy(&q, &query, 4);
        total += q * (vf)key;
    }
};
template <> struct Unit<bf16> {
    static constexpr int SIZE = 2;
    INLINE void add(vf &total, uint32_t query, vu key) {
#ifdef TANDEM_BF16_DOT
        total = (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32((int)query), (__m512bh)key);
#else
        uint32_t low = query << 16, high = query & 0xffff0000u;
        float even, odd;
        memcpy(&even, &low, 4);
        memcpy(&odd, &high, 4);
        total += even * (vf)(key << 16);
        total += odd * (vf)(key & 0xffff0000u);
#endif
    }
};

#ifdef TANDEM_AVX512
// 16 rows of 16 units to 16 columns.
INLINE void transpose16(__m512i *r) {
    __m512i a[16], b[16];
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
            b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
        }
    for (int j = 0; j < 4; j++) { // b[4 * i + j]: column 4 * lane + j of rows 4 * i .. 4 * i + 3
        __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), odd = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        __m512i next = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        __m512i last = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        r[j] = _mm512_shuffle_i32x4(low, next, 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(low, next, 0xdd);
        r[4 + j] = _mm512_shuffle_i32x4(odd, last, 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(odd, last, 0xdd);
    }
}
#endif

// keys of `count` tokens to units[unit][BLOCK]; tokens behind `count` repeat the last one.
template <class T> void transpose(const T *keys, const int64_t *offsets, int64_t count, int64_t dim, uint32_t *units) {
    constexpr int SIZE = Unit<T>::SIZE;
    int64_t whole = dim / SIZE, unit = 0;
#ifdef TANDEM_AVX512
    for (; unit + 16 <= whole; unit += 16)
        for (int64_t k = 0; k < BLOCK; k += 16) {
            if (k >= count) break;
            __m512i rows[16];
            for (int i = 0; i < 16; i++)
                rows[i] = _mm512_loadu_si512(keys + offsets[k + i < count ? k + i : count - 1] + unit * SIZE);
            transpose16(rows);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(units + (unit + i) * BLOCK + k, rows[i]);
        }
#endif
    for (int64_t k = 0; k < BLOCK; k++) {
        const T *key = keys + offsets[k < count ? k : count - 1];
        for (int64_t u = unit; u < whole; u++) memcpy(units + u * BLOCK + k, key + u * SIZE, 4);
        if (whole * SIZE < dim) {
            units[whole * BLOCK + k] = 0;
            memcpy(units + whole * BLOCK + k, key + whole * SIZE, sizeof(T));
        }
    }
}

// scores[row][BLOCK] of ROWS queries; `columns` of the keys are real, the rest may be anything.
template <class T, int ROWS>
INLINE void score_tile(const uint32_t *query, const uint32_t *keys, int64_t units, int64_t columns, float *scores) {
    constexpr int WIDE = 2;
    for (int64_t k = 0; k < columns; k += WIDE * LANES) {
        vf total[ROWS][WIDE] = {};
        for (int64_t u = 0; u < units; u++) {
            vu key[WIDE];
            memcpy(key, keys + u * BLOCK + k, sizeof key);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int w = 0; w < WIDE; w++) Unit<T>::add(total[r][w], query[r * units + u], key[w]);
        }
        for (int r = 0; r < ROWS; r++) memcpy(scores + r * BLOCK + k, total[r], sizeof total[r]);
    }
}

// A chunk's queries [first, first + count) of one row and the heads of one KV head, in rows ordered (token, head).
template <class T>
void chunk(const Plan &plan, const Layer &layer, const Tensors<T> &t, int64_t row, int64_t first, int64_t count,
           int64_t head) {
    int64_t group = layer.heads / layer.kv_heads, dim = layer.dim, rows = count * group;
    int64_t units = (dim + Unit<T>::SIZE - 1) / Unit<T>::SIZE;
    const T *keys = (const T *)layer.keys, *values = (const T *)layer.values;
    float *out = scratch(rows * (dim + BLOCK + 2 + units) + BLOCK * (units + dim)), *scores = out + rows * dim;
    float *best = scores + rows * BLOCK, *total = best + rows, *block = total + rows;
    uint32_t *query = (uint32_t *)(block + BLOCK * dim), *turned = query + rows * units;
    for (int64_t r = 0; r < rows; r++) {
        const T *q = t.query + (plan.tokens[row] + first + r / group) * t.query_token +
                     (head * group + r % group) * t.query_head;
        query[r * units + units - 1] = 0;
        memcpy(query + r * units, q, dim * sizeof(T));
        best[r] = -INF, total[r] = 0;
    }
    for (int64_t i = 0; i < rows * dim; i++) out[i] = 0;
    int64_t position = plan.starts[row] + first, end = position + count, offsets[BLOCK], identity[BLOCK];
    for (int64_t k = 0; k < BLOCK; k++) identity[k] = k * dim;
    for (int64_t from = first_visible(layer, position); from < end; from += BLOCK) {
        int64_t keys_here = end - from < BLOCK ? end - from : BLOCK;
        locate(plan, layer, row, head, from, keys_here, offsets);
        transpose(keys, offsets, keys_here, dim, turned);
        for (int64_t k = 0; k < keys_here; k++)
            over(dim, [&](int64_t i, int64_t n) {
                store_some(block + k * dim + i, load_some(values + offsets[k] + i, n), n);
            });
        // Rows whose last key stands before this block have nothing to see in it.
        int64_t r = from > position ? (from - position) * group : 0, skipped = r;
        for (; r + 6 <= rows; r += 6)
            score_tile<T, 6>(query + r * units, turned, units, keys_here, scores + r * BLOCK);
        for (; r + 2 <= rows; r += 2)
            score_tile<T, 2>(query + r * units, turned, units, keys_here, scores + r * BLOCK);
        for (; r < rows; r++) score_tile<T, 1>(query + r * units, turned, units, keys_here, scores + r * BLOCK);
        for (r = skipped; r < rows; r++) {
            int64_t at = position + r / group, low = first_visible(layer, at) - from, high = at + 1 - from;
            float *mine = scores + r * BLOCK;
            if (high > keys_here) high = keys_here;
            for (int64_t k = 0; k < high; k += LANES) store(mine + k, scaled(load(mine + k), layer));
            for (int64_t k = 0; k < low && k < BLOCK; k++) mine[k] = -INF;
            for (int64_t k = high; k < BLOCK; k++) mine[k] = -INF;
            rescale(out + r * dim, dim, soften(mine, best[r], total[r]));
        }
        add_values(scores + skipped * BLOCK, block, identity, keys_here, out + skipped * dim, dim, rows - skipped);
    }
    for (int64_t r = 0; r < rows; r++)
        put(out + r * dim, total[r],
            t.out + ((plan.tokens[row] + first + r / group) * layer.heads + head * group + r % group) * dim, dim);
}

// A chunk's tasks read what others of its row write: all writing is done first. Decoding rows write within their task.
template <class T> void attend(const Plan &plan, const Layer &layer, const Tensors<T> &t) {
    int64_t heads = layer.kv_heads;
    if (plan.tasks > plan.rows || layer.threads <= 1) {
        for (int64_t row = 0; row < plan.rows; row++)
            for (int64_t head = 0; head < heads; head++) write(plan, layer, t, row, 0, plan.counts[row], head);
    }
    bool written = plan.tasks > plan.rows || layer.threads <= 1;
    share_unevenly(plan.tasks * heads, layer.threads, [&](int64_t task) {
        int64_t row = plan.task_rows[task / heads], first = plan.task_firsts[task / heads], head = task % heads;
        int64_t left = plan.counts[row] - first, count = left < plan.tile ? left : plan.tile;
        if (!written) write(plan, layer, t, row, first, count, head);
        if (plan.counts[row] == 1)
            decode(plan, layer, t, row, head);
        else
            chunk(plan, layer, t, row, first, count, head);
    });
}

} // namespace

#define ATTEND(SUFFIX, T)                                                                                               \
    extern "C" void tandem_attend_##SUFFIX(const Plan *plan, const Layer *layer, const T *query, const T *key,          \
                                           const T *value, T *out, int64_t query_token, int64_t query_head,             \
                                           int64_t key_token, int64_t key_head, int64_t value_token,                    \
                                           int64_t value_head) {                                                        \
        attend<T>(*plan, *layer,                                                                                        \
                  {query, key, value, out, query_token, query_head, key_token, key_head, value_token, value_head});     \
    }
ATTEND(bf16, bf16)
ATTEND(f32, float)
