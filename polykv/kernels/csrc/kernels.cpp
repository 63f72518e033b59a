// The functions that Python calls (polykv/kernels/cpu.py), on the memory of tensors; only one Scratch
// per thread is allocated.

#include <atomic>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "attend.h"
#include "suffix.h"
#include "waterfill_encode.h"

constexpr int64_t PART = 256;  // tokens of a head that a thread takes at a time

// GOMP_parallel of the OpenMP library that torch computes with, or null. Its threads wait by spinning for a while after a
// product of torch's, so that threads of our own would have to share the cores with them.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
static Parallel parallel = nullptr;

extern "C" void polykv_run_on(void* gomp_parallel) { parallel = reinterpret_cast<Parallel>(gomp_parallel); }

// Run work(next) on `threads` threads; next() returns 0, 1, ... n - 1, each once, and then -1.
template <typename Work>
static void spread(int64_t n, int64_t threads, const Work& work) {
    std::atomic<int64_t> taken{0};
    auto next = [&] {
        const int64_t i = taken.fetch_add(1);
        return i < n ? i : -1;
    };
    auto take = [&] { work(next); };
    if (parallel && threads > 1 && n > 1) {
        auto call = [](void* taking) { (*static_cast<decltype(take)*>(taking))(); };
        return parallel(call, &take, unsigned(threads), 0);
    }
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < threads && i < n; i++) others.emplace_back(take);
    } catch (const std::system_error&) {  // no more threads available: the existing ones do all the work
    }
    take();
    for (auto& other : others) other.join();
}

// Run part(head, start, stop) on parts of every head's tokens; false if any call is.
template <typename Part>
static bool each_part(int64_t heads, int64_t tokens, int64_t threads, const Part& part) {
    const int64_t parts = (tokens + PART - 1) / PART;
    std::atomic<bool> good{true};
    spread(heads * parts, threads, [&](auto& next) {
        for (int64_t i; (i = next()) >= 0;) {
            const int64_t start = i % parts * PART, stop = start + PART < tokens ? start + PART : tokens;
            if (!part(i / parts, start, stop)) good = false;
        }
    });
    return good;
}

// Run row(from, number) on every row of `x`, numbered in the order of the output.
template <typename Row>
static bool each_row(const Input& x, int64_t threads, const Row& row) {
    return each_part(x.batch * x.heads, x.tokens, threads, [&](int64_t head, int64_t start, int64_t stop) {
        const uint8_t* base = head_of(x.data, x.strides, x, head);
        bool good = true;
        for (int64_t t = start; t < stop; t++) good &= row(base + t * x.strides[2], head * x.tokens + t);
        return good;
    });
}

static bool encode_int8_tensor(const Input& x, const Packed& to, int64_t threads) {
    const Dtype dtype = x.dtype;
    const int dim = int(x.dim);
    std::atomic<int32_t> most{0};
    each_row(x, threads, [&](const uint8_t* from, int64_t) {
        const int32_t found = absmax_bits(from, dtype, dim);
        for (int32_t seen = most; found > seen && !most.compare_exchange_weak(seen, found);) {}
        return true;
    });
    if (most >= INFINITE) return false;
    float scale = bits_as<float>(most.load()) / 127.0f;
    if (scale < 0x1p-126f) scale = 0.0f;
    store(to.scale, scale);
    return each_row(x, threads, [&](const uint8_t* from, int64_t row) {
        encode_int8(from, dtype, dim, scale, (int8_t*)to.codes + row * dim);
        return true;
    });
}

// Mean, plan and widths of WATERFILL, from two passes over the keys; arguments and result as polykv_encode_log.
static bool waterfill_statistics(const Input& x, const Packed& to, const Turns& turns, const Allocation& plan,
                                 double* sums, int64_t threads) {
    const int64_t dim = x.dim, heads = x.batch * x.heads, parts = (x.tokens + PART - 1) / PART;
    std::vector<float> mean(heads * dim), importance(heads * dim / CODES);
    float sigma[MAX_DIM];
    bool good = true;
    for (const bool squares : {false, true}) {
        each_part(heads, x.tokens, threads, [&](int64_t head, int64_t start, int64_t stop) {
            double* out = sums + (head * parts + start / PART) * dim;
            const float* of = mean.data() + head * dim;
            turns.with_dim(dim, [&](auto fixed) {
                auto* add = squares ? sums_of<decltype(fixed)::value, true> : sums_of<decltype(fixed)::value, false>;
                add(x, to, turns, head, of, start, stop, out);
            });
            return true;
        });
        for (int64_t head = 0; head < heads; head++) {
            for (int64_t c = 0; c < dim; c++) {
                double sum = 0.0;
                for (int64_t part = 0; part < parts; part++) sum += sums[(head * parts + part) * dim + c];
                sum /= double(x.tokens);
                if (squares) sigma[c] = float(std::sqrt(sum));
                else good &= store_half(plan.centred ? float(sum) : 0.0f, &to.mean[head * dim + c], &mean[head * dim + c]);
            }
            if (squares)
                good &= plan_head(to, head, sigma, plan.query_rms ? plan.query_rms + head * dim : nullptr,
                                  &importance[head * dim / CODES]);
        }
        if (!good) return false;
    }
    for (int64_t head = 0; head < heads; head += x.heads)
        allocate_bits(to, head, &importance[head * dim / CODES], plan);
    return true;
}

extern "C" {

// Encode `input` into the contiguous tensors of `packed`. Returns 0 if a value, scale or norm is not
// finite; the output is then invalid.
int polykv_encode(const Input* input, const Packed* packed, int64_t threads) {
    const Input x = *input;
    const Packed to = *packed;
    const int dim = int(x.dim), packed_dim = dim / 8 * to.bits;
    const int block = to.kind == UNIFORM ? to.block : 32, scales = (dim + block - 1) / block;
    int8_t* codes = (int8_t*)to.codes;
    uint16_t* scale = (uint16_t*)to.scale;
    if (to.kind == INT8_TENSOR) return encode_int8_tensor(x, to, threads);
    return each_row(x, threads, [&](const uint8_t* from, int64_t row) {
        if (to.kind == INT8_TOKEN)
            return encode_int8_token(from, x.dtype, dim, codes + row * dim, scale + row);
        if (to.kind == Q8_0)
            return encode_q8_0(from, x.dtype, dim, codes + row * dim, scale + row * scales);
        if (to.kind == UNIFORM)
            return encode_uniform(from, x.dtype, to, to.codes + row * packed_dim, scale + row * scales);
        return encode_turboquant(from, x.dtype, to, to.codes + row * packed_dim, scale + row);
    });
}

// Encode `input` into the contiguous tensors of `packed`, of kind TURBOQUANT_LOG or WATERFILL, whose plan is `plan`.
// `sums` is memory for (batch, heads, parts of PART tokens, dim), `norms` for (batch, heads, tokens) and TOKENS more.
// Returns as polykv_encode.
int polykv_encode_log(const Input* input, const Packed* packed, const Allocation* plan, double* sums, float* norms,
                      int64_t threads) {
    const Input x = *input;
    const Packed to = *packed;
    const Turns turns(to);
    if (to.kind == WATERFILL && !waterfill_statistics(x, to, turns, *plan, sums, threads)) return 0;
    const int64_t heads = x.batch * x.heads, parts = (x.tokens + PART - 1) / PART;
    for (const bool write : {false, true}) {
        each_part(heads, x.tokens, threads, [&](int64_t head, int64_t start, int64_t stop) {
            const Coding coding{x, to, head, write, norms + head * x.tokens};
            sums[head * parts + start / PART] =
                to.kind == TURBOQUANT_LOG ? coding.values(start, stop) : turns.with_dim(x.dim, [&](auto dim) {
                    return coding.keys<decltype(dim)::value>(turns, start, stop);
                });
            return true;
        });
        for (int64_t head = 0; head < heads && !write; head++) {
            const double* of_parts = sums + head * parts;
            to.largest[head] = half_of_float(float(*std::max_element(of_parts, of_parts + parts)));
            if (to.largest[head] >= INFINITE_HALF) return 0;
        }
    }
    return 1;
}

// Decode into fp32 `out` (batch, heads, tokens, dim), without rotating back.
void polykv_decode(const Packed* packed, float* out, int64_t threads) {
    const Packed p = *packed;
    const int64_t dim = p.dim;
    each_part(p.batch * p.heads, p.tokens, threads, [&](int64_t head, int64_t start, int64_t stop) {
        for (int64_t t = start; t < stop; t++) {
            float factor, *row = out + (head * p.tokens + t) * dim;
            decode_rows(p, head, t, 1, row, &factor);
            for (int64_t d = 0; d < dim; d++) row[d] *= factor;
        }
        return true;
    });
}

// Attend to a segment in `splits` equal parts (at most one per token), and merge them. Writes `out` (heads, queries, dim),
// rotated back, and `lse` (heads, queries), the natural log of the sum of exp(scaling * q.k). `parts` and `part_lse`
// are memory for the same of every split.
void polykv_attend(const Queries* queries, const Packed* key, const Packed* value, int64_t splits,
                   float* parts, float* part_lse, float* out, float* lse, int64_t threads) {
    const Queries q = *queries;
    const int64_t tiles = (q.count + TILE - 1) / TILE, heads = key->heads;
    spread(splits * heads * tiles, threads, [&](auto& next) {
        const std::unique_ptr<Scratch> scratch(new Scratch);
        for (int64_t i; (i = next()) >= 0;) {
            Job job{};
            job.head = i / tiles % heads;
            job.first = i % tiles * TILE;
            job.count = q.count - job.first < TILE ? q.count - job.first : TILE;
            const int64_t split = i / tiles / heads;
            job.start = split * key->tokens / splits;
            job.stop = (split + 1) * key->tokens / splits;
            const int64_t to = (split * heads + job.head) * q.count + job.first;
            job.out = parts + to * key->dim;
            job.lse = part_lse + to;
            attend_job(*scratch, q, *key, *value, job);
        }
    });
    for (int64_t row = 0; row < heads * q.count; row++)
        lse[row] = merge_parts(parts + row * key->dim, part_lse + row, splits, heads * q.count, key->dim, out + row * key->dim);
}

// Attention of every agent to its own tokens, merged with what `suffix` holds of another. Writes `out` (agents, heads,
// rows, dim) and `lse` (agents, heads, rows). `keys` and `values` are of kinds that `decode_rows` decodes without a
// rotation.
void polykv_attend_suffix(const Suffix* suffix, const Packed* keys, const Packed* values, float* out, float* lse,
                          int64_t threads) {
    Suffix s = *suffix;
    s.keys = keys, s.values = values;
    spread(s.agents * s.heads, threads, [&](auto& next) {
        std::vector<float> scores;
        for (int64_t i; (i = next()) >= 0;) attend_own(s, i / s.heads, i % s.heads, scores, out, lse);
    });
}
}
