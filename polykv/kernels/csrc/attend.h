// Attention of a tile of queries to a packed segment, in blocks of tokens.
#pragma once

#include "products.h"
#include "waterfill.h"

constexpr int BLOCK = 64;  // tokens decoded at a time
constexpr int TILE = COLUMNS * LANES;  // queries at a time, one per lane

struct Queries {  // (heads, count, dim), contiguous
    const uint8_t* data;
    Dtype dtype;
    int64_t count;
    float scaling;
};

struct Job {  // a thread's unit of work
    int64_t head;
    int64_t first, count;  // queries, at most TILE
    int64_t start, stop;   // tokens
    float *out, *lse;      // (count, dim) in the model's domain, (count)
};

struct Scratch {  // a thread's buffers, of fixed size
    alignas(64) float queries[MAX_DIM * TILE];  // (dim, queries)
    float keys[BLOCK * MAX_DIM], values[BLOCK * MAX_DIM];  // (tokens, dim), without the factor per token
    float weights[BLOCK * TILE];  // (tokens, queries): scores, then probabilities
    float sums[MAX_DIM * TILE];  // (dim, queries): weighted values, in their rotated domain
    float key_factor[BLOCK], value_factor[BLOCK];
    Plan plan;  // of WATERFILL's keys
};

// Rows of a product with N vectors of columns, such that its sums fit the registers.
template <int N>
constexpr int ROWS = N * 8 <= COLUMNS * 4 ? 8 : 4;

// out[r][c] (+)= sum over k of a[r][k] * b[k][c] for ROWS<N> rows of `a` and N vectors of columns. Strides and depth
// count what takes the place of a float in the format of the products.
template <typename Products, int N, bool ADD>
static inline void product(const float* a, int64_t row_stride, int64_t stride, const float* b,
                           int64_t depth, float* out) {
    Floats sum[ROWS<N>][N] = {};
    for (int64_t k = 0; k < depth; k++) {
        Floats column[N];
        for (int c = 0; c < N; c++) column[c] = load<Floats>(b + (k * N + c) * LANES);
        for (int r = 0; r < ROWS<N>; r++)
            for (int c = 0; c < N; c++) sum[r][c] = Products::add(sum[r][c], a[r * row_stride + k * stride], column[c]);
    }
    for (int r = 0; r < ROWS<N>; r++)
        for (int c = 0; c < N; c++) {
            float* to = out + (r * N + c) * LANES;
            store(to, ADD ? load<Floats>(to) + sum[r][c] : sum[r][c]);
        }
}

// Scores to weights relative to the running maximum; rescales `sums` and `total` to the new maximum. The weights have
// the factors of the values if the products are not rounded.
template <typename Products, int N>
static inline void soften(Scratch& s, int n_tokens, int dim, float scaling, Floats* most, Floats* total) {
    for (int c = 0; c < N; c++) {
        Floats highest = most[c], added{};
        for (int t = 0; t < n_tokens; t++) {
            float* at = s.weights + (t * N + c) * LANES;
            Floats score = load<Floats>(at) * (s.key_factor[t] * scaling);
            store(at, score);
            highest = larger(score, highest);
        }
        for (int t = 0; t < n_tokens; t++) {
            float* at = s.weights + (t * N + c) * LANES;
            const Floats weight = Products::rounded(exp_negative(load<Floats>(at) - highest));
            added += weight;
            store(at, Products::EACH == 1 ? weight * s.value_factor[t] : weight);
        }
        const Floats kept = exp_negative(most[c] - highest);
        total[c] = total[c] * kept + added;
        most[c] = highest;
        for (int d = 0; d < dim; d++) {
            float* at = s.sums + (d * N + c) * LANES;
            store(at, load<Floats>(at) * kept);
        }
    }
}

// Decode `n` tokens of a head, up to a factor per token. WATERFILL's plan is that of the head.
static inline void decode(const Packed& p, const Plan& plan, int64_t head, int64_t first, int n, float* out,
                          float* factor) {
    if (p.kind == WATERFILL) waterfill_rows(p, plan, head, first, n, out, factor);
    else if (p.kind == TURBOQUANT_LOG) turboquant_log_rows(p, head, first, n, out, factor);
    else decode_rows(p, head, first, n, out, factor);
}

// A job of at most N vectors of queries.
template <typename Products, int N>
static void attend_vectors(Scratch& s, const Queries& q, const Packed& key, const Packed& value,
                           const Job& job) {
    constexpr int EACH = Products::EACH;
    const int dim = int(key.dim), depth = dim / EACH;
    alignas(64) float row[MAX_DIM];
    memset(s.queries, 0, sizeof(float) * dim * N * LANES);
    memset(s.sums, 0, sizeof(float) * dim * N * LANES);
    if (key.kind == WATERFILL) plan_blocks(key, job.head, s.plan), plan_mean(key, job.head, s.plan);
    const int step = bytes_of(q.dtype);
    const uint8_t* from = q.data + (job.head * q.count + job.first) * dim * step;
    for (int i = 0; i < job.count; i++, from += dim * step) {
        for (int d = 0; d < dim; d += LANES) store(row + d, load_floats(from + d * step, q.dtype));
        if (key.kind == TURBOQUANT || key.kind == TURBOQUANT_LOG) rotate(row, key.signs, dim);
        if (key.kind == WATERFILL) to_blocks(s.plan, dim, row);
        for (int d = 0; d < dim; d++) s.queries[d * N * LANES + i] = row[d];
    }
    Products::rows(s.queries, dim, N * LANES);
    Floats most[N], total[N] = {};
    for (int c = 0; c < N; c++) most[c] = Floats{} - __builtin_inff();
    for (int64_t t0 = job.start; t0 < job.stop; t0 += BLOCK) {
        const int n = job.stop - t0 < BLOCK ? int(job.stop - t0) : BLOCK;
        decode(key, s.plan, job.head, t0, n, s.keys, s.key_factor);
        decode(value, s.plan, job.head, t0, n, s.values, s.value_factor);
        if (EACH > 1)  // a value is rounded once, with its factor
            for (int t = 0; t < n; t++)
                for (int d = 0; d < dim; d++) s.values[t * dim + d] *= s.value_factor[t];
        Products::columns(s.keys, n * dim);
        Products::rows(s.values, n, dim);
        for (int t = 0; t < n; t += ROWS<N>)  // may overrun n: those scores are not read
            product<Products, N, false>(s.keys + t * depth, depth, 1, s.queries, depth, s.weights + t * N * LANES);
        soften<Products, N>(s, n, dim, q.scaling, most, total);
        Products::rows(s.weights, n, N * LANES);
        const int pairs = (n + EACH - 1) / EACH;
        for (int d = 0; d < dim; d += ROWS<N>)
            product<Products, N, true>(s.values + d, 1, dim, s.weights, pairs, s.sums + d * N * LANES);
    }
    for (int i = 0; i < job.count; i++) {
        const float sum = total[i / LANES][i % LANES];
        for (int d = 0; d < dim; d++) row[d] = s.sums[d * N * LANES + i] / sum;
        if (value.kind == TURBOQUANT || value.kind == TURBOQUANT_LOG) unrotate(row, value.signs, dim);
        memcpy(job.out + i * dim, row, sizeof(float) * dim);
        job.lse[i] = most[i / LANES][i % LANES] + std::log(sum);
    }
}

// Dispatches to the smallest number of vectors that holds the queries.
template <typename Products>
static void attend_with(Scratch& s, const Queries& q, const Packed& key, const Packed& value, const Job& job) {
    auto* run = attend_vectors<Products, COLUMNS>;
    if (job.count <= LANES) run = attend_vectors<Products, 1>;
    else if (job.count <= 2 * LANES) run = attend_vectors<Products, 2>;
    else if (job.count <= 3 * LANES) run = attend_vectors<Products, 3>;
    run(s, q, key, value, job);
}

// Queries in bfloat16 are multiplied in it, where the processor can.
static void attend_job(Scratch& s, const Queries& q, const Packed& key, const Packed& value, const Job& job) {
    if (q.dtype == BFLOAT16) attend_with<HalfProducts>(s, q, key, value, job);
    else attend_with<Singles>(s, q, key, value, job);
}

// Attention of one query to all tokens, from that to each of `splits` parts, whose rows are `apart` rows from each other;
// returns the log-sum-exp.
static float merge_parts(const float* parts, const float* part_lse, int64_t splits, int64_t apart, int64_t dim, float* out) {
    float most = part_lse[0], total = 0.0f;
    for (int64_t i = 1; i < splits; i++) most = most > part_lse[i * apart] ? most : part_lse[i * apart];
    for (int64_t i = 0; i < splits; i++) total += std::exp(part_lse[i * apart] - most);
    for (int64_t i = 0; i < splits; i++) {
        const float share = std::exp(part_lse[i * apart] - most) / total, *part = parts + i * apart * dim;
        for (int64_t d = 0; d < dim; d++) out[d] = i ? out[d] + share * part[d] : share * part[d];
    }
    return most + std::log(total);
}
