// The encoders of WaterfillKey and TurboQuantLog in passes over the rows; formats and rounding as in polykv/codecs.
#pragma once

#include <type_traits>

#include "waterfill_plan.h"

constexpr float STEPS = 24.0f, TOP = 207.0f;  // of normal.py
constexpr int TOKENS = 32;  // at a time

// How RoPE turns the channels of a head: x[c] cos[pair[c]] + sign[c] x[partner[c]] sin[pair[c]]; pair -1: not at all.
// DIM, where not 0, is head_dim, and channel c < DIM / 2 is turned with c + DIM / 2, as in most models.
struct Turns {
    int32_t pair[MAX_DIM], partner[MAX_DIM];
    float sign[MAX_DIM];
    bool straight = true;  // each vector of channels has consecutive partners and pairs, and one sign
    bool halves = true;    // as DIM has it

    explicit Turns(const Packed& p) {
        for (int c = 0; c < MAX_DIM; c++) pair[c] = -1, partner[c] = c, sign[c] = 0.0f;
        for (int i = 0; i < p.pairs; i++) {
            const int a = int(p.first[i]), b = int(p.second[i]);
            pair[a] = pair[b] = i, partner[a] = b, partner[b] = a, sign[a] = -1.0f, sign[b] = 1.0f;
            halves &= a == i && b == i + p.dim / 2;
        }
        halves &= 2 * p.pairs == p.dim;
        for (int c = 0; c < p.dim; c++) {
            const int start = c / LANES * LANES, l = c - start;
            straight &= pair[c] == (pair[start] < 0 ? -1 : pair[start] + l) &&
                        partner[c] == partner[start] + l && sign[c] == sign[start];
        }
    }

    // LANES channels of `x` from `c` on, turned by the angles of a token.
    template <int DIM>
    Floats turned(const float* x, const float* cos, const float* sin, int c) const {
        const Floats own = load<Floats>(x + c);
        if constexpr (DIM != 0) {
            const int i = c % (DIM / 2);
            const Floats across = load<Floats>(x + (c ^ DIM / 2)) * load<Floats>(sin + i);
            return own * load<Floats>(cos + i) + (c < DIM / 2 ? -across : across);
        }
        if (straight)
            return pair[c] < 0 ? own : own * load<Floats>(cos + pair[c]) +
                                       load<Floats>(x + partner[c]) * load<Floats>(sin + pair[c]) * sign[c];
        Floats out = own;
        for (int l = 0; l < LANES; l++)
            if (const int i = pair[c + l]; i >= 0)
                out[l] = own[l] * cos[i] + sign[c + l] * x[partner[c + l]] * sin[i];
        return out;
    }

    // call(DIM) with DIM as above, a constant.
    template <typename Call>
    auto with_dim(int64_t dim, const Call& call) const {
        if (halves && dim == 64) return call(std::integral_constant<int, 64>());
        if (halves && dim == 128) return call(std::integral_constant<int, 128>());
        return call(std::integral_constant<int, 0>());
    }
};

// The sums over tokens [start, stop) of each channel of a head: of the keys with RoPE undone or, with a mean, of the
// squares of the keys without R_t mean. In fp32 over TOKENS tokens, then in fp64.
template <int DIM, bool SQUARES>
static void sums_of(const Input& x, const Packed& p, const Turns& turns, int64_t head, const float* mean,
                    int64_t start, int64_t stop, double* sums) {
    const int dim = DIM ? DIM : int(x.dim), n = dim / LANES, pairs = int(p.pairs);
    alignas(64) float row[MAX_DIM], undo_cos[MAX_DIM], undo_sin[MAX_DIM];
    const uint8_t* from = head_of(x.data, x.strides, x, head) + start * x.strides[2];
    for (int c = 0; c < dim; c++) sums[c] = 0.0;
    for (int64_t first = start; first < stop; first += TOKENS) {
        Floats some[(DIM ? DIM : MAX_DIM) / LANES] = {};
        const int64_t last = first + TOKENS < stop ? first + TOKENS : stop;
        for (int64_t t = first; t < last; t++, from += x.strides[2]) {
            const float *cos = p.cos + t * p.pairs, *sin = p.sin + t * p.pairs;
            if constexpr (SQUARES) {
                for (int i = 0; i < n; i++) {
                    const Floats key = load_floats(from + i * LANES * bytes_of(x.dtype), x.dtype);
                    const Floats rest = key - turns.turned<DIM>(mean, cos, sin, i * LANES);
                    some[i] += rest * rest;
                }
                continue;
            }
            for (int i = 0; i < (DIM ? DIM / 2 : pairs); i++) {
                const float back = 1.0f / (cos[i] * cos[i] + sin[i] * sin[i]);
                undo_cos[i] = cos[i] * back, undo_sin[i] = -sin[i] * back;
            }
            for (int i = 0; i < n; i++)
                store(row + i * LANES, load_floats(from + i * LANES * bytes_of(x.dtype), x.dtype));
            for (int i = 0; i < n; i++) some[i] += turns.turned<DIM>(row, undo_cos, undo_sin, i * LANES);
        }
        for (int c = 0; c < dim; c++) sums[c] += some[c / LANES][c % LANES];
    }
}

// y = row[order] * gain, through the Hadamard of each block; DIM, where not 0, is the head's, and the order is then
// applied in registers.
template <int DIM>
static void sorted_blocks(const float* row, const int32_t* order, const float* gain, int dim, float* y) {
    for (int i = 0; i < dim; i += LANES) {
        Floats v;
        if constexpr (DIM) v = lookup(row, load<Ints>(order + i), DIM);
        else for (int l = 0; l < LANES; l++) v[l] = row[order[i + l]];
        store(y + i, v * load<Floats>(gain + i));
    }
    hadamard_each(y, dim);
}

// 16 codes of each of `n` tokens, packed: the number of boundaries below y * factor[t] * scale. Rows of `y` are `dim`
// apart, those of `out` `stride` bytes.
template <int BITS>
static void encode_block(const float* y, int dim, const float* factor, float scale, int n, const float* boundaries,
                         uint8_t* out, int64_t stride) {
    for (int t = 0; t < n; t++, y += dim, out += stride) {
        alignas(16) uint8_t codes[CODES];
        for (int i = 0; i < CODES; i += LANES) {
            const Floats v = load<Floats>(y + i) * (factor[t] * scale);
            Ints code{};  // by halves: a bit at a time, the highest first
            for (int count = 1; count < 1 << BITS; count *= 2) {
                const Ints above = v > lookup(boundaries + count, code, count);
                code = code + code - above;
            }
            store(codes + i, low_bytes(code));
        }
        pack<BITS>(codes, CODES, out);
    }
}

using EncodeBlock = void (*)(const float*, int, const float*, float, int, const float*, uint8_t*, int64_t);
constexpr EncodeBlock ENCODE_BLOCK[] = {nullptr,         encode_block<1>, encode_block<2>, encode_block<3>,
                                        encode_block<4>, encode_block<5>, encode_block<6>, encode_block<7>};
constexpr EncodeBlock ENCODE_TRELLIS[] = {nullptr,           encode_trellis<1>, encode_trellis<2>, encode_trellis<3>,
                                          encode_trellis<4>, encode_trellis<5>, encode_trellis<6>};

// The codes of TOKENS norms; as log_codes of normal.py.
static inline void log_codes(const float* rms, float largest, uint8_t* codes) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    for (int t = 0; t < TOKENS; t += LANES) {
        const Floats value = load<Floats>(rms + t), ratio = value / std::fmax(largest, SMALLEST);
        Floats code = log2_positive(ratio > 1e-30f ? ratio : Floats{} + 1e-30f) * STEPS;
        code = (code + to_integer) - to_integer + TOP;
        code = code < 1.0f ? Floats{} + 1.0f : code;
        code = code > 255.0f ? Floats{} + 255.0f : code;
        store(codes + t, low_bytes(__builtin_convertvector(value > 0.0f ? code : Floats{}, Ints)));
    }
}

// The largest value of a token's blocks, each over its RMS.
static inline float largest_of(const Plan& plan, int dim, const float* y) {
    float largest = 0.0f;
    for (int i = 0; i < dim; i++)
        largest = std::fmax(largest, std::fabs(y[i]) / std::fmax(plan.rms[i / CODES], SMALLEST));
    return largest;
}

// The last two passes over a head's tokens: their RMS and the largest of them, and then (`write`) their codes.
struct Coding {
    const Input& x;
    const Packed& to;
    int64_t head;
    bool write;
    float* kept;  // the RMS of all tokens of the head, and TOKENS more

    // The codes of `n` tokens from `first` on, whose blocks are `y` (n, dim) and RMS `rms`. Without a plan all blocks
    // have `bits` bits, and no RMS of their own; `unit` is a factor of all values.
    void codes(int64_t first, int n, const float* y, const float* rms, float unit, const Plan* plan) const {
        const float largest = float_of_half(to.largest[head]);
        uint8_t* norm = head_of(to.scale, to.scale_strides, to, head) + first * to.scale_strides[2];
        uint8_t* out = head_of(to.codes, to.code_strides, to, head) + first * to.code_strides[2];
        float factor[TOKENS];
        uint8_t norms[TOKENS];
        log_codes(rms, largest, norms);
        memcpy(norm, norms, n);
        for (int t = 0; t < n; t++) factor[t] = unit / std::fmax(to.log_values[norms[t]] * largest, SMALLEST);
        for (int j = 0; j < to.dim / CODES; j++) {
            const int width = plan ? plan->width[j] : to.bits, offset = plan ? plan->offset[j] : 2 * width * j;
            const float scale = plan ? 1.0f / std::fmax(plan->rms[j], SMALLEST) : 1.0f;
            const float* table = to.trellis ? to.trellis : to.boundaries + width * LEVELS;
            (to.trellis ? ENCODE_TRELLIS : ENCODE_BLOCK)[width](y + j * CODES, int(to.dim), factor, scale, n, table,
                                                                out + offset, to.code_strides[2]);
        }
    }

    // The largest RMS of tokens [start, stop), infinity if one is not finite. `prepare(from, t, y)` returns the RMS of
    // a row or, to write, stores its blocks.
    template <typename Prepare>
    float tokens(int64_t start, int64_t stop, float unit, const Plan* plan, const Prepare& prepare) const {
        alignas(64) float y[TOKENS * MAX_DIM];
        float most = 0.0f;
        bool finite = true;
        for (int64_t first = start; first < stop; first += TOKENS) {
            const int n = stop - first < TOKENS ? int(stop - first) : TOKENS;
            const uint8_t* from = head_of(x.data, x.strides, x, head) + first * x.strides[2];
            for (int t = 0; t < n; t++, from += x.strides[2]) {
                const float rms = prepare(from, first + t, y + t * to.dim);
                if (write) continue;
                kept[first + t] = rms;
                most = std::fmax(most, rms);  // passes over NaN
                finite &= rms < __builtin_inff();
            }
            if (write) codes(first, n, y, kept + first, unit, plan);
        }
        return finite ? most : __builtin_inff();
    }

    template <int DIM>
    float keys(const Turns& turns, int64_t start, int64_t stop) const {
        Plan plan;
        plan_blocks(to, head, plan);
        alignas(64) int32_t order[MAX_DIM];
        alignas(64) float gain[MAX_DIM], mean[MAX_DIM], row[MAX_DIM], weight[MAX_DIM];
        const int dim = DIM ? DIM : int(to.dim);
        for (int i = 0; i < dim; i++) {
            order[i] = to.order[head * dim + i], mean[i] = float_of_half(to.mean[head * dim + i]);
            const float by = float_of_half(to.channel_scale[head * dim + order[i]]);
            gain[i] = by * to.signs[i % CODES] * hadamard_scale(CODES);
            // A Hadamard keeps the energy of its block, so the token's RMS is known before it.
            weight[order[i]] = by / std::fmax(plan.rms[i / CODES], SMALLEST);
        }
        auto* blocks = dim == 64 ? sorted_blocks<64> : dim == 128 ? sorted_blocks<128> : sorted_blocks<0>;
        return tokens(start, stop, 1.0f, &plan, [&](const uint8_t* from, int64_t t, float* y) {
            const float *cos = to.cos + t * to.pairs, *sin = to.sin + t * to.pairs;
            Floats sum{};
            for (int c = 0; c < dim; c += LANES) {
                const Floats key = load_floats(from + c * bytes_of(x.dtype), x.dtype);
                const Floats rest = key - turns.turned<DIM>(mean, cos, sin, c);
                const Floats v = rest * load<Floats>(weight + c);
                if (write || to.trellis) store(row + c, rest);
                if (!write) sum += v * v;
            }
            if (write || to.trellis) blocks(row, order, gain, dim, y);
            if (write) return 0.0f;
            const float rms = std::sqrt(sum_lanes(sum) / dim);
            return to.trellis ? std::fmax(rms, largest_of(plan, dim, y) / REACH) : rms;
        });
    }

    float values(int64_t start, int64_t stop) const {
        const int dim = int(to.dim);
        return tokens(start, stop, hadamard_scale(dim), nullptr, [&](const uint8_t* from, int64_t, float* y) {
            Floats square{};
            for (int i = 0; i < dim; i += LANES) {
                const Floats v = load_floats(from + i * bytes_of(x.dtype), x.dtype);
                if (write) store(y + i, v * load<Floats>(to.signs + i));
                else square += v * v;
            }
            if (!write) return std::sqrt(sum_lanes(square)) / std::sqrt(float(dim));
            hadamard_blocks(y, dim);
            return 0.0f;
        });
    }
};
