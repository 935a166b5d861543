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
    const int64_t *nodes;       // [rows] how many of a row's last new tokens are a tree; null: none of any row
    const int64_t *lineage;     // [tokens] which of its row's nodes a node sees, as bits
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

// Brings the keys or values at these offsets nearer. Pages lie anywhere, and no processor guesses the next one.
template <class T> INLINE void fetch(const T *plane, const int64_t *offsets, int64_t count, int64_t dim) {
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int64_t k = 0; k < count; k++)
        for (int64_t i = 0; i < dim; i += LINE) __builtin_prefetch(plane + offsets[k] + i);
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

// Where a row's tree begins, if it has one; else behind all of its positions.
INLINE int64_t tree_of(const Plan &plan, int64_t row) {
    return plan.starts[row] + plan.counts[row] - (plan.nodes ? plan.nodes[row] : 0);
}

INLINE uint64_t lineage_of(const Plan &plan, int64_t row, int64_t slot) {
    return (uint64_t)plan.lineage[plan.tokens[row] + slot - plan.starts[row]];
}

// The position of what lies in a slot: that of its depth within a tree.
INLINE int64_t position_of(const Plan &plan, int64_t row, int64_t slot, int64_t tree) {
    return slot < tree ? slot : tree + __builtin_popcountll(lineage_of(plan, row, slot)) - 1;
}

// Hides the nodes of a tree that a node does not see: all but those before it on its path, within the window.
INLINE void prune(const Plan &plan, const Layer &layer, int64_t row, int64_t slot, int64_t tree, int64_t from,
                  int64_t count, float *scores) {
    uint64_t seen = lineage_of(plan, row, slot);
    int64_t least = first_visible(layer, position_of(plan, row, slot, tree));
    for (int64_t k = tree > from ? tree - from : 0; k < count; k++) {
        bool visible = from + k <= slot && (seen >> (from + k - tree) & 1);
        if (!visible || position_of(plan, row, from + k, tree) < least) scores[k] = -INF;
    }
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

// Values of keys that lie anywhere, and of keys that were laid side by side.
template <class T> struct Scattered {
    const T *values;
    const int64_t *offsets;
    int64_t count;
};
template <class T> struct Dense;
template <> struct Dense<float> {
    const float *values;
    int64_t stride, count;
};

INLINE const float *value_of(const Scattered<float> &from, int64_t k) { return from.values + from.offsets[k]; }
INLINE const bf16 *value_of(const Scattered<bf16> &from, int64_t k) { return from.values + from.offsets[k]; }
INLINE const float *value_of(const Dense<float> &from, int64_t k) { return from.values + k * from.stride; }

// out[query][dim] += weights[query][0..count) * values, for QUERIES queries and two vectors of the dimension at once.
template <int QUERIES, class From>
INLINE void multiply(const float *weights, const From &from, float *out, int64_t dim) {
    int64_t i = 0;
    for (; i + 2 * LANES <= dim; i += 2 * LANES) {
        vf total[QUERIES][2];
        for (int q = 0; q < QUERIES; q++)
            for (int v = 0; v < 2; v++) total[q][v] = load(out + q * dim + i + v * LANES);
        for (int64_t k = 0; k < from.count; k++) {
            auto value = value_of(from, k) + i;
            vf first = load(value), second = load(value + LANES);
#pragma GCC unroll 8
            for (int q = 0; q < QUERIES; q++) {
                total[q][0] += weights[q * BLOCK + k] * first;
                total[q][1] += weights[q * BLOCK + k] * second;
            }
        }
        for (int q = 0; q < QUERIES; q++)
            for (int v = 0; v < 2; v++) store(out + q * dim + i + v * LANES, total[q][v]);
    }
    if (i < dim) {
        int64_t low = dim - i < LANES ? dim - i : LANES, high = dim - i - low;
        vf total[QUERIES][2];
        for (int q = 0; q < QUERIES; q++) {
            total[q][0] = load_some(out + q * dim + i, low);
            total[q][1] = high ? load_some(out + q * dim + i + low, high) : (vf){};
        }
        for (int64_t k = 0; k < from.count; k++) {
            auto value = value_of(from, k) + i;
            vf first = load_some(value, low), second = high ? load_some(value + low, high) : (vf){};
#pragma GCC unroll 8
            for (int q = 0; q < QUERIES; q++) {
                total[q][0] += weights[q * BLOCK + k] * first;
                total[q][1] += weights[q * BLOCK + k] * second;
            }
        }
        for (int q = 0; q < QUERIES; q++) {
            store_some(out + q * dim + i, total[q][0], low);
            if (high) store_some(out + q * dim + i + low, total[q][1], high);
        }
    }
}

#ifdef TANDEM_BF16_DOT
// Two keys' values interleaved, [key pair][dimension]: what the product of bfloat16 pairs takes.
struct Pairs {
    const uint32_t *units;
    int64_t stride, count;
};

INLINE __m512i some_of(const bf16 *p, int64_t n) {
    return _mm512_maskz_loadu_epi16(n >= 32 ? ~(__mmask32)0 : (__mmask32)((1u << n) - 1), p);
}

INLINE void pair_of(const Scattered<bf16> &from, int64_t k, int64_t i, int64_t n, __m512bh *out) {
    const int16_t o = 32; // of the second source
    const __m512i low = _mm512_set_epi16(o + 15, 15, o + 14, 14, o + 13, 13, o + 12, 12, o + 11, 11, o + 10, 10, o + 9, 9,
                                         o + 8, 8, o + 7, 7, o + 6, 6, o + 5, 5, o + 4, 4, o + 3, 3, o + 2, 2, o + 1, 1,
                                         o, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512i a = some_of(from.values + from.offsets[k] + i, n), b = _mm512_setzero_si512();
    if (k + 1 < from.count) b = some_of(from.values + from.offsets[k + 1] + i, n);
    out[0] = (__m512bh)_mm512_permutex2var_epi16(a, low, b);
    out[1] = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
}

INLINE void pair_of(const Pairs &from, int64_t k, int64_t i, int64_t, __m512bh *out) {
    const uint32_t *units = from.units + k / 2 * from.stride + i;
    out[0] = (__m512bh)_mm512_loadu_si512(units);
    out[1] = (__m512bh)_mm512_loadu_si512(units + 16);
}

// `multiply` with weights rounded to bfloat16, as the values are: two keys at once.
template <int QUERIES, class From>
INLINE void multiply_pairs(const float *weights, const From &from, float *out, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 32) {
        int64_t n = dim - i < 32 ? dim - i : 32, low = n < 16 ? n : 16, high = n - low;
        __m512 total[QUERIES][2];
        for (int q = 0; q < QUERIES; q++) {
            total[q][0] = (__m512)load_some(out + q * dim + i, low);
            total[q][1] = high ? (__m512)load_some(out + q * dim + i + low, high) : _mm512_setzero_ps();
        }
        for (int64_t k = 0; k < from.count; k += 2) {
            __m512bh value[2];
            pair_of(from, k, i, n, value);
#pragma GCC unroll 8
            for (int q = 0; q < QUERIES; q++) {
                int32_t pair;
                memcpy(&pair, weights + q * BLOCK + k / 2, 4);
                __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
                total[q][0] = _mm512_dpbf16_ps(total[q][0], value[0], weight);
                total[q][1] = _mm512_dpbf16_ps(total[q][1], value[1], weight);
            }
        }
        for (int q = 0; q < QUERIES; q++) {
            store_some(out + q * dim + i, (vf)total[q][0], low);
            if (high) store_some(out + q * dim + i + low, (vf)total[q][1], high);
        }
    }
}

// A row of weights to bfloat16, in its own first half.
INLINE void round_weights(float *weights) {
    for (int k = 0; k < BLOCK; k += 32) {
        __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)load(weights + k + 16), (__m512)load(weights + k));
        memcpy(weights + k / 2, &pairs, sizeof pairs);
    }
}

template <int QUERIES> INLINE void add_some(const float *weights, const Scattered<bf16> &from, float *out, int64_t dim) {
    multiply_pairs<QUERIES>(weights, from, out, dim);
}
template <int QUERIES> INLINE void add_some(const float *weights, const Pairs &from, float *out, int64_t dim) {
    multiply_pairs<QUERIES>(weights, from, out, dim);
}
#else
template <int QUERIES> INLINE void add_some(const float *weights, const Scattered<bf16> &from, float *out, int64_t dim) {
    multiply<QUERIES>(weights, from, out, dim);
}
#endif
template <int QUERIES, class From> INLINE void add_some(const float *weights, const From &from, float *out, int64_t dim) {
    multiply<QUERIES>(weights, from, out, dim);
}

template <class T> INLINE void finish_weights(float *weights) {
#ifdef TANDEM_BF16_DOT
    if (sizeof(T) == 2) round_weights(weights);
#endif
    (void)weights;
}

template <class From>
INLINE void add_values(const float *weights, const From &from, float *out, int64_t dim, int64_t queries) {
    int64_t q = 0;
    for (; q + 8 <= queries; q += 8) add_some<8>(weights + q * BLOCK, from, out + q * dim, dim);
    weights += q * BLOCK, out += q * dim;
    switch (queries - q) {
    case 1: return add_some<1>(weights, from, out, dim);
    case 2: return add_some<2>(weights, from, out, dim);
    case 3: return add_some<3>(weights, from, out, dim);
    case 4: return add_some<4>(weights, from, out, dim);
    case 5: return add_some<5>(weights, from, out, dim);
    case 6: return add_some<6>(weights, from, out, dim);
    case 7: return add_some<7>(weights, from, out, dim);
    }
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
    int64_t places[2][BLOCK], *offsets = places[0], *after = places[1];
    int64_t count = end - begin < BLOCK ? end - begin : BLOCK;
    locate(plan, layer, row, head, begin, count, offsets);
    fetch(keys, offsets, count, dim);
    for (int64_t first = begin, next; first < end; first += BLOCK, count = next) {
        fetch(values, offsets, count, dim);
        next = end - first - count < BLOCK ? end - first - count : BLOCK;
        locate(plan, layer, row, head, first + BLOCK, next, after);
        for (int64_t k = 0; k < count; k += TILE) {
            const T *tile[TILE];
            for (int64_t i = 0; i < TILE; i++) tile[i] = keys + offsets[k + i < count ? k + i : count - 1];
            for (int64_t g = 0; g < group; g++)
                score(t.query + token * t.query_token + (head * group + g) * t.query_head, tile, dim,
                      scores + g * BLOCK + k);
        }
        fetch(keys, after, next, dim);
        for (int64_t g = 0; g < group; g++) {
            float *mine = scores + g * BLOCK;
            for (int64_t k = 0; k < count; k += LANES) store(mine + k, scaled(load(mine + k), layer));
            for (int64_t k = count; k < BLOCK; k++) mine[k] = -INF;
            rescale(out + g * dim, dim, soften(mine, best[g], total[g]));
            finish_weights<T>(mine);
        }
        add_values(scores, Scattered<T>{values, offsets, count}, out, dim, group);
        int64_t *swap = offsets;
        offsets = after;
        after = swap;
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
    constexpr int WIDE = LANES == 16 ? 4 : 2; // fills the registers
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

// The values of a block, laid out once where many queries use them.
template <class T>
INLINE void add_block(const float *weights, const Scattered<T> &from, float *out, int64_t dim, int64_t queries,
                      float *block) {
    if (queries <= 8) return add_values(weights, from, out, dim, queries);
#ifdef TANDEM_BF16_DOT
    if constexpr (sizeof(T) == 2) {
        int64_t stride = (dim + 31) / 32 * 32;
        uint32_t *units = (uint32_t *)block;
        for (int64_t k = 0; k < from.count; k += 2)
            for (int64_t i = 0; i < dim; i += 32) {
                __m512bh pair[2];
                pair_of(from, k, i, dim - i, pair);
                memcpy(units + k / 2 * stride + i, pair, sizeof pair);
            }
        return add_values(weights, Pairs{units, stride, from.count}, out, dim, queries);
    }
#endif
    for (int64_t k = 0; k < from.count; k++)
        over(dim, [&](int64_t i, int64_t n) {
            store_some(block + k * dim + i, load_some(from.values + from.offsets[k] + i, n), n);
        });
    add_values(weights, Dense<float>{block, dim, from.count}, out, dim, queries);
}

// A chunk's queries [first, first + count) of one row and the heads of one KV head, in rows ordered (token, head).
template <class T>
void chunk(const Plan &plan, const Layer &layer, const Tensors<T> &t, int64_t row, int64_t first, int64_t count,
           int64_t head) {
    int64_t group = layer.heads / layer.kv_heads, dim = layer.dim, rows = count * group;
    int64_t units = (dim + Unit<T>::SIZE - 1) / Unit<T>::SIZE;
    const T *keys = (const T *)layer.keys, *values = (const T *)layer.values;
    float *out = scratch(rows * (dim + BLOCK + 2 + units) + BLOCK * (units + dim + 32)), *scores = out + rows * dim;
    float *best = scores + rows * BLOCK, *total = best + rows, *block = total + rows;
    uint32_t *query = (uint32_t *)(block + BLOCK * (dim + 32)), *turned = query + rows * units;
    for (int64_t r = 0; r < rows; r++) {
        const T *q = t.query + (plan.tokens[row] + first + r / group) * t.query_token +
                     (head * group + r % group) * t.query_head;
        query[r * units + units - 1] = 0;
        memcpy(query + r * units, q, dim * sizeof(T));
        best[r] = -INF, total[r] = 0;
    }
    for (int64_t i = 0; i < rows * dim; i++) out[i] = 0;
    int64_t position = plan.starts[row] + first, end = position + count, tree = tree_of(plan, row);
    int64_t from = first_visible(layer, position < tree ? position : tree);
    int64_t places[2][BLOCK], *offsets = places[0], *after = places[1];
    int64_t keys_here = end - from < BLOCK ? end - from : BLOCK;
    locate(plan, layer, row, head, from, keys_here, offsets);
    for (int64_t next; from < end; from += BLOCK, keys_here = next) {
        next = end - from - keys_here < BLOCK ? end - from - keys_here : BLOCK;
        fetch(values, offsets, keys_here, dim);
        locate(plan, layer, row, head, from + BLOCK, next, after);
        transpose(keys, offsets, keys_here, dim, turned);
        fetch(keys, after, next, dim);
        // Rows whose last key stands before this block have nothing to see in it.
        int64_t r = from > position ? (from - position) * group : 0, skipped = r;
        for (; r + 6 <= rows; r += 6)
            score_tile<T, 6>(query + r * units, turned, units, keys_here, scores + r * BLOCK);
        for (; r + 2 <= rows; r += 2)
            score_tile<T, 2>(query + r * units, turned, units, keys_here, scores + r * BLOCK);
        for (; r < rows; r++) score_tile<T, 1>(query + r * units, turned, units, keys_here, scores + r * BLOCK);
        for (r = skipped; r < rows; r++) {
            int64_t at = position + r / group, high = at + 1 - from;
            int64_t low = first_visible(layer, position_of(plan, row, at, tree)) - from;
            float *mine = scores + r * BLOCK;
            if (high > keys_here) high = keys_here;
            for (int64_t k = 0; k < high; k += LANES) store(mine + k, scaled(load(mine + k), layer));
            for (int64_t k = 0; k < low && k < BLOCK; k++) mine[k] = -INF;
            for (int64_t k = high; k < BLOCK; k++) mine[k] = -INF;
            if (at >= tree) prune(plan, layer, row, at, tree, from, high, mine);
            rescale(out + r * dim, dim, soften(mine, best[r], total[r]));
            finish_weights<T>(mine);
        }
        add_block(scores + skipped * BLOCK, Scattered<T>{values, offsets, keys_here}, out + skipped * dim, dim,
                  rows - skipped, block);
        int64_t *swap = offsets;
        offsets = after;
        after = swap;
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

// [plan, layer, query, key, value, out, strides of token and head of query, key, value]
#define ATTEND(SUFFIX, T)                                                                                               \
    extern "C" void tandem_attend_##SUFFIX(const int64_t *a) {                                                          \
        attend<T>(*at<Plan>(a[0]), *at<Layer>(a[1]),                                                                    \
                  {at<T>(a[2]), at<T>(a[3]), at<T>(a[4]), at<T>(a[5]), a[6], a[7], a[8], a[9], a[10], a[11]});          \
    }
ATTEND(bf16, bf16)
ATTEND(f32, float)
