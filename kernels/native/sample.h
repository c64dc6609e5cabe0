/* Gumbel-max draws with Philox noise over filtered rows; the definition is kernels/sampling/reference.py.
 *
 * What it is: one row a unit. The row is divided by its temperature; top-k, top-p and min-p become one threshold, found without sorting by
 * radix selection over an order-preserving integer image of the floats (counts for top-k, probability mass for top-p); then the largest
 * logit + noise among the kept is found. Philox4x32-10 (Salmon et al., SC 2011) runs for blocks of tokens at once and only where a block
 * could still win; the exact double-precision noise is computed only for tokens whose cheap upper bound beats the best so far.
 * What it does not know: slots, penalties, masks (a masked token is -inf).
 */
#ifndef PENSTOCK_SAMPLE_H
#define PENSTOCK_SAMPLE_H

#include <stdlib.h>

#include "vec.h"

#define DRAW_PURPOSE 0u
#define LARGEST_NOISE 22.8808f /* -log(-log(1 - 2^-33)), rounded up */
#define LANES 16
#define RADIX_BITS 11
#define RADIX (1 << RADIX_BITS)

typedef struct {
    const float *logits;
    const float *temperature, *top_p, *min_p;
    const int32_t *top_k, *choices, *positions;
    const int64_t *seeds;
    int32_t *out;
    long n;
    atomic_int failed;
} drawing;

/* Larger floats give larger integers; the inverse is not needed: thresholds are found as floats among the row's own values. */
INLINE uint32_t ordered(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
INLINE float from_ordered(uint32_t key) {
    uint32_t u = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* First word of Philox4x32-10 for tokens first .. first + LANES - 1. */
static void philox_block(uint32_t choice, uint32_t position, uint64_t seed, uint32_t first, uint32_t *words) {
    uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES], k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < LANES; i++) c0[i] = choice, c1[i] = position, c2[i] = DRAW_PURPOSE, c3[i] = first + (uint32_t)i;
    for (int round = 0; round < 10; round++) {
#pragma omp simd
        for (int i = 0; i < LANES; i++) {
            const uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
            c1[i] = (uint32_t)p1;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c3[i] = (uint32_t)p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    memcpy(words, c0, sizeof c0);
}

INLINE double noise_of(uint32_t word) { return -log(-log(((double)word + 0.5) * 0x1p-32)); }

/* The k-th largest of n values. */
static float kth_largest(const float *x, long n, long k) {
    uint32_t prefix = 0, mask = 0;
    for (int shift = 32 - RADIX_BITS, bits = RADIX_BITS;;) {
        uint32_t count[RADIX] = {0};
        for (long i = 0; i < n; i++) {
            const uint32_t key = ordered(x[i]);
            if ((key & mask) == prefix) count[(key >> shift) & ((1u << bits) - 1)]++;
        }
        long bucket = (1 << bits) - 1;
        for (; bucket > 0 && k > count[bucket]; bucket--) k -= count[bucket];
        prefix |= (uint32_t)bucket << shift;
        mask |= ((1u << bits) - 1) << shift;
        if (shift == 0) return from_ordered(prefix);
        bits = MIN(RADIX_BITS, shift);
        shift -= bits;
    }
}

/* The value at which the mass of larger or equal values first reaches `wanted`; weights belong to x, only x >= limit count. */
static float mass_threshold(const float *x, const float *weight, long n, float limit, double wanted) {
    uint32_t prefix = 0, mask = 0;
    double above = 0.0;
    for (int shift = 32 - RADIX_BITS, bits = RADIX_BITS;;) {
        double mass[RADIX] = {0.0};
        uint8_t there[RADIX] = {0};
        for (long i = 0; i < n; i++) {
            const uint32_t key = ordered(x[i]);
            if (x[i] >= limit && (key & mask) == prefix) {
                mass[(key >> shift) & ((1u << bits) - 1)] += weight[i];
                there[(key >> shift) & ((1u << bits) - 1)] = 1;
            }
        }
        long bucket = (1 << bits) - 1, lowest = -1;
        for (; bucket >= 0; bucket--) {
            if (!there[bucket]) continue;
            lowest = bucket;
            if (above + mass[bucket] >= wanted) break;
            above += mass[bucket];
        }
        if (bucket < 0) { /* rounding: everything is needed; undo the lowest bucket's share for the next digit */
            if (lowest < 0) return limit;
            bucket = lowest;
            above -= mass[lowest];
        }
        prefix |= (uint32_t)bucket << shift;
        mask |= ((1u << bits) - 1) << shift;
        if (shift == 0) return from_ordered(prefix);
        bits = MIN(RADIX_BITS, shift);
        shift -= bits;
    }
}

static void draw_unit(const void *job, long row) {
    drawing *j = (drawing *)job;
    const long n = j->n;
    const float *logits = j->logits + row * n;
    long best_token = 0, i = 0;
    vf tops = vset(-INFINITY);
    vu nans = {0};
    for (; i + VL <= n; i += VL) {
        const vf v = vload(logits + i);
        tops = vmax(v, tops);
        nans |= (vu)(v != v);
    }
    float top = hmax(tops);
    int nan = 0;
    for (; i < n; i++) {
        top = logits[i] > top ? logits[i] : top;
        nan |= logits[i] != logits[i];
    }
    for (int lane = 0; lane < VL; lane++) nan |= nans[lane] != 0;
    if (nan || !(fabsf(top) <= 3.4028235e38f)) {
        j->out[row] = -1;
        return;
    }
    while (logits[best_token] != top) best_token++;
    const float temperature = j->temperature[row];
    if (!(temperature > 0.0f)) {
        j->out[row] = (int32_t)best_token;
        return;
    }
    const long padded_n = (n + LANES - 1) / LANES * LANES;
    float *x = aligned_alloc(64, (size_t)padded_n * 8);
    if (!x) {
        atomic_store(&j->failed, 1);
        return;
    }
    float *weight = x + padded_n;
    for (i = 0; i < n; i++) x[i] = logits[i] / temperature;
    for (; i < padded_n; i++) x[i] = -INFINITY;
    top = x[best_token];
    best_token = 0; /* dividing may make more values equal to the largest: the first of them */
    while (x[best_token] != top) best_token++;
    float limit = -3.4028235e38f;
    if (!(fabsf(top) <= 3.4028235e38f)) { /* a temperature so small that the division overflows: greedy */
        j->out[row] = (int32_t)best_token;
        free(x);
        return;
    }
    const long k = j->top_k[row];
    if (k > 0 && k < n) limit = MAX(limit, kth_largest(x, n, k));
    const float p = j->top_p[row];
    if (p < 1.0f) {
        double total = 0.0;
        const vf shift = vset(top);
        for (i = 0; i < padded_n; i += VL) vstore(weight + i, vexp(vmax(vload(x + i) - shift, vset(-87.0f))));
        for (i = 0; i < n; i++) total += x[i] >= limit ? (double)weight[i] : 0.0;
        limit = MAX(limit, mass_threshold(x, weight, n, limit, (double)p * total));
    }
    const float least = j->min_p[row];
    if (least > 0.0f) limit = MAX(limit, top + logf(least));
    const uint32_t choice = (uint32_t)j->choices[row], position = (uint32_t)j->positions[row];
    const uint64_t seed = (uint64_t)j->seeds[row];
    uint32_t words[LANES];
    philox_block(choice, position, seed, (uint32_t)best_token, words);
    double best = (double)top + noise_of(words[0]);
    for (long first = 0; first < padded_n; first += LANES) {
        const float *at = x + first;
        vf tops_here = vload(at);
        for (int lane = VL; lane < LANES; lane += VL) tops_here = vmax(vload(at + lane), tops_here);
        const float largest = hmax(tops_here);
        if (largest < limit || (double)largest + LARGEST_NOISE < best) continue;
        philox_block(choice, position, seed, (uint32_t)first, words);
        float bound[LANES];
        /* noise = -log(-log(u)) <= -log(1 - u); v <= 2^31 (1 - u); log2(v) >= exponent + mantissa of v as a float, read off its bits. The
         * 1e-3 covers the roundings. */
        for (int lane = 0; lane < LANES; lane++) {
            const float v = (float)(int32_t)(~words[lane] >> 1) + 0.25f;
            int32_t bits;
            memcpy(&bits, &v, 4);
            bound[lane] = at[lane] + (0.69314718f * (31.0f - ((float)bits * 0x1p-23f - 127.0f)) + 1e-3f);
        }
        const float beat = (float)best - 1e-5f * fabsf((float)best);
        for (int lane = 0; lane < LANES; lane++) {
            if (bound[lane] < beat || at[lane] < limit) continue;
            const double score = (double)at[lane] + noise_of(words[lane]);
            if (score > best || (score == best && first + lane < best_token)) {
                best = score;
                best_token = first + lane;
            }
        }
    }
    j->out[row] = (int32_t)best_token;
    free(x);
}

#endif
