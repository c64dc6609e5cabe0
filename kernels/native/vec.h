/* Vectors: one float vector type per instruction set, and the elementwise mathematics on it.
 *
 * What it is: VL floats (16 with AVX-512, 8 with AVX2 and FMA, else 4 by GCC's generic vectors), loads and stores of float32 and
 * bfloat16, rounding to bfloat16 (to nearest, ties to even, NaN kept), exp. Contraction is off (-ffp-contract=off): a fused
 * multiply-add happens where `vfma` is written and nowhere else, so an element's result never depends on which loop computed it.
 * What it does not know: matrices, heads, threads.
 */
#ifndef PENSTOCK_VEC_H
#define PENSTOCK_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#define VL 16
#if defined(__AVX512BF16__)
#define DOTS 1 /* pairs of bfloat16 are multiplied as they are (dot.h) */
#define ISA "avx512bf16"
#else
#define ISA "avx512"
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define VL 8
#define ISA "avx2"
#else
#define VL 4
#define ISA "generic"
#endif

#ifndef DOTS
#define DOTS 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vf __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));

INLINE vf vload(const float *p) { return *(const vf_any *)p; }
INLINE void vstore(float *p, vf v) { *(vf_any *)p = v; }

#if VL == 16
INLINE vf vset(float x) { return (vf)_mm512_set1_ps(x); }
INLINE vf vfma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
/* a > b ? a : b, so that a NaN in b stays. */
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif VL == 8
INLINE vf vset(float x) { return (vf)_mm256_set1_ps(x); }
INLINE vf vfma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE vf vset(float x) { return (vf){x, x, x, x}; }
INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vmax(vf a, vf b) { vu m = (vu)(a > b); return (vf)(((vu)a & m) | ((vu)b & ~m)); }
INLINE vf vmin(vf a, vf b) { vu m = (vu)(a < b); return (vf)(((vu)a & m) | ((vu)b & ~m)); }
#endif

INLINE vu vuset(uint32_t x) { return (vu){0} + x; }
INLINE vf vselect(vu mask, vf yes, vf no) { return (vf)(((vu)yes & mask) | ((vu)no & ~mask)); }

#if VL == 16
#define HALVES(v, op) \
    v = op(v, __builtin_shuffle(v, (vu){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7})); \
    v = op(v, __builtin_shuffle(v, (vu){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11})); \
    v = op(v, __builtin_shuffle(v, (vu){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13})); \
    v = op(v, __builtin_shuffle(v, (vu){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
#elif VL == 8
#define HALVES(v, op) \
    v = op(v, __builtin_shuffle(v, (vu){4, 5, 6, 7, 0, 1, 2, 3})); \
    v = op(v, __builtin_shuffle(v, (vu){2, 3, 0, 1, 6, 7, 4, 5})); \
    v = op(v, __builtin_shuffle(v, (vu){1, 0, 3, 2, 5, 4, 7, 6}));
#else
#define HALVES(v, op) \
    v = op(v, __builtin_shuffle(v, (vu){2, 3, 0, 1})); \
    v = op(v, __builtin_shuffle(v, (vu){1, 0, 3, 2}));
#endif
INLINE vf vadd(vf a, vf b) { return a + b; }
/* Sum and maximum over the lanes, as a fixed tree. */
INLINE float hsum(vf v) { HALVES(v, vadd) return v[0]; }
INLINE float hmax(vf v) { HALVES(v, vmax) return v[0]; }

/* Of bfloat16 to float32, and the upper halves of float32. Compilers' own conversions take several instructions. */
#if VL == 16
INLINE vf vwiden(vh h) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16); }
INLINE vh vupper(vf v) { return (vh)_mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)v, 16)); }
#else
INLINE vf vwiden(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
INLINE vh vupper(vf v) { return __builtin_convertvector((vu)v >> 16, vh); }
#endif
/* Rounded to the nearest bfloat16, and still held as float32. */
#if DOTS /* an instruction, which takes subnormal numbers for 0 */
INLINE vh vnarrow(vf x) { return (vh)_mm512_cvtneps_pbh((__m512)x); }
INLINE vu vnarrow_two(vf first, vf second) { return (vu)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
INLINE vf vround_bf16(vf x) { return vwiden(vnarrow(x)); }
#else
INLINE vf vround_bf16(vf x) {
    vu u = (vu)x;
    vu even = u + 0x7fffu + ((u >> 16) & 1u);
    vu nan = (vu)(x != x);
    return (vf)((((u | 0x00400000u) & nan) | (even & ~nan)) & 0xffff0000u);
}
INLINE vh vnarrow(vf x) { return vupper(vround_bf16(x)); }
#endif
INLINE float round_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    u = x != x ? (u | 0x00400000u) : u + 0x7fffu + ((u >> 16) & 1u);
    u &= 0xffff0000u;
    memcpy(&x, &u, 4);
    return x;
}
INLINE float widen(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}
/* The upper half of an already rounded value. */
INLINE uint16_t upper(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)(u >> 16);
}

/* Loads and stores of the two element types; `bf16` is a compile-time constant at the hot call sites. Stores round. */
INLINE vf vload_as(const void *p, long i, int bf16) {
    if (bf16) return vwiden(*(const vh_any *)((const uint16_t *)p + i));
    return vload((const float *)p + i);
}
INLINE void vstore_as(void *p, long i, vf v, int bf16) {
    if (bf16)
        *(vh_any *)((uint16_t *)p + i) = vnarrow(v);
    else
        vstore((float *)p + i, v);
}
INLINE float load_as(const void *p, long i, int bf16) { return bf16 ? widen(((const uint16_t *)p)[i]) : ((const float *)p)[i]; }
INLINE void store_as(void *p, long i, float x, int bf16) {
    if (bf16)
        ((uint16_t *)p)[i] = upper(round_bf16(x));
    else
        ((float *)p)[i] = x;
}

/* e^x, about 1 ulp: x = n ln 2 + r, |r| <= ln2/2, a degree-6 polynomial in r (Remez-like coefficients of Cephes' expf), exponent by
 * integer addition. Below -87.33 the result is 0 (softmax masks with -inf), above 88.37 it stays at 2.4e38; NaN stays NaN. */
INLINE vf vexp(vf x) {
    vf c = vmax(vset(-87.33f), vmin(vset(88.37f), x));
    vf magic = vset(12582912.0f);
    vf n = vfma(c, vset(1.44269504088896341f), magic) - magic;
    vf r = vfma(n, vset(-0.693359375f), c);
    r = vfma(n, vset(2.12194440e-4f), r);
    vf y = vset(1.9875691500e-4f);
    y = vfma(y, r, vset(1.3981999507e-3f));
    y = vfma(y, r, vset(8.3334519073e-3f));
    y = vfma(y, r, vset(4.1665795894e-2f));
    y = vfma(y, r, vset(1.6666665459e-1f));
    y = vfma(y, r, vset(5.0000001201e-1f));
    y = vfma(y, r * r, r) + 1.0f;
    vi e = __builtin_convertvector(n, vi) << 23;
    y = (vf)((vi)y + e);
    vu nan = (vu)(x != x);
    vu tiny = (vu)(x < vset(-87.33f));
    return vselect(nan, x, (vf)((vu)y & ~tiny));
}

/* 2^x for x <= 0, about 1 ulp (Taylor coefficients of 2^r on |r| <= 1/2); below -126, -inf included, exactly 0; NaN stays NaN. */
INLINE vf vexp2_falling(vf x) {
    vf n = x + 12582912.0f - 12582912.0f;
    vf r = x - n;
    vf y = vset(1.5403530393381606e-4f);
    y = vfma(y, r, vset(1.3333558146428443e-3f));
    y = vfma(y, r, vset(9.6181291076284772e-3f));
    y = vfma(y, r, vset(5.5504108664821580e-2f));
    y = vfma(y, r, vset(2.4022650695910071e-1f));
    y = vfma(y, r, vset(6.9314718055994531e-1f));
    y = vfma(y, r, vset(1.0f));
    y = (vf)((vi)y + (__builtin_convertvector(n, vi) << 23));
    return (vf)((vu)y & ~(vu)(x < vset(-126.0f)));
}

#if VL == 16
/* 2^x by two instructions of AVX-512, x less its floor and a multiplication by 2^floor(x), around a polynomial of least relative error on [0, 1): of degree 3
 * (7.5e-5, a 26th of half a bfloat16 step) or 5 (7.5e-8, and the roundings). Any x: below -149 the result is 0, -inf included; NaN stays NaN. */
INLINE vf vfraction(vf x) { return (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE vf vtimes_2_to(vf y, vf x) { return (vf)_mm512_scalef_ps((__m512)y, (__m512)x); }
INLINE vf vexp2_coarse(vf x) {
    const vf r = vfraction(x);
    vf y = vset(7.802452266e-2f);
    y = vfma(y, r, vset(2.260671554e-1f));
    y = vfma(y, r, vset(6.958335405e-1f));
    y = vfma(y, r, vset(9.999252186e-1f));
    return vtimes_2_to(y, x);
}
INLINE vf vexp2(vf x) {
    const vf r = vfraction(x);
    vf y = vset(1.877576673e-3f);
    y = vfma(y, r, vset(8.989340095e-3f));
    y = vfma(y, r, vset(5.582631805e-2f));
    y = vfma(y, r, vset(2.401536170e-1f));
    y = vfma(y, r, vset(6.931530732e-1f));
    y = vfma(y, r, vset(9.999999251e-1f));
    return vtimes_2_to(y, x);
}
#endif
/* x / (1 + e^-y). With AVX-512: an estimate of the divisor's reciprocal and one step of Newton's, e^-y at most 2^126. */
INLINE vf vlogistic(vf x, vf y) {
#if VL == 16
    const vf d = vexp2(vmin(vset(126.0f), y * -1.44269504088896341f)) + 1.0f;
    const vf r = (vf)_mm512_rcp14_ps((__m512)d);
    return x * (r * vfma(-d, r, vset(2.0f)));
#else
    return x / (vexp(-y) + 1.0f);
#endif
}

#endif
