// Attention of each agent to its own tokens, merged with its attention to a shared prefix.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "rows.h"

constexpr int MAX_ROWS = 16;  // queries of an (agent, kv head)

struct Suffix {  // of `agents` agents with `tokens` tokens each
    const uint8_t* queries;  // (agents, heads, rows, dim), contiguous
    const uint8_t* seen;     // (agents, query tokens, tokens): whether a query token sees a token
    Dtype dtype;             // of the queries
    int64_t agents, heads, rows, group, tokens, dim;  // rows: query token, then query head of the group
    int64_t seen_strides[3];  // along (agent, query token, token), in bytes
    float scaling;
    // What another attention gave, or null: output and log-sum-exp, contiguous; strides in floats, along (agent, head).
    const float *other, *other_lse;
    int64_t other_strides[2], other_lse_strides[2];
    const Packed *keys, *values;
};

// Lanes with bit STEP clear: sums of pairs of lanes of `a`, those with it set: of `b`.
template <int STEP>
static inline Floats add_pairs(Floats a, Floats b) {
    const Ints first = (lane_index() & STEP) == 0;
    return (first ? a : b) + swap_lanes<STEP>(first ? b : a);
}

// Lane i of the result is the sum of the lanes of x[i]; overwrites x.
template <int STEP = LANES / 2>
static inline Floats sums_of_lanes(Floats* x) {
    for (int i = 0; i < STEP; i++) x[i] = add_pairs<STEP>(x[i], x[i + STEP]);
    if constexpr (STEP > 1) return sums_of_lanes<STEP / 2>(x);
    return x[0];
}

// Scores of the rows of one (agent, head): (rows, width), with -infinity where a token is not seen.
static void suffix_scores(const Suffix& s, int64_t agent, int64_t head, const float* queries, int64_t width, float* out) {
    const int64_t dim = s.dim;
    const uint8_t* seen = s.seen + agent * s.seen_strides[0];
    alignas(64) float keys[LANES * MAX_DIM], factors[LANES] = {};
    memset(keys, 0, sizeof keys);
    for (int64_t t0 = 0; t0 < s.tokens; t0 += LANES) {
        const int n = s.tokens - t0 < LANES ? int(s.tokens - t0) : LANES;
        decode_rows(*s.keys, agent * s.heads + head, t0, n, keys, factors);
        const Floats factor = load<Floats>(factors) * s.scaling;
        for (int64_t row = 0; row < s.rows; row++) {
            Floats sum[LANES] = {};
            for (int64_t d = 0; d < dim; d += LANES) {
                const Floats query = load<Floats>(queries + row * dim + d);
                for (int t = 0; t < LANES; t++) sum[t] += query * load<Floats>(keys + t * dim + d);
            }
            store(out + row * width + t0, sums_of_lanes(sum) * factor);
            const uint8_t* here = seen + row / s.group * s.seen_strides[1] + t0 * s.seen_strides[2];
            for (int t = 0; t < LANES; t++)
                if (t >= n || !here[t * s.seen_strides[2]]) out[row * width + t0 + t] = -__builtin_inff();
        }
    }
}

// Scores (width) to weights relative to their maximum, 0 where a token is not seen; returns maximum and sum.
static std::pair<float, float> suffix_weights(float* score, int64_t width) {
    Floats most = load<Floats>(score), total{};
    for (int64_t t = LANES; t < width; t += LANES) most = larger(most, load<Floats>(score + t));
    float highest = most[0];
    for (int i = 1; i < LANES; i++) highest = std::max(highest, most[i]);
    const float from = highest == -__builtin_inff() ? 0.0f : highest;
    for (int64_t t = 0; t < width; t += LANES) {
        const Floats at = load<Floats>(score + t), weight = exp_negative(at - from);
        const Floats kept = at == -__builtin_inff() ? Floats{} : weight;
        total += kept;
        store(score + t, kept);
    }
    return {highest, sum_lanes(total)};
}

// Weighted values of ROWS rows of one (agent, head), into `out` (rows, dim).
template <int ROWS>
static void suffix_values(const Suffix& s, int64_t agent, int64_t head, const float* weights, int64_t width, float* out) {
    const int64_t dim = s.dim;
    alignas(64) float values[LANES * MAX_DIM], factors[LANES];
    memset(out, 0, sizeof(float) * ROWS * dim);
    for (int64_t t0 = 0; t0 < s.tokens; t0 += LANES) {
        const int n = s.tokens - t0 < LANES ? int(s.tokens - t0) : LANES;
        decode_rows(*s.values, agent * s.heads + head, t0, n, values, factors);
        for (int64_t d = 0; d < dim; d += LANES) {
            Floats sum[ROWS];
            for (int row = 0; row < ROWS; row++) sum[row] = load<Floats>(out + row * dim + d);
            for (int t = 0; t < n; t++) {
                const Floats value = load<Floats>(values + t * dim + d) * factors[t];
                for (int row = 0; row < ROWS; row++) sum[row] += value * weights[row * width + t0 + t];
            }
            for (int row = 0; row < ROWS; row++) store(out + row * dim + d, sum[row]);
        }
    }
}

// Attention of one (agent, head), merged; `out` (agents, heads, rows, dim) and `lse` (agents, heads, rows). A query that
// sees nothing gives 0 and -infinity.
static void attend_own(const Suffix& s, int64_t agent, int64_t head, std::vector<float>& scores, float* out, float* lse) {
    const int64_t dim = s.dim, width = (s.tokens + LANES - 1) / LANES * LANES, step = bytes_of(s.dtype);
    alignas(64) float queries[MAX_ROWS * MAX_DIM], own[MAX_ROWS * MAX_DIM];
    const int64_t place = (agent * s.heads + head) * s.rows;
    for (int64_t i = 0; i < s.rows * dim; i += LANES)
        store(queries + i, load_floats(s.queries + (place * dim + i) * step, s.dtype));
    scores.assign(MAX_ROWS * width, 0.0f);
    suffix_scores(s, agent, head, queries, width, scores.data());
    float most[MAX_ROWS], sum[MAX_ROWS];
    auto* add = s.rows <= 4 ? suffix_values<4> : s.rows <= 8 ? suffix_values<8> : suffix_values<MAX_ROWS>;
    for (int64_t row = 0; row < s.rows; row++)
        std::tie(most[row], sum[row]) = suffix_weights(scores.data() + row * width, width);
    add(s, agent, head, scores.data(), width, own);
    for (int64_t row = 0; row < s.rows; row++) {
        const float* other = s.other + agent * s.other_strides[0] + head * s.other_strides[1] + row * dim;
        const float theirs = s.other
            ? s.other_lse[agent * s.other_lse_strides[0] + head * s.other_lse_strides[1] + row] : -__builtin_inff();
        const float top = std::max(most[row], theirs);
        float* to = out + (place + row) * dim;
        if (top == -__builtin_inff() && sum[row] == 0.0f) {  // not where scores are NaN
            memset(to, 0, sizeof(float) * dim);
            lse[place + row] = top;
            continue;
        }
        const float mine = std::exp(most[row] - top), rest = std::exp(theirs - top), total = mine * sum[row] + rest;
        for (int64_t d = 0; d < dim; d++)
            to[d] = (own[row * dim + d] * mine + (rest > 0.0f ? other[d] * rest : 0.0f)) / total;
        lse[place + row] = top + std::log(total);
    }
}
