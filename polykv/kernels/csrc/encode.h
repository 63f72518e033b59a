// Encoders of one row (one token of one head); formats and rounding as in polykv/codecs.
#pragma once

#include "rows.h"

struct Input {  // (batch, heads, tokens, dim); strides in bytes along the first three
    const uint8_t* data;
    Dtype dtype;
    int64_t batch, heads, tokens, dim;
    int64_t strides[3];
};

// Bits of the largest magnitude of `n` values: magnitudes order like integers, and infinity and NaN
// give INFINITE or more.
constexpr int32_t INFINITE = 0x7f800000;
constexpr uint16_t INFINITE_HALF = 0x7c00;

static inline int32_t absmax_bits(const uint8_t* from, Dtype dtype, int n) {
    Ints most{};
    for (int i = 0; i < n; i += LANES) {
        Ints bits = bits_as<Ints>(load_floats(from + i * bytes_of(dtype), dtype));
        most = larger(most, bits & 0x7fffffff);
    }
    int32_t found = 0;
    for (int i = 0; i < LANES; i++) found = most[i] > found ? most[i] : found;
    return found;
}

// codes = round(x / scale), halves to even, within [-127, 127].
static inline void encode_int8(const uint8_t* from, Dtype dtype, int dim, float scale, int8_t* codes) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float divisor = scale > 0 ? scale : 1.0f;
    for (int i = 0; i < dim; i += LANES) {
        Floats v = load_floats(from + i * bytes_of(dtype), dtype) / divisor;
        v = v > 127.0f ? Floats{} + 127.0f : v;
        v = v < -127.0f ? Floats{} - 127.0f : v;
        store(codes + i, low_bytes(bits_as<Ints>(v + to_integer)));  // its low byte is the code
    }
}

// Each encoder writes the codes and scales of one row; false if a value or scale is not finite.

static inline bool encode_int8_token(const uint8_t* from, Dtype dtype, int dim, int8_t* codes,
                                     uint16_t* scale) {
    const int32_t most = absmax_bits(from, dtype, dim);
    *scale = half_of_float(bits_as<float>(most) / 127.0f);
    if (most >= INFINITE || *scale >= INFINITE_HALF) return false;
    encode_int8(from, dtype, dim, float_of_half(*scale), codes);
    return true;
}

// ggml's q8_0: one fp16 scale per 32 values, codes against the fp32 scale, halves away from zero.
static inline bool encode_q8_0(const uint8_t* from, Dtype dtype, int dim, int8_t* codes, uint16_t* scales) {
    const int32_t below_half = bits_as<int32_t>(0.5f - 0x1p-25f);
    for (int start = 0; start < dim; start += 32) {
        const int stop = start + 32 < dim ? start + 32 : dim;
        const int32_t most = absmax_bits(from + start * bytes_of(dtype), dtype, stop - start);
        const float scale = bits_as<float>(most) / 127.0f;
        scales[start / 32] = half_of_float(scale);
        if (most >= INFINITE || scales[start / 32] >= INFINITE_HALF) return false;
        const float inverse = scale < 0x1p-126f ? 0.0f : 1.0f / scale;
        for (int i = start; i < stop; i += LANES) {
            Floats v = rounded(load_floats(from + i * bytes_of(dtype), dtype) * inverse);
            Floats half = bits_as<Floats>((bits_as<Ints>(v) & INT32_MIN) | below_half);
            store(codes + i, low_bytes(__builtin_convertvector(v + half, Ints)));
        }
    }
    return true;
}

// `n` codes, one a byte, as the little-endian bit stream of bitpack.py, in its three halving steps;
// n is a multiple of 16.
template <int BITS>
static inline void pack(const uint8_t* codes, int n, uint8_t* out) {
    constexpr uint64_t one = ((1ull << BITS) - 1) * 0x0001000100010001ull;
    constexpr uint64_t two = ((1ull << 2 * BITS) - 1) * 0x0000000100000001ull;
    constexpr uint64_t four = (1ull << 4 * BITS) - 1;
    uint64_t words[MAX_DIM / 8];
    for (int i = 0; i < n / 8; i++) {
        uint64_t word = load<uint64_t>(codes + 8 * i);
        word = (word & one) | (word >> (8 - BITS) & one << BITS);
        word = (word & two) | (word >> (16 - 2 * BITS) & two << 2 * BITS);
        words[i] = (word & four) | (word >> (32 - 4 * BITS) & four << 4 * BITS);
    }
    for (int i = 0; i < n / 8; i += 2) {
        if constexpr (BITS <= 4) {
            const uint64_t pair = words[i] | words[i + 1] << 8 * BITS;
            memcpy(out + i * BITS, &pair, 2 * BITS);
        } else {
            memcpy(out + i * BITS, words + i, BITS);
            memcpy(out + (i + 1) * BITS, words + i + 1, BITS);
        }
    }
}

// Uniform, symmetric: an fp16 scale per block; 2^BITS even levels from -absmax to absmax.
template <int BITS>
static inline bool encode_uniform(const uint8_t* from, Dtype dtype, const Packed& to, uint8_t* packed,
                                  uint16_t* scale) {
    constexpr int top = (1 << BITS) - 1;
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const int dim = int(to.dim);
    alignas(64) uint8_t codes[MAX_DIM];
    for (int start = 0; start < dim; start += to.block, scale++) {
        const int stop = start + to.block < dim ? start + to.block : dim;
        const int32_t most = absmax_bits(from + start * bytes_of(dtype), dtype, stop - start);
        *scale = half_of_float(bits_as<float>(most) * float(2.0 / top));
        if (most >= INFINITE || *scale >= INFINITE_HALF) return false;
        const float divisor = *scale > 0 ? float_of_half(*scale) : 1.0f;
        for (int i = start; i < stop; i += LANES) {
            Floats v = load_floats(from + i * bytes_of(dtype), dtype) / divisor + top / 2.0f;
            v = v > float(top) ? Floats{} + float(top) : v;
            v = v < 0.0f ? Floats{} : v;
            store(codes + i, low_bytes(bits_as<Ints>(v + to_integer)));  // its low byte is the code
        }
    }
    if constexpr (BITS == 8) memcpy(packed, codes, dim);
    else pack<BITS>(codes, dim, packed);
    return true;
}

static inline bool encode_uniform(const uint8_t* from, Dtype dtype, const Packed& to, uint8_t* packed,
                                  uint16_t* scale) {
    if (to.bits == 2) return encode_uniform<2>(from, dtype, to, packed, scale);
    if (to.bits == 3) return encode_uniform<3>(from, dtype, to, packed, scale);
    if (to.bits == 4) return encode_uniform<4>(from, dtype, to, packed, scale);
    return encode_uniform<8>(from, dtype, to, packed, scale);
}

// TurboQuant-MSE: fp16 norm; the unit vector rotated, times sqrt(dim), to the nearest level.
template <int BITS>
static inline bool encode_turboquant(const uint8_t* from, Dtype dtype, const Packed& to, uint8_t* packed,
                                     uint16_t* norm) {
    const int dim = int(to.dim);
    alignas(64) float y[MAX_DIM];
    alignas(64) uint8_t codes[MAX_DIM];
    Floats square{};
    for (int i = 0; i < dim; i += LANES) {
        Floats v = load_floats(from + i * bytes_of(dtype), dtype);
        square += v * v;
        store(y + i, to.signs ? v * load<Floats>(to.signs + i) : v);
    }
    const float length = std::sqrt(sum_lanes(square));
    *norm = half_of_float(length);
    if (*norm >= INFINITE_HALF) return false;  // also for NaN
    hadamard_blocks(y, dim);
    const float divisor = length > 0x1p-126f ? length : 0x1p-126f;
    const float unit = std::sqrt(float(dim)) * hadamard_scale(dim) / divisor;
    for (int i = 0; i < dim; i += LANES) {
        Floats v = load<Floats>(y + i) * unit;
        Ints code{};  // by halves: the number of boundaries below the value
        for (int half = 1 << BITS >> 1; half; half /= 2) {
            const Floats boundary = lookup(to.boundaries, code + (half - 1), 1 << BITS);
            code = v > boundary ? code + half : code;
        }
        store(codes + i, low_bytes(code));
    }
    pack<BITS>(codes, dim, packed);
    return true;
}

static inline bool encode_turboquant(const uint8_t* from, Dtype dtype, const Packed& to, uint8_t* packed,
                                     uint16_t* norm) {
    if (to.bits == 2) return encode_turboquant<2>(from, dtype, to, packed, norm);
    if (to.bits == 3) return encode_turboquant<3>(from, dtype, to, packed, norm);
    return encode_turboquant<4>(from, dtype, to, packed, norm);
}
