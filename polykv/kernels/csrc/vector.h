// Float vectors in the vector extensions of GCC and Clang, and conversions between number formats.
// Only the width of a vector (LANES) depends on the machine.
#pragma once

#include <cstdint>
#include <cstring>

// LANES floats per vector; COLUMNS vectors per row of a product whose sums are held in registers.
#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16, COLUMNS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, COLUMNS = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4, COLUMNS = 4;
#else
constexpr int LANES = 4, COLUMNS = 2;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

template <typename V>
static inline V load(const void* from) {  // unaligned
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <typename V>
static inline void store(void* to, V v) {
    memcpy(to, &v, sizeof v);
}

template <typename To, typename From>
static inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "reinterpreted bits keep their size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

static inline Ints lane_index() {
    Ints index;
    for (int i = 0; i < LANES; i++) index[i] = i;
    return index;
}

// Lane i gets lane i ^ STEP.
template <int STEP>
static inline Floats swap_lanes(Floats v) {
#ifdef __clang__
    Floats swapped;
    for (int i = 0; i < LANES; i++) swapped[i] = v[i ^ STEP];
    return swapped;
#else
    return __builtin_shuffle(v, lane_index() ^ STEP);
#endif
}

template <int STEP = LANES / 2>
static inline float sum_lanes(Floats v) {
    v += swap_lanes<STEP>(v);
    if constexpr (STEP > 1) return sum_lanes<STEP / 2>(v);
    return v[0];
}

template <typename V>
static inline V larger(V a, V b) {
    return a > b ? a : b;
}

// Bytes to floats and back through intermediate widths, which GCC compiles to vector conversions.
static inline Ints whole(Bytes b) {
    return __builtin_convertvector(__builtin_convertvector(b, Shorts), Ints);
}

static inline Floats floats_of(Bytes b) { return __builtin_convertvector(whole(b), Floats); }

static inline Bytes low_bytes(Ints v) {
    return __builtin_convertvector(__builtin_convertvector(v, Shorts), Bytes);
}

// A product rounded by itself: keeps the compiler from fusing it with a following addition.
static inline Floats rounded(Floats product) {
#if defined(__x86_64__)
    asm("" : "+x"(product));
#elif defined(__aarch64__)
    asm("" : "+w"(product));
#else
    asm("" : "+m"(product));
#endif
    return product;
}

// table[index] for indices below `size`; the table is padded to 16 entries.
static inline Floats lookup(const float* table, Ints index, int size) {
#ifdef __clang__
    Floats found;
    for (int i = 0; i < LANES; i++) found[i] = table[index[i]];
    return found;
#else
    if (size <= LANES) return __builtin_shuffle(load<Floats>(table), index);
    Floats found{};
    for (int from = 0; from < size; from += 2 * LANES) {
        const Floats low = load<Floats>(table + from), high = load<Floats>(table + from + LANES);
        const Floats pair = __builtin_shuffle(low, high, index);
        found = from == 0 ? pair : index >= from ? pair : found;
    }
    return found;
#endif
}

// exp(x) for x <= 0 (Cephes expf, 1 ulp); exp(-inf) is 1e-38, NaN stays NaN.
static inline Floats exp_negative(Floats x) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    x = x < -87.0f ? Floats{} - 87.0f : x;
    Floats n = (x * 1.44269504088896341f + to_integer) - to_integer;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * bits_as<Floats>((__builtin_convertvector(n, Ints) + 127) << 23);
}

// log2(x) of a positive normal x, 2 ulp or 1e-7: x = 2^n m with m around 1, and log(m) = 2 artanh((m - 1) / (m + 1)).
static inline Floats log2_positive(Floats x) {
    const Ints n = (bits_as<Ints>(x) - 0x3f3504f3) >> 23;  // m from sqrt(1/2) to sqrt(2)
    const Floats m = bits_as<Floats>(bits_as<Ints>(x) - (n << 23));
    const Floats r = (m - 1.0f) / (m + 1.0f), square = r * r;
    Floats p = square * (1.0f / 9) + 1.0f / 7;
    p = p * square + 1.0f / 5;
    p = p * square + 1.0f / 3;
    p = p * square + 1.0f;
    return r * p * 2.88539008177792681f + __builtin_convertvector(n, Floats);
}

// --- number formats ---------------------------------------------------------------------------

enum Dtype : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

static inline float float_of_half(uint16_t half) {
    uint32_t magnitude = half & 0x7fff, sign = uint32_t(half & 0x8000) << 16;
    // A product corrects the exponent's bias, also for subnormal halves.
    float value = bits_as<float>(magnitude << 13) * bits_as<float>(0x77800000u);
    if (magnitude >= 0x7c00) value = bits_as<float>(magnitude << 13 | 0x7f800000u);
    return bits_as<float>(bits_as<uint32_t>(value) | sign);
}

// Nearest half of a value >= 0, ties to even; infinity on overflow.
static inline uint16_t half_of_float(float value) {
    if (!(value < 65520.0f)) return 0x7c00;
    if (value < 6.103515625e-5f)  // subnormal halves are multiples of 2^-24
        return uint16_t(bits_as<uint32_t>(value + 0.5f) - 0x3f000000u);
    uint32_t bits = bits_as<uint32_t>(value);
    return uint16_t((bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13);
}

// Load LANES values of `dtype`.
static inline Floats load_floats(const uint8_t* from, Dtype dtype) {
    if (dtype == FLOAT32) return load<Floats>(from);
    Ints half = __builtin_convertvector(load<Halves>(from), Ints);
    if (dtype == BFLOAT16) return bits_as<Floats>(half << 16);
    Ints magnitude = half & 0x7fff;
    Floats value = bits_as<Floats>(magnitude << 13) * bits_as<float>(0x77800000u);
    value = magnitude >= 0x7c00 ? bits_as<Floats>(magnitude << 13 | 0x7f800000) : value;
    return bits_as<Floats>(bits_as<Ints>(value) | (half & 0x8000) << 16);
}

static inline int bytes_of(Dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }
