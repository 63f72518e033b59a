// The two number formats of the products in attention: fp32, and pairs of bfloat16 whose products add up in fp32.
#pragma once

#include "vector.h"

// Buffers hold fp32; `columns` and `rows` turn them into the format in place. EACH values take the place of one float.
// `rounded` is a number as `rows` rounds it.
struct Singles {
    static constexpr int EACH = 1;
    static Floats add(Floats sum, float a, Floats b) { return sum + a * b; }
    static Floats rounded(Floats x) { return x; }
    static void columns(float*, int64_t) {}
    static void rows(float*, int, int) {}
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>

// Rounded to nearest, ties to even; subnormal numbers are zero (AVX-512 BF16).
struct Pairs {
    static constexpr int EACH = 2;

    static Floats add(Floats sum, float a, Floats b) {
        const Floats both = Floats{} + a;
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)b);
    }

    static Floats rounded(Floats x) {
        const Ints bits = bits_as<Ints>(x);
        return bits_as<Floats>((bits + 0x7fff + (bits >> 16 & 1)) & ~0xffff);
    }

    // Values 2i and 2i + 1 of `n` become pair i; up to LANES values behind them are read.
    static void columns(float* x, int64_t n) {
        for (int64_t i = 0; i < n; i += 2 * LANES)
            store(x + i / 2, _mm512_cvtne2ps_pbh((__m512)load<Floats>(x + i + LANES), (__m512)load<Floats>(x + i)));
    }

    // Rows 2i and 2i + 1 of (n, width) become row i of pairs; the last of an odd number is paired with zeros.
    static void rows(float* x, int n, int width) {
        alignas(64) uint16_t order[2 * LANES];
        for (int i = 0; i < LANES; i++) order[2 * i] = i, order[2 * i + 1] = LANES + i;
        const __m512i alternate = load<__m512i>(order);
        for (int row = 0; row < n; row += 2)
            for (int i = 0; i < width; i += LANES) {
                const float* from = x + row * width + i;
                const Floats low = load<Floats>(from), high = row + 1 < n ? load<Floats>(from + width) : Floats{};
                const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
                store(x + row / 2 * width + i, _mm512_permutexvar_epi16(alternate, (__m512i)both));
            }
    }
};
using HalfProducts = Pairs;
#else
using HalfProducts = Singles;
#endif
