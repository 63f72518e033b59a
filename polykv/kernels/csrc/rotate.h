// The orthonormal Hadamard rotation of codecs/rotation.py, as butterflies.
#pragma once

#include <cmath>

#include "vector.h"

constexpr int MAX_DIM = 256;

// x[i] + x[i ^ STEP] where bit STEP of i is clear, x[i ^ STEP] - x[i] where it is set.
template <int STEP>
static inline Floats butterfly_lanes(Floats x) {
    const Floats sign = (lane_index() & STEP) != 0 ? Floats{} - 1.0f : Floats{} + 1.0f;
    return swap_lanes<STEP>(x) + x * sign;
}

// The Hadamard transform (not scaled) of SIZE values, a power of two from 16 up.
template <int SIZE>
static void hadamard(float* x) {
    constexpr int N = SIZE / LANES;
    Floats v[N];
    for (int i = 0; i < N; i++) {
        v[i] = load<Floats>(x + i * LANES);
        v[i] = butterfly_lanes<1>(v[i]);
        v[i] = butterfly_lanes<2>(v[i]);
        if constexpr (LANES > 4) v[i] = butterfly_lanes<4>(v[i]);
        if constexpr (LANES > 8) v[i] = butterfly_lanes<8>(v[i]);
    }
    for (int step = 1; step < N; step *= 2)
        for (int i = 0; i < N; i++)
            if (!(i & step)) {
                Floats sum = v[i] + v[i + step];
                v[i + step] = v[i] - v[i + step];
                v[i] = sum;
            }
    for (int i = 0; i < N; i++) store(x + i * LANES, v[i]);
}

// The Hadamard transform of every block of a vector, not scaled: the block is the largest power of
// two that divides `dim`, which is a multiple of 16.
static inline void hadamard_blocks(float* x, int dim) {
    const int block = dim & -dim;
    for (int start = 0; start < dim; start += block) switch (block) {
        case 16: hadamard<16>(x + start); break;
        case 32: hadamard<32>(x + start); break;
        case 64: hadamard<64>(x + start); break;
        case 128: hadamard<128>(x + start); break;
        default: hadamard<256>(x + start);
    }
}

// The same in blocks of 16.
static inline void hadamard_each(float* x, int dim) {
    for (int start = 0; start < dim; start += 16) hadamard<16>(x + start);
}

static inline float hadamard_scale(int dim) { return 1.0f / std::sqrt(float(dim & -dim)); }

static inline void multiply(float* x, const float* by, int dim) {
    for (int i = 0; i < dim; i++) x[i] *= by[i];
}

// Into the rotated domain: x @ R with R = diag(signs) @ H; `signs` may be null.
static inline void rotate(float* x, const float* signs, int dim) {
    if (signs) multiply(x, signs, dim);
    hadamard_blocks(x, dim);
    for (int i = 0; i < dim; i++) x[i] *= hadamard_scale(dim);
}

// The inverse: y @ R.T.
static inline void unrotate(float* y, const float* signs, int dim) {
    hadamard_blocks(y, dim);
    for (int i = 0; i < dim; i++) y[i] *= hadamard_scale(dim);
    if (signs) multiply(y, signs, dim);
}
