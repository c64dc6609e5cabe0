/* The KV cache in eight bits: rounding a key or a value to codes and a scale, and the tiles of attention over codes.
 *
 * What it is: a head's vector of one token is `dim` codes (int8, E4M3, E5M2) and one bfloat16 scale, the largest magnitude by the format's largest,
 * rounded *up*, so that the codes, which are made with the rounded scale, lose nothing to its rounding. Codes lie in panels as float32 caches do
 * (attention/layout.py), a byte each; they are widened exactly, in registers for few rows, into scratch memory for many. Both are the same chain of
 * fused multiply-adds, so that a row's result does not depend on which it was. Scales are the caller's affair: a key's multiplies its score, a value's
 * its weight.
 * What it does not know: softmax, pages, threads.
 */
#ifndef PENSTOCK_KV_H
#define PENSTOCK_KV_H

#include "codes.h"


/* A small float's bits stand in a float32's place for them, which means 2^-120 (E4M3) or 2^-112 (E5M2) of it and is as exact for subnormal codes: three
 * cheap instructions. What they are multiplied with is lifted by KV_LIFT, so that products stay far from float32's own subnormal range, and what comes
 * out is multiplied with KV_UNIT: powers of two, which round nothing. */
#define KV_LIFT(format) ((format) == P_INT8 ? 1.0f : 0x1p96f)
#define KV_UNIT(format) ((format) == P_INT8 ? 1.0f : (format) == P_E4M3 ? 0x1p24f : 0x1p16f)
INLINE vf kv_value(const int format, const char *p) {
#if VL == 16
    const vu code = (vu)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif VL == 8
    const vu code = (vu)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    const vu code = (vu)__builtin_convertvector(*(const vb_any *)p, vi);
#endif
    if (format == P_E4M3) return (vf)(code << 20 & 0x87f00000u);
    if (format == P_E5M2) return (vf)(code << 21 & 0x8fe00000u);
    return __builtin_convertvector((vi)code, vf);
}

/* --- Storing. */

#define KV_LARGEST(format) ((format) == P_INT8 ? 127.0f : (format) == P_E4M3 ? 448.0f : 57344.0f)

/* The scale of x[dim], a bfloat16 value: `fixed` if it is not 0. NaN if x is not finite. */
INLINE float kv_scale(const int format, const float *x, long dim, float fixed) {
    vf top = vset(0x1p-100f); /* smaller rows have this one's scale: a row of zeros stays zeros */
    vu wrong = vuset(0);
    for (long d = 0; d < dim; d += VL) {
        vu size = (vu)vload(x + d) & 0x7fffffffu;
        top = vmax((vf)size, top);
        wrong |= (vu)(size >= 0x7f800000u);
    }
    for (int i = 0; i < VL; i++)
        if (wrong[i]) return NAN;
    if (fixed != 0.0f) return fixed;
    const float scale = hmax(top) / KV_LARGEST(format);
    uint32_t u;
    memcpy(&u, &scale, 4);
    return widen((uint16_t)((u + 0xffffu) >> 16)); /* up */
}

/* The nearest code of each, ties to even; subnormal codes are multiples of 2^-least. */
INLINE vu kv_float(vf v, const int mantissa, const int bias, const int least) {
    vu u = (vu)v, size = u & 0x7fffffffu;
    vu small = (vu)((vf)size * (float)(1u << least) + MAGIC) & 0x7fffffu;
    vu normal = (size + ((1u << (22 - mantissa)) - 1u) + (size >> (23 - mantissa) & 1u)) >> (23 - mantissa);
    normal -= (127u - (uint32_t)bias) << mantissa;
    vu least_normal = vuset((uint32_t)(128 - bias) << 23), is_small = (vu)(size < least_normal);
    return (small & is_small) | (normal & ~is_small) | (u >> 24 & 0x80u);
}
/* Codes of x[dim] with that scale; 0 where it is NaN. */
INLINE float kv_round(const int format, const float *x, long dim, float fixed, uint8_t *to) {
    const float scale = kv_scale(format, x, dim, fixed);
    if (scale != scale) {
        memset(to, 0, (size_t)dim);
        return scale;
    }
    const vf most = vset(KV_LARGEST(format));
    for (long d = 0; d < dim; d += VL) {
        vf v = vmax(-most, vmin(most, vload(x + d) / scale));
        vu code = format == P_E4M3 ? kv_float(v, 3, 7, 9) : format == P_E5M2 ? kv_float(v, 2, 15, 16) : (vu)(v + 12582912.0f);
        for (int i = 0; i < VL; i++) to[d + i] = (uint8_t)code[i];
    }
    return scale;
}

/* A (block, head) of a layer. */
typedef struct {
    char *k, *v;                   /* [block_size * dim] codes */
    uint16_t *k_scales, *v_scales; /* [block_size] bfloat16 */
    float k_fixed, v_fixed;        /* the scale that every token gets, or 0 */
} kv_block;

/* Write one head's key and value at `offset` of a (block, head): codes in panel order. */
INLINE void kv_write(const int format, const kv_block *to, long offset, const float *k, const float *v, long dim) {
    uint8_t codes[dim];
    const long group = offset / PW * PW * dim, r = offset % PW;
    to->k_scales[offset] = upper(kv_round(format, k, dim, to->k_fixed, codes));
    for (long d = 0; d < dim; d++) to->k[group + d * PW + r] = (char)codes[d];
    to->v_scales[offset] = upper(kv_round(format, v, dim, to->v_fixed, codes));
    for (long d = 0; d < dim; d += PW) memcpy(to->v + group + d * PW + r * PW, codes + d, PW);
}
static void write_codes(int format, const kv_block *to, long offset, const float *k, const float *v, long dim) {
    if (format == P_E4M3)
        kv_write(P_E4M3, to, offset, k, v, dim);
    else if (format == P_E5M2)
        kv_write(P_E5M2, to, offset, k, v, dim);
    else
        kv_write(P_INT8, to, offset, k, v, dim);
}

/* One row of K of the panels. As code_step of codes.h. */
INLINE void kv_step(const int format, const int mr, const int nv, vf (*acc)[NP_MAX * PV], const float *const *row, long k, const char *const *b) {
    if (mr <= 2) { /* wide and flat: the broadcasts stay in registers, the panels stream */
        vf a[2];
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) a[i] = vset(row[i][k]);
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) {
            const vf v = kv_value(format, b[j / PV] + k * PW + j % PV * VL);
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++) acc[i][j] = vfma(a[i], v, acc[i][j]);
        }
    } else {
        vf v[NP_MAX * PV];
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) v[j] = kv_value(format, b[j / PV] + k * PW + j % PV * VL);
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) {
            const vf a = vset(row[i][k]);
#pragma GCC unroll 32
            for (int j = 0; j < nv; j++) acc[i][j] = vfma(a, v[j], acc[i][j]);
        }
    }
    if (VL < 16) __asm__ volatile("" ::: "memory"); /* load a line again (a cache hit) rather than spill an accumulator */
}

/* --- Few rows: codes to float32 in registers. As tile_kernel of panel.h; the caller prefetches. */
INLINE void kv_kernel(const int format, const int mr, const int np, const tile_args *t) {
    const int nv = np * PV;
    vf acc[MR][NP_MAX * PV];
    const float *row[MR];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        row[i] = (const float *)t->a + i * t->lda;
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) acc[i][j] = t->add ? vload(t->c + i * t->ldc + j * VL) : vset(0.0f);
    }
    for (long s = 0; s < t->segments; s++) {
        const char *b[NP_MAX];
#pragma GCC unroll 8
        for (int p = 0; p < np; p++) b[p] = t->b[s * np + p];
        const long keys = s + 1 == t->segments ? t->last_k : t->seg_k;
        for (long k = 0; k < keys; k++) kv_step(format, mr, nv, acc, row, k, b);
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) row[i] += keys;
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) vstore(t->c + i * t->ldc + j * VL, acc[i][j]);
}

/* The same sizes as TILES of panel.h has, so that tile_width serves both. */
#define KV_OF(name, format, mr, np) static void kv_##name##_##mr##x##np(const tile_args *t) { kv_kernel(format, mr, np, t); }
#define KV_NARROW(name, format) \
    KV_OF(name, format, 1, 1) KV_OF(name, format, 2, 1) KV_OF(name, format, 3, 1) KV_OF(name, format, 4, 1) KV_OF(name, format, 5, 1) KV_OF(name, format, 6, 1)
#if VL == 16
#define KV_ALL(name, format) \
    KV_NARROW(name, format) KV_OF(name, format, 1, 2) KV_OF(name, format, 1, 4) KV_OF(name, format, 1, 8) KV_OF(name, format, 2, 2) KV_OF(name, format, 2, 4) \
    KV_OF(name, format, 3, 2) KV_OF(name, format, 3, 4) KV_OF(name, format, 4, 2) KV_OF(name, format, 4, 4) KV_OF(name, format, 5, 2) KV_OF(name, format, 5, 4) \
    KV_OF(name, format, 6, 2) KV_OF(name, format, 6, 4)
#define KV_ROW(name) \
    {{0}, {kv_##name##_1x1, kv_##name##_1x2, kv_##name##_1x4, kv_##name##_1x8}, {kv_##name##_2x1, kv_##name##_2x2, kv_##name##_2x4}, \
     {kv_##name##_3x1, kv_##name##_3x2, kv_##name##_3x4}, {kv_##name##_4x1, kv_##name##_4x2, kv_##name##_4x4}, \
     {kv_##name##_5x1, kv_##name##_5x2, kv_##name##_5x4}, {kv_##name##_6x1, kv_##name##_6x2, kv_##name##_6x4}}
#else
#define KV_ALL(name, format) KV_NARROW(name, format) KV_OF(name, format, 1, 2) KV_OF(name, format, 1, 4) KV_OF(name, format, 2, 2)
#define KV_ROW(name) \
    {{0}, {kv_##name##_1x1, kv_##name##_1x2, kv_##name##_1x4}, {kv_##name##_2x1, kv_##name##_2x2}, {kv_##name##_3x1}, {kv_##name##_4x1}, {kv_##name##_5x1}, \
     {kv_##name##_6x1}}
#endif
KV_ALL(int8, P_INT8)
KV_ALL(e4m3, P_E4M3)
KV_ALL(e5m2, P_E5M2)
static const tile_fn KV_TILES[3][MR + 1][4] = {KV_ROW(int8), KV_ROW(e4m3), KV_ROW(e5m2)};
INLINE tile_fn kv_tile_of(int format, int mr, int width) {
    return KV_TILES[format == P_INT8 ? 0 : format == P_E4M3 ? 1 : 2][mr][width == 1 ? 0 : width == 2 ? 1 : width == 4 ? 2 : 3];
}

/* --- Many rows: `count` rows of a panel of codes to float32. */
INLINE void kv_widen_rows(const int format, const char *from, long count, float *to) {
    for (long k = 0; k < count * PV; k++) vstore(to + k * VL, kv_value(format, from + k * VL));
}
static void kv_widen(int format, const char *from, long count, float *to) {
    if (format == P_E4M3)
        kv_widen_rows(P_E4M3, from, count, to);
    else if (format == P_E5M2)
        kv_widen_rows(P_E5M2, from, count, to);
    else
        kv_widen_rows(P_INT8, from, count, to);
}

#endif
