// Rows of WaterfillKey and TurboQuantLog (polykv/codecs) and their trellis-coded variants: blocks of 16 codes of 1 to 7
// bits, norms as 8-bit logarithms.
#pragma once

#include "trellis.h"

constexpr int MAX_BLOCKS = MAX_DIM / CODES;

// The two halves of a block, eight codes each, in the low bits; above them is anything. Reads no further than the block.
template <int BITS>
static inline void halves_of(const uint8_t* block, uint64_t* words) {
    if constexpr (BITS == 1) words[0] = block[0], words[1] = block[1];
    if constexpr (BITS == 2) words[0] = load<uint16_t>(block), words[1] = load<uint16_t>(block + 2);
    if constexpr (BITS == 3) words[0] = load<uint32_t>(block), words[1] = load<uint32_t>(block + 2) >> 8;
    if constexpr (BITS > 3) {
        words[0] = load<uint64_t>(block);
        words[1] = load<uint64_t>(block + 2 * BITS - 8) >> (64 - 8 * BITS);
    }
}

// LANES codes of BITS bits, from code `first` of a block on, whose halves are `words`.
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

// The levels of one block of `n` tokens; with ADD, times factor[t] and `scale`, added to what `out` holds. `stride` in
// bytes; rows of `out` are `dim` apart.
template <int BITS, bool ADD>
static void block_rows(const uint8_t* from, int64_t stride, const float* levels, const float* factor,
                       float scale, int n, int dim, float* out) {
    for (int t = 0; t < n; t++, from += stride, out += dim) {
        uint64_t words[2];
        halves_of<BITS>(from, words);
        for (int i = 0; i < CODES; i += LANES) {
            const Floats level = lookup(levels, block_codes<BITS>(words, i), 1 << BITS);
            store(out + i, ADD ? load<Floats>(out + i) + level * (factor[t] * scale) : level);
        }
    }
}

using BlockRows = void (*)(const uint8_t*, int64_t, const float*, const float*, float, int, int, float*);
template <bool ADD>
constexpr BlockRows BLOCK_ROWS[] = {nullptr,            block_rows<1, ADD>, block_rows<2, ADD>, block_rows<3, ADD>,
                                    block_rows<4, ADD>, block_rows<5, ADD>, block_rows<6, ADD>, block_rows<7, ADD>};

template <bool ADD>
constexpr BlockRows TRELLIS_ROWS[] = {nullptr,              trellis_rows<1, ADD>, trellis_rows<2, ADD>, trellis_rows<3, ADD>,
                                      trellis_rows<4, ADD>, trellis_rows<5, ADD>, trellis_rows<6, ADD>};

// How blocks of this many bits are decoded, and by which levels.
template <bool ADD>
static inline BlockRows rows_of(const Packed& p, int bits) {
    return p.trellis ? TRELLIS_ROWS<ADD>[bits] : BLOCK_ROWS<ADD>[bits];
}

static inline const float* levels_of(const Packed& p, int bits) {
    return p.trellis ? p.trellis : p.levels + bits * LEVELS;
}

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
    for (int i = 0; i < dim; i += CODES, codes += 2 * p.bits)
        rows_of<false>(p, p.bits)(codes, p.code_strides[2], levels_of(p, p.bits), nullptr, 1.0f, n, dim, out + i);
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

// R_t mean of `n` tokens, in the order of the blocks and through their Hadamard, into `out` (n, dim); PAIRS, where not 0,
// is the number of pairs and fills vectors.
template <int PAIRS>
static void mean_rows(const Plan& plan, const float* cos, const float* sin, int pairs, int n, int dim, float* out) {
    constexpr int N = CODES / LANES;
    for (int start = 0; start < dim; start += CODES) {
        Floats fixed[N], by_cos[N], by_sin[N];
        Ints pair[N];
        for (int i = 0; i < N; i++) {
            const int at = start + i * LANES;
            fixed[i] = load<Floats>(plan.fixed + at), pair[i] = load<Ints>(plan.pair + at);
            by_cos[i] = load<Floats>(plan.by_cos + at), by_sin[i] = load<Floats>(plan.by_sin + at);
        }
        for (int t = 0; t < n; t++) {
            const float *cos_t = cos + t * pairs, *sin_t = sin + t * pairs;
            for (int i = 0; i < N; i++) {
                Floats c, s;
                if constexpr (PAIRS) c = lookup(cos_t, pair[i], PAIRS), s = lookup(sin_t, pair[i], PAIRS);
                else for (int l = 0; l < LANES; l++) c[l] = cos_t[pair[i][l]], s[l] = sin_t[pair[i][l]];
                store(out + t * dim + start + i * LANES, fixed[i] + by_cos[i] * c + by_sin[i] * s);
            }
            hadamard<CODES>(out + t * dim + start);
        }
    }
}

// WaterfillKey: decode `n` tokens of head number `head` into `out` (n, dim), R_t mean included.
static void waterfill_rows(const Packed& p, const Plan& plan, int64_t head, int64_t first, int n, float* out,
                           float* factor) {
    const uint8_t* codes = head_of(p.codes, p.code_strides, p, head) + first * p.code_strides[2];
    const int dim = int(p.dim), pairs = int(p.pairs);
    auto* means = pairs == 32 ? mean_rows<32> : pairs == 64 ? mean_rows<64> : mean_rows<0>;
    if (pairs) means(plan, p.cos + first * pairs, p.sin + first * pairs, pairs, n, dim, out);
    else for (int t = 0; t < n; t++) memcpy(out + t * dim, plan.fixed, sizeof(float) * dim);
    log_norms(p, head, first, n, factor);
    for (int j = 0; j < dim / CODES; j++)
        rows_of<true>(p, plan.width[j])(codes + plan.offset[j], p.code_strides[2], levels_of(p, plan.width[j]),
                                        factor, plan.rms[j], n, dim, out + j * CODES);
    for (int t = 0; t < n; t++) factor[t] = 1.0f;
}
