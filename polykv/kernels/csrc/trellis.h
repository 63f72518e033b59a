// Blocks of 16 trellis codes of 1 to 6 bits; format and search as in polykv/codecs/trellis.py.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "encode.h"

constexpr int CODES = 16;  // in a block

constexpr float REACH = 3.5f;  // of a key's largest value over what its blocks are divided by

// Bits that a level depends on, the number of levels, and where theirs start in the table of all widths.
constexpr int window_of(int bits) { return bits < 3 ? 8 : bits + 5; }
constexpr int n_windows(int bits) { return 1 << window_of(bits); }
constexpr int table_of(int bits) { return bits <= 1 ? 0 : table_of(bits - 1) + n_windows(bits - 1); }

// The bits of a block's codes: the lowest 64, and the others.
template <int BITS>
static inline std::pair<uint64_t, uint64_t> block_at(const uint8_t* from) {
    constexpr int BYTES = 2 * BITS;
    if constexpr (BYTES == 2) return {load<uint16_t>(from), 0};
    if constexpr (BYTES == 4) return {load<uint32_t>(from), 0};
    if constexpr (BYTES == 6) return {load<uint32_t>(from) | uint64_t(load<uint16_t>(from + 4)) << 32, 0};
    const uint64_t low = load<uint64_t>(from);
    if constexpr (BYTES == 8) return {low, 0};
    if constexpr (BYTES == 10) return {low, load<uint16_t>(from + 8)};
    return {low, load<uint32_t>(from + 8)};
}

// The levels of LANES codes of a block, from number `first` on; `levels` are those of its width.
template <int BITS>
static inline Floats block_levels(const uint8_t* from, const float* levels, int first) {
    const auto [low, high] = block_at<BITS>(from);
    typedef std::conditional_t<BITS <= 3, uint64_t, unsigned __int128> Ring;
    Ring ring = low | Ring(uint16_t(low)) << (16 * BITS);  // the first codes once more at the end
    if constexpr (BITS > 4) ring |= Ring(high) << 64;
    Floats level;
    for (int l = 0; l < LANES; l++) {
        const int bit = (first + l) * BITS;
        const uint32_t window = BITS == 4 ? low >> bit | low << (-bit & 63) : uint64_t(ring >> bit);
        level[l] = levels[window & (n_windows(BITS) - 1)];
    }
    return level;
}

// The levels of one block of `n` tokens, as block_rows of waterfill.h; `levels` are those of all widths.
template <int BITS, bool ADD>
static void trellis_rows(const uint8_t* from, int64_t stride, const float* levels, const float* factor, float scale,
                         int n, int dim, float* out) {
    levels += table_of(BITS);
    for (int t = 0; t < n; t++, from += stride, out += dim)
        for (int i = 0; i < CODES; i += LANES) {
            const Floats level = block_levels<BITS>(from, levels, i);
            store(out + i, ADD ? load<Floats>(out + i) + level * (factor[t] * scale) : level);
        }
}

// The way of least squared error through N values, the last one first; `y` is read over and over. On return cost[key] is
// its error if it ends in `key`, and choice[i][key] which of the windows that leave `key` it took for value i.
template <int BITS, int N>
static void search(const float* y, const float* levels, float* cost, uint8_t (*choice)[n_windows(BITS) >> BITS]) {
    constexpr int KEYS = n_windows(BITS) >> BITS, EACH = 1 << BITS;
    alignas(64) float total[KEYS * EACH];
    for (int i = N - 1; i >= 0; i--) {
        for (int key = 0; key < KEYS; key++)
            for (int code = 0; code < EACH; code++) {
                const float off = y[i % CODES] - levels[key * EACH + code];
                total[key * EACH + code] = cost[key] + off * off;
            }
        for (int start = 0; start < KEYS; start += LANES) {
            Floats least = load<Floats>(total + start);
            Ints which{};
            for (int j = 1; j < EACH; j++) {
                const Floats one = load<Floats>(total + j * KEYS + start);
                which = one < least ? j | Ints{} : which;
                least = one < least ? one : least;
            }
            store(cost + start, least);
            store(choice[i] + start, low_bytes(which));
        }
    }
}

// The codes of a block: of a ring, as the bits after its last code are those of the first ones.
template <int BITS>
static void trellis_codes(const float* y, const float* levels, uint8_t* codes) {
    constexpr int KEYS = n_windows(BITS) >> BITS;
    alignas(64) float cost[KEYS] = {};
    alignas(64) uint8_t choice[2 * CODES][KEYS];
    search<BITS, 2 * CODES>(y, levels, cost, choice);
    int key = int(std::min_element(cost, cost + KEYS) - cost);
    for (int i = 0; i < CODES; i++) key = (key + choice[i][key] * KEYS) >> BITS;
    for (int other = 0; other < KEYS; other++) cost[other] = other == key ? 0.0f : __builtin_inff();
    search<BITS, CODES>(y, levels, cost, choice);
    for (int i = 0; i < CODES; i++) {
        const int window = key + choice[i][key] * KEYS;
        codes[i] = window & ((1 << BITS) - 1);
        key = window >> BITS;
    }
}

// 16 codes of each of `n` tokens, packed, of y * factor[t] * scale. Rows of `y` are `dim` apart, those of `out` `stride`
// bytes.
template <int BITS>
static void encode_trellis(const float* y, int dim, const float* factor, float scale, int n, const float* levels,
                           uint8_t* out, int64_t stride) {
    alignas(64) float block[CODES];
    alignas(16) uint8_t codes[CODES];
    for (int t = 0; t < n; t++, y += dim, out += stride) {
        for (int i = 0; i < CODES; i += LANES) store(block + i, load<Floats>(y + i) * (factor[t] * scale));
        trellis_codes<BITS>(block, levels + table_of(BITS), codes);
        pack<BITS>(codes, CODES, out);
    }
}
