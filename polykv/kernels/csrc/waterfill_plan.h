// What WaterfillKey stores of a layer besides norms and codes; as `_plan` of polykv/codecs/waterfill.py.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

#include "encode.h"
#include "waterfill.h"

constexpr float SMALLEST = 0x1p-24f;  // in fp16
constexpr float LEAST = 1e-3f;        // of sigma and w

struct Allocation {
    const float* query_rms;  // (batch, heads, dim), or null
    int64_t total;           // bits of the blocks of a batch row
    int32_t widest;
    int32_t centred, equal_widths;  // the codec's options
};

static inline float average(const float* x, int n) {
    double sum = 0.0;
    for (int i = 0; i < n; i++) sum += x[i];
    return float(sum / n);
}

// `value` to the nearest half, and back in `rounded`; false if it overflows or is not a number.
static inline bool store_half(float value, uint16_t* half, float* rounded) {
    *half = uint16_t(half_of_float(std::fabs(value)) | (std::signbit(value) ? 0x8000 : 0));
    *rounded = float_of_half(*half);
    return (*half & 0x7fff) < INFINITE_HALF;
}

static inline float half_log2(float energy) { return std::log2(std::fmax(energy, 1e-30f)) / 2; }

// Scale and order of the channels of a head and the RMS of its blocks, from the RMS of its centred keys, `sigma` (dim),
// and of its queries (dim), or null. `importance` (blocks) is e of the codec's step 4. False if one is not finite.
static bool plan_head(const Packed& to, int64_t head, const float* sigma, const float* query_rms,
                      float* importance) {
    const int dim = int(to.dim), n_blocks = dim / CODES;
    float w[MAX_DIM], scale[MAX_DIM], weighted[MAX_DIM];
    for (int c = 0; c < dim; c++) w[c] = query_rms ? query_rms[c] : 1.0f;
    for (int i = 0; query_rms && i < to.pairs; i++) {
        float &a = w[to.first[i]], &b = w[to.second[i]];
        a = b = std::sqrt((a * a + b * b) / 2);
    }
    const float level = std::fmax(average(w, dim), SMALLEST), spread = average(sigma, dim);
    bool finite = true;
    for (int c = 0; c < dim; c++) {
        finite &= std::fabs(w[c]) < __builtin_inff() && sigma[c] < __builtin_inff();
        w[c] = std::fmax(w[c] / level, LEAST);
        const float relative = spread > 0 ? sigma[c] / spread : 1.0f;
        const uint16_t half = half_of_float(std::sqrt(w[c] / std::fmax(relative, LEAST)));
        to.channel_scale[head * dim + c] = half;
        scale[c] = float_of_half(half);
        weighted[c] = w[c] * sigma[c];
    }
    if (!finite) return false;
    uint8_t* order = to.order + head * dim;
    std::iota(order, order + dim, uint8_t(0));
    std::stable_sort(order, order + dim, [&](int a, int b) { return weighted[a] > weighted[b]; });
    for (int j = 0; j < n_blocks; j++) {
        float keys = 0.0f, queries = 0.0f;
        for (int i = j * CODES; i < (j + 1) * CODES; i++) {
            const int c = order[i];
            keys += sigma[c] * scale[c] * (sigma[c] * scale[c]) / CODES;
            queries += w[c] / scale[c] * (w[c] / scale[c]) / CODES;
        }
        importance[j] = half_log2(keys) + half_log2(queries) + std::log2(level);
        uint16_t& rms = to.block_rms[head * n_blocks + j];
        rms = half_of_float(std::sqrt(keys));
        finite &= rms < INFINITE_HALF;
    }
    return finite;
}

// The widths of the blocks of a batch row, whose first head is `head`: reverse water-filling in whole bits.
static void allocate_bits(const Packed& to, int64_t head, const float* importance, const Allocation& plan) {
    const int n_blocks = int(to.dim) / CODES, n = int(to.heads) * n_blocks, bytes = (n_blocks + 1) / 2;
    std::vector<uint8_t> width(n, plan.equal_widths ? uint8_t(plan.total / n) : 1);
    for (int i = 0; plan.equal_widths && i < plan.total % n; i++) width[i]++;
    using Next = std::pair<double, int>;  // the block with the smallest first number is next
    std::priority_queue<Next, std::vector<Next>, std::greater<Next>> queue;
    for (int i = 0; i < n; i++) queue.push({-2.0 * importance[i], i});
    for (int64_t left = plan.equal_widths ? 0 : plan.total - n; left > 0; left--) {
        const Next next = queue.top();
        queue.pop();
        const bool full = ++width[next.second] == plan.widest;
        // A bit divides the squared error of a block by 4.
        queue.push({full ? std::numeric_limits<double>::infinity() : next.first + 2.0, next.second});
    }
    memset(to.widths + head * bytes, 0, to.heads * bytes);
    for (int i = 0; i < n; i++) {
        const int j = i % n_blocks;
        to.widths[(head + i / n_blocks) * bytes + j / 2] |= width[i] << 4 * (j & 1);
    }
}
