// Rows of WaterfillKey and TurboQuantLog (polykv/codecs): blocks of 16 codes of 1 to 7 bits, norms as 8-bit logarithms.
#pragma once

#include "rows.h"

constexpr int CODES = 16;  // in a block
constexpr int MAX_BLOCKS = MAX_DIM / CODES;

// N bytes as one word. In registers: a memcpy of 3 bytes would go through the stack.
template <int N>
static inline uint64_t word_of(const uint8_t* from) {
    if constexpr (N == 1) return from[0];
    if constexpr (N == 2) return load<uint16_t>(from);
    if constexpr (N == 3) return load<uint16_t>(from) | uint64_t(from[2]) << 16;
    if constexpr (N == 4) return load<uint32_t>(from);
    if constexpr (N > 4) return load<uint32_t>(from) | word_of<N - 4>(from + 4) << 32;
}

// LANES codes of BITS bits, from code `first` of a block on; a block's two words hold eight codes each.
template <int BITS>
static inline Ints block_codes(const uint64_t* words, int first) {
    constexpr int EACH = BITS <= 4 ? 8 : 4;  // codes in 32 bits
    Ints found{};
    for (int lane = 0; lane < LANES; lane += EACH) {
        const int code = first + lane;
        const int32_t bits = int32_t(words[code / 8] >> (code % 8 / EACH * EACH * BITS));
        found = lane_index() < lane ? found : bits | Ints{};
    }
    const Ints place = (lane_index() + first) % EACH;
    return (found >> place * BITS) & ((1 << BITS) - 1);
}

// out[t] += level * factor[t] * scale for one block of `n` tokens; `stride` in bytes, rows of `out` `dim` apart.
template <int BITS>
static void add_block(const uint8_t* from, int64_t stride, const float* levels, const float* factor,
                      float scale, int n, int dim, float* out) {
    for (int t = 0; t < n; t++, from += stride, out += dim) {
        const uint64_t words[2] = {word_of<BITS>(from), word_of<BITS>(from + BITS)};
        for (int i = 0; i < CODES; i += LANES) {
            const Floats level = lookup(levels, block_codes<BITS>(words, i), 1 << BITS);
            store(out + i, load<Floats>(out + i) + level * (factor[t] * scale));
        }
    }
}

using AddBlock = void (*)(const uint8_t*, int64_t, const float*, const float*, float, int, int, float*);
constexpr AddBlock ADD_BLOCK[] = {nullptr,      add_block<1>, add_block<2>, add_block<3>,
                                  add_block<4>, add_block<5>, add_block<6>, add_block<7>};

// The norms of `n` tokens of (batch, head) number `head`.
static inline void log_norms(const Packed& p, int64_t head, int64_t first, int n, float* norm) {
    const uint8_t* code = head_of(p.scale, p.scale_strides, p, head) + first * p.scale_strides[2];
    const float largest = float_of_half(p.largest[head]);
    for (int t = 0; t < n; t++, code += p.scale_strides[2]) norm[t] = p.log_values[*code] * largest;
}

// TurboQuantLog: decode `n` tokens into `out` (n, dim) up to their norms, `factor` (n).
static void turboquant_log_rows(const Packed& p, int64_t head, int64_t first, int n, float* out,
                                float* factor) {
    const uint8_t* codes = head_of(p.codes, p.code_strides, p, head) + first * p.code_strides[2];
    const int dim = int(p.dim);
    float ones[64];
    for (float& one : ones) one = 1.0f;
    memset(out, 0, sizeof(float) * n * dim);
    for (int i = 0; i < dim; i += CODES, codes += 2 * p.bits)
        ADD_BLOCK[p.bits](codes, p.code_strides[2], p.levels + p.bits * LEVELS, ones, 1.0f, n, dim, out + i);
    log_norms(p, head, first, n, factor);
}

// What the tokens of a head share: its blocks, and its mean in the order of the blocks. R_t mean is
// fixed + by_cos * cos[pair] + by_sin * sin[pair], with the channels' scale and the Hadamard's signs and factor.
struct Plan {
    alignas(64) float fixed[MAX_DIM], by_cos[MAX_DIM], by_sin[MAX_DIM];
    float to_query[MAX_DIM];  // what a query's channels are multiplied by before the Hadamard
    int32_t pair[MAX_DIM];
    uint8_t order[MAX_DIM];
    int width[MAX_BLOCKS], offset[MAX_BLOCKS];  // bits; bytes from the start of a token's codes
    float rms[MAX_BLOCKS];
};

static void plan_blocks(const Packed& p, int64_t head, Plan& plan) {
    const int n_blocks = int(p.dim) / CODES, bytes = (n_blocks + 1) / 2;
    const int64_t batch_start = head / p.heads * p.heads;
    int offset = 0;
    for (int64_t h = batch_start; h <= head; h++)
        for (int j = 0; j < n_blocks; j++) {
            const int width = p.widths[h * bytes + j / 2] >> 4 * (j & 1) & 15;
            if (h == head) plan.width[j] = width, plan.offset[j] = offset;
            offset += 2 * width;
        }
    for (int j = 0; j < n_blocks; j++) plan.rms[j] = float_of_half(p.block_rms[head * n_blocks + j]);
}

static void plan_mean(const Packed& p, int64_t head, Plan& plan) {
    const int dim = int(p.dim);
    const uint16_t *mean = p.mean + head * dim, *scale = p.channel_scale + head * dim;
    float along[MAX_DIM], across[MAX_DIM];  // what R_t takes of the channel itself, and of its partner
    int32_t pair[MAX_DIM];
    for (int c = 0; c < dim; c++) along[c] = float_of_half(mean[c]), across[c] = 0.0f, pair[c] = -1;
    for (int i = 0; i < p.pairs; i++) {
        const int64_t a = p.first[i], b = p.second[i];
        across[a] = -along[b], across[b] = along[a];
        pair[a] = pair[b] = i;
    }
    memcpy(plan.order, p.order + head * dim, dim);
    for (int i = 0; i < dim; i++) {
        const int c = plan.order[i];
        const float turn = p.signs[i % CODES] * hadamard_scale(CODES), by = float_of_half(scale[c]);
        const bool turns = pair[c] >= 0;
        plan.fixed[i] = turns ? 0.0f : along[c] * by * turn;
        plan.by_cos[i] = turns ? along[c] * by * turn : 0.0f;
        plan.by_sin[i] = across[c] * by * turn;
        plan.pair[i] = turns ? pair[c] : 0;
        plan.to_query[i] = turn / by;
    }
    if (!p.pairs) hadamard_each(plan.fixed, dim);
}

// A query in the domain of the blocks.
static inline void to_blocks(const Plan& plan, int dim, float* q) {
    float sorted[MAX_DIM];
    for (int i = 0; i < dim; i++) sorted[i] = q[plan.order[i]] * plan.to_query[i];
    hadamard_each(sorted, dim);
    memcpy(q, sorted, sizeof(float) * dim);
}

// row += by_cos * cos[pair] + by_sin * sin[pair]; PAIRS, where it is not 0, is the number of pairs and fills vectors.
template <int PAIRS>
static inline void add_turned(const Plan& plan, const float* cos, const float* sin, int dim, float* row) {
    for (int i = 0; i < dim; i += LANES) {
        const Ints pair = load<Ints>(plan.pair + i);
        Floats c, s;
        if constexpr (PAIRS) c = lookup(cos, pair, PAIRS), s = lookup(sin, pair, PAIRS);
        else for (int l = 0; l < LANES; l++) c[l] = cos[pair[l]], s[l] = sin[pair[l]];
        const Floats turned = load<Floats>(plan.by_cos + i) * c + load<Floats>(plan.by_sin + i) * s;
        store(row + i, load<Floats>(row + i) + turned);
    }
}

// WaterfillKey: decode `n` tokens of head number `head` into `out` (n, dim), R_t mean included.
static void waterfill_rows(const Packed& p, const Plan& plan, int64_t head, int64_t first, int n, float* out,
                           float* factor) {
    const uint8_t* codes = head_of(p.codes, p.code_strides, p, head) + first * p.code_strides[2];
    const int dim = int(p.dim);
    for (int t = 0; t < n; t++) {
        float* row = out + t * dim;
        memcpy(row, plan.fixed, sizeof(float) * dim);
        if (!p.pairs) continue;
        const float *cos = p.cos + (first + t) * p.pairs, *sin = p.sin + (first + t) * p.pairs;
        auto* add = p.pairs == 32 ? add_turned<32> : p.pairs == 64 ? add_turned<64> : add_turned<0>;
        add(plan, cos, sin, dim, row);
        hadamard_each(row, dim);
    }
    log_norms(p, head, first, n, factor);
    for (int j = 0; j < dim / CODES; j++)
        ADD_BLOCK[plan.width[j]](codes + plan.offset[j], p.code_strides[2],
                                 p.levels + plan.width[j] * LEVELS, factor, plan.rms[j], n, dim,
                                 out + j * CODES);
    for (int t = 0; t < n; t++) factor[t] = 1.0f;
}
