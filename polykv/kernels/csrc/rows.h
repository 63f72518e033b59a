// Rows (one token of one head) of the packed formats of polykv/codecs, decoded without rotating back.
#pragma once

#include "rotate.h"

enum Kind : int32_t {
    INT8_TENSOR = 0, INT8_TOKEN = 1, Q8_0 = 2, TURBOQUANT = 3, UNIFORM = 4, EXACT = 5,
    TURBOQUANT_LOG = 6, WATERFILL = 7  // waterfill.h
};

constexpr int LEVELS = 128;  // entries of each codebook of TURBOQUANT_LOG and WATERFILL

// Strides are in bytes, along (batch, head, token); a row itself is contiguous.
struct Packed {
    Kind kind;
    int32_t bits;   // of a code (TURBOQUANT, TURBOQUANT_LOG, UNIFORM)
    int32_t block;  // values that share a scale (UNIFORM)
    Dtype dtype;    // of the values (EXACT)
    int64_t batch, heads, tokens, dim;
    uint8_t* codes;
    int64_t code_strides[3];
    uint8_t* scale;  // fp32 (INT8_TENSOR), else fp16: of the row or its blocks, or the norm; null (EXACT)
    int64_t scale_strides[3];
    const float *levels, *boundaries;  // the codebook, 16 entries each
    const float* signs;                // of the rotation, or null
    // TURBOQUANT_LOG and WATERFILL: `levels` holds the codebooks of 0 to 7 bits, `boundaries` theirs in the order of
    // a search by halves: 2^i from entry 2^i on for the bit number i of a code; `scale` a byte per norm.
    const float* trellis;     // or the levels of trellis codes of 1 to 6 bits, one width after the other (trellis.h)
    const float* log_values;  // of those bytes, over the largest norm of the head
    uint16_t* largest;        // fp16, of each head
    // WATERFILL, of each head:
    uint16_t *mean, *channel_scale, *block_rms;  // fp16, of channels and blocks
    uint8_t *order, *widths;                     // of channels, and of two blocks a byte
    // and of the tokens' RoPE, if any: (tokens, pairs), and the channels of each pair.
    const float *cos, *sin;
    const int64_t *first, *second;
    int64_t pairs;
};

// Address of (batch, head) number `head`; `owner` has the number of heads.
template <typename Byte, typename Owner>
static inline Byte* head_of(Byte* base, const int64_t* strides, const Owner& owner, int64_t head) {
    return base + head / owner.heads * strides[0] + head % owner.heads * strides[1];
}

static inline float half_at(const uint8_t* from) { return float_of_half(load<uint16_t>(from)); }

template <int BITS>
static inline uint32_t eight_codes(const uint8_t* from) {
    if constexpr (BITS == 2) return load<uint16_t>(from);
    if constexpr (BITS == 3) return load<uint16_t>(from) | uint32_t(from[2]) << 16;
    return load<uint32_t>(from);
}

// LANES codes of a row, from code `first` (a multiple of LANES) on.
template <int BITS>
static inline Ints codes_at(const uint8_t* row, int first) {
    if constexpr (BITS == 8) return whole(load<Bytes>(row + first)) & 255;
    const uint8_t* from = row + first / 8 * BITS;
    const Ints shift = (lane_index() & 7) * BITS;
    Ints word = int32_t(eight_codes<BITS>(from)) | Ints{};
    if constexpr (LANES == 16)
        word = lane_index() < 8 ? word : int32_t(eight_codes<BITS>(from + BITS)) | Ints{};
    if constexpr (LANES == 4) word = word >> (first % 8 * BITS);
    return (word >> shift) & ((1 << BITS) - 1);
}

template <int BITS>
static inline void turboquant_row(const uint8_t* codes, const float* levels, int dim, float* out) {
    for (int i = 0; i < dim; i += LANES)
        store(out + i, lookup(levels, codes_at<BITS>(codes, i), 1 << BITS));
}

static inline void int8_row(const uint8_t* codes, int dim, float* out) {
    for (int i = 0; i < dim; i += LANES) store(out + i, floats_of(load<Bytes>(codes + i)));
}

static inline void q8_0_row(const uint8_t* codes, const uint8_t* scale, int dim, float* out) {
    for (int i = 0; i < dim; i += LANES)
        store(out + i, floats_of(load<Bytes>(codes + i)) * half_at(scale + i / 32 * 2));
}

template <int BITS>
static inline void uniform_row(const uint8_t* codes, const uint8_t* scale, int block, int dim, float* out) {
    constexpr float middle = ((1 << BITS) - 1) / 2.0f;
    for (int start = 0; start < dim; start += block, scale += 2) {
        const float step = half_at(scale);
        const int stop = start + block < dim ? start + block : dim;
        for (int i = start; i < stop; i += LANES)
            store(out + i, (__builtin_convertvector(codes_at<BITS>(codes, i), Floats) - middle) * step);
    }
}

static inline void exact_row(const uint8_t* values, Dtype dtype, int dim, float* out) {
    for (int i = 0; i < dim; i += LANES) store(out + i, load_floats(values + i * bytes_of(dtype), dtype));
}

// Decode `n` tokens of (batch, head) number `head` into `out` (n, dim), without the factor common to
// all values of a token, which goes to `factor` (n).
static inline void decode_rows(const Packed& p, int64_t head, int64_t first, int n, float* out,
                               float* factor) {
    const uint8_t* codes = head_of(p.codes, p.code_strides, p, head) + first * p.code_strides[2];
    const uint8_t* scale = head_of(p.scale, p.scale_strides, p, head) + first * p.scale_strides[2];
    const int dim = int(p.dim);
    const float root = std::sqrt(float(dim));
    for (int t = 0; t < n; t++, codes += p.code_strides[2], scale += p.scale_strides[2], out += dim) {
        if (p.kind == TURBOQUANT) {
            if (p.bits == 2) turboquant_row<2>(codes, p.levels, dim, out);
            else if (p.bits == 3) turboquant_row<3>(codes, p.levels, dim, out);
            else turboquant_row<4>(codes, p.levels, dim, out);
            factor[t] = half_at(scale) / root;
        } else if (p.kind == UNIFORM) {
            if (p.bits == 2) uniform_row<2>(codes, scale, p.block, dim, out);
            else if (p.bits == 3) uniform_row<3>(codes, scale, p.block, dim, out);
            else if (p.bits == 4) uniform_row<4>(codes, scale, p.block, dim, out);
            else uniform_row<8>(codes, scale, p.block, dim, out);
            factor[t] = 1.0f;
        } else if (p.kind == EXACT) {
            exact_row(codes, p.dtype, dim, out);
            factor[t] = 1.0f;
        } else if (p.kind == Q8_0) {
            q8_0_row(codes, scale, dim, out);
            factor[t] = 1.0f;
        } else {
            int8_row(codes, dim, out);
            factor[t] = p.kind == INT8_TENSOR ? load<float>(scale) : half_at(scale);
        }
    }
}
