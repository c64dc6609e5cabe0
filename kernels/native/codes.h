/* Panels of codes: the micro-kernel over quantised weights, widening them to float32 for the other one, and packing.
 *
 * What it is: a panel is 16 columns, as in panel.h. Its rows of K come in groups; a group is 16 float32 scales, 16 float32 zero points where the
 * format has them, and the codes: 8-bit ones [k][16] bytes, filled up to whole cache lines, 4-bit ones [ceil(k / 8)][16] words of 32 bits with the
 * code of k in bits 4 (k % 8), or where pairs are multiplied (DOTS) those of even k in the lower half and of odd k in the upper one; BYTE_PAIRS says how 8-bit ones lie then. An element of the result is
 *
 *     sum over groups of  scale * (sum over the group's k of  a[k] * (value(code) - zero))
 *
 * where value(code) - zero is exact in float32; the inner sums are chains of fused multiply-adds over rising k, from 0 in every group, the outer one is
 * a chain over the groups. Whether the codes are widened in registers (few rows) or into a scratch panel (many), that is the same chain.
 * What it does not know: threads, epilogues, how a format's scales were found.
 */
#ifndef PENSTOCK_CODES_H
#define PENSTOCK_CODES_H

#include "panel.h"

/* What a panel holds; native/bind.py has the same numbers. P_TABLE4 looks its 4-bit codes up; P_WIDENED is what codes become in scratch memory: float32
 * values, a cache line a k, and the groups' scales. */
enum { P_F32, P_BF16, P_INT8, P_INT8_ZEROS, P_E4M3, P_E5M2, P_INT4, P_INT4_ZEROS, P_TABLE4, P_WIDENED, FORMATS };
#define CODED(format) ((format) >= P_INT8)
#define ZEROED(format) ((format) == P_INT8_ZEROS || (format) == P_INT4_ZEROS)
#define NIBBLES(format) ((format) >= P_INT4 && (format) <= P_TABLE4)

#define LINE 64
#define CODES_AHEAD 1024 /* bytes that the prefetch of a streamed panel runs ahead */

static long group_bytes(int format, long k) {
    return LINE * (ZEROED(format) ? 2 : 1) + (NIBBLES(format) ? (k + 7) / 8 : (k + 3) / 4) * LINE;
}

#if DOTS
#define NIBBLE_AT(i) ((i) % 2 * 16 + (i) / 2 * 4)
#else
#define NIBBLE_AT(i) (4 * (i))
#endif

/* --- Sixteen values by number. */
#if VL == 16
typedef struct {
    vf v;
} lookup;
INLINE lookup lookup_of(const float *table) { return (lookup){vload(table)}; }
INLINE vf look_up(const lookup *t, vu index) { return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)t->v); } /* the low four bits count */
#if DOTS
/* The same as bfloat16, by the low four bits of each half: 32 entries, so that a fifth bit does not matter. */
typedef struct {
    vu v;
} pairs_table;
INLINE pairs_table pairs_of(const float *table) {
    const __m256i values = (__m256i)vnarrow(vload(table));
    return (pairs_table){(vu)_mm512_inserti64x4(_mm512_castsi256_si512(values), values, 1)};
}
INLINE vu look_up_pair(const pairs_table *t, vu index) { return (vu)_mm512_permutexvar_epi16((__m512i)index, (__m512i)t->v); }
#endif
#elif VL == 8
typedef struct {
    vf low, high;
} lookup;
INLINE lookup lookup_of(const float *table) { return (lookup){vload(table), vload(table + 8)}; }
INLINE vf look_up(const lookup *t, vu index) { /* the low three bits count, and the fourth as a sign */
    __m256 low = _mm256_permutevar8x32_ps((__m256)t->low, (__m256i)index), high = _mm256_permutevar8x32_ps((__m256)t->high, (__m256i)index);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(index << 28));
}
#else
typedef struct {
    const float *table;
} lookup;
INLINE lookup lookup_of(const float *table) { return (lookup){table}; }
INLINE vf look_up(const lookup *t, vu index) {
    vf v;
    for (int i = 0; i < VL; i++) v[i] = t->table[index[i] & 15u];
    return v;
}
#endif

/* --- What codes mean. Integers of 4 bits are the low bits of MAGIC's mantissa, so that one subtraction takes MAGIC and the zero point away, exactly;
 * where a permutation of 16 values is one instruction, they are looked up like the others. */
#define MAGIC 8388608.0f
#if VL == 16
#define BY_TABLE(format) NIBBLES(format)
#else
#define BY_TABLE(format) ((format) == P_TABLE4)
#endif

/* Where 128 values are looked up by one instruction: an 8-bit code is a sign and seven bits that are. Each quarter of a line holds four columns, first their
 * k 0 and 1, then their k 2 and 3, so that interleaving the upper and lower bytes of the values gives pairs of bfloat16. The least int8 is held as -0. */
#if DOTS && defined(__AVX512VBMI__)
#define BYTE_PAIRS 1
#define BYTE_AT(k, c) ((c) / 4 * 16 + (k) / 2 * 8 + (c) % 4 * 2 + (k) % 2)
INLINE uint8_t byte_code(int format, uint8_t code) {
    return format <= P_INT8_ZEROS && code & 0x80 ? (uint8_t)(0x80 | (0x100 - code)) : code;
}
static _Alignas(64) uint8_t BYTE_VALUES[3][2][128]; /* of int8, E4M3, E5M2: the lower and the upper byte of each value */
__attribute__((constructor)) static void byte_values(void) {
    for (int i = 0; i < 128; i++)
        for (int f = 0; f < 3; f++) {
            const int bits = f == 1 ? 3 : 2, bias = f == 1 ? 7 : 15, e = i >> bits, m = i & ((1 << bits) - 1);
            float v = f == 0 ? (float)i : e ? ldexpf((float)(m + (1 << bits)), e - bias - bits) : ldexpf((float)m, 1 - bias - bits);
            if (f == 2 && e == 31) v = m ? NAN : INFINITY;
            BYTE_VALUES[f][0][i] = (uint8_t)upper(v);
            BYTE_VALUES[f][1][i] = (uint8_t)(upper(v) >> 8);
        }
}
/* The `which`-th pair of k of a line of codes, 0 or 1. */
INLINE vu byte_pair(const int format, const char *from, const int which) {
    const uint8_t(*values)[128] = BYTE_VALUES[format <= P_INT8_ZEROS ? 0 : format == P_E4M3 ? 1 : 2];
    const __m512i line = _mm512_loadu_si512(from);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(values[0]), line, _mm512_load_si512(values[0] + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(values[1]), line, _mm512_load_si512(values[1] + 64));
    high = _mm512_ternarylogic_epi32(high, line, _mm512_set1_epi8((char)0x80), 0xf8); /* or sign */
    if (format <= P_INT8_ZEROS) high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(line, _mm512_set1_epi8((char)0x80)), _mm512_set1_epi8((char)0xc3));
    return (vu)(which == 0 ? _mm512_unpacklo_epi8(low, high) : _mm512_unpackhi_epi8(low, high));
}
#else
#define BYTE_PAIRS 0
#define BYTE_AT(k, c) ((k) * PW + (c))
INLINE uint8_t byte_code(int format, uint8_t code) {
    (void)format;
    return code;
}
#endif

typedef int8_t vb_any __attribute__((vector_size(VL), aligned(1), may_alias));

/* An E4M3 code is held as the float16 with the same bits in the middle, which means 2^-8 of it: its scales are packed times 2^8. */
#if BYTE_PAIRS
#define E4M3_SCALE 1.0f
#elif VL >= 8 && defined(__F16C__)
#define E4M3_SCALE 256.0f
#if VL == 16
INLINE vf from_half(__m256i h) { return (vf)_mm512_cvtph_ps(h); }
INLINE vf e4m3(const char *p) {
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
    return from_half(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbf80)));
}
INLINE vf e5m2(const char *p) { return from_half(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p)), 8)); }
#else
INLINE vf from_half(__m128i h) { return (vf)_mm256_cvtph_ps(h); }
INLINE vf e4m3(const char *p) {
    __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p));
    return from_half(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((short)0xbf80)));
}
INLINE vf e5m2(const char *p) { return from_half(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)p)), 8)); }
#endif
#else
#define E4M3_SCALE 1.0f
/* Sign, exponent of `bits - mantissa - 1` bits with this bias, mantissa; subnormal codes are an integer times a power of two. */
INLINE vf small_float(const char *p, const int mantissa, const int bias, const float least) {
    vu code = (vu)__builtin_convertvector(*(const vb_any *)p, vi), body = code & 0x7fu, low = vuset((1u << mantissa) - 1);
    vf subnormal = __builtin_convertvector((vi)body, vf) * least;
    vu normal = (body << (23 - mantissa)) + ((127u - (uint32_t)bias) << 23);
    normal |= mantissa == 2 ? (vu)(body >= 0x7cu) & 0x7f800000u : vuset(0); /* only E5M2 has infinities */
    return (vf)((vu)vselect((vu)(body > low), (vf)normal, subnormal) | (code & 0x80000000u));
}
INLINE vf e4m3(const char *p) { return small_float(p, 3, 7, 0x1p-9f); }
INLINE vf e5m2(const char *p) { return small_float(p, 2, 15, 0x1p-16f); }
#endif

/* The `which`-th of a line's four, the `half`-th vector of its 16. */
#if BYTE_PAIRS
INLINE vf byte_value(const int format, const char *from, const int which, const int half) {
    (void)half;
    const vu pair = which < 2 ? byte_pair(format, from, 0) : byte_pair(format, from, 1);
    return (vf)(which % 2 ? pair & 0xffff0000u : pair << 16);
}
#else
INLINE vf byte_value(const int format, const char *from, const int which, const int half) {
    const char *p = from + which * PW + half * VL;
    if (format == P_E4M3) return e4m3(p);
    if (format == P_E5M2) return e5m2(p);
#if VL == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif VL == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const vb_any *)p, vi), vf);
#endif
}
#endif
INLINE vf nibble_value(const int format, vu word, const lookup *table) {
    if (BY_TABLE(format)) return look_up(table, word);
    return (vf)((word & 15u) | 0x4b000000u);
}
/* What is taken from a value: nothing, the zero point, or that and MAGIC. `zeros` is the group's, where the format has them. */
INLINE int shifted(const int format) { return ZEROED(format) || (NIBBLES(format) && !BY_TABLE(format)); }
INLINE vf shift_of(const int format, const char *zeros) {
    vf zero = ZEROED(format) ? vload((const float *)zeros) : vset(8.0f);
    return NIBBLES(format) && !BY_TABLE(format) ? zero + MAGIC : zero;
}

/* --- Few rows: codes to float32 in registers. */
typedef struct {
    const void *a; /* [mr][lda], float32 (codes_dot.h: bfloat16) */
    long lda, k, group;
    const char *const *b; /* [np] panels */
    const float *table;   /* 16 values */
    float *c;             /* [mr][ldc] */
    long ldc, panel_bytes;
    int add; /* start from C instead of 0 */
} codes_args;

/* VL values of one k in the line at `from`: the `which`-th of it, the `half`-th vector of its 16. */
INLINE vf code_value(const int format, const char *from, const int which, const int half, const vf *shift, const lookup *table) {
    if (format == P_WIDENED) return vload((const float *)from + half * VL);
    vf v = NIBBLES(format) ? nibble_value(format, *(const vu_any *)(from + half * VL * 4) >> NIBBLE_AT(which), table) : byte_value(format, from, which, half);
    return shifted(format) ? v - *shift : v;
}

/* The k-th row of A times VL values, for each vector of the panels' row; `at` and `which`: where its codes lie. */
INLINE void code_step(const int format, const int mr, const int nv, vf (*acc)[NP_MAX * PV], const float *const *row, long k, const char *const *b, long at,
                      const int which, const vf *shift, const lookup *table) {
    if (mr <= 2) { /* wide and flat: the broadcasts stay in registers, the panels stream */
        vf a[2];
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) a[i] = vset(row[i][k]);
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) {
            const vf v = code_value(format, b[j / PV] + at, which, j % PV, shift + j, table);
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++) acc[i][j] = vfma(a[i], v, acc[i][j]);
        }
    } else {
        vf v[NP_MAX * PV];
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) v[j] = code_value(format, b[j / PV] + at, which, j % PV, shift + j, table);
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) {
            const vf a = vset(row[i][k]);
#pragma GCC unroll 32
            for (int j = 0; j < nv; j++) acc[i][j] = vfma(a, v[j], acc[i][j]);
        }
    }
    if (VL < 16) __asm__ volatile("" ::: "memory"); /* load a line again (a cache hit) rather than spill an accumulator */
}

INLINE void codes_kernel(const int format, const int mr, const int np, const codes_args *t) {
    const int nv = np * PV, per = NIBBLES(format) ? 8 : format == P_WIDENED ? 1 : 4; /* k's of one line */
    lookup table;
    if (NIBBLES(format)) table = lookup_of(t->table);
    const char *b[NP_MAX];
    const float *row[MR];
#pragma GCC unroll 8
    for (int p = 0; p < np; p++) b[p] = t->b[p];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) row[i] = (const float *)t->a + i * t->lda;
    long at = 0; /* in every panel */
    for (long k0 = 0; k0 < t->k; k0 += t->group) {
        const long k1 = MIN(k0 + t->group, t->k), whole = k0 + (k1 - k0) / per * per, head = at;
        vf acc[MR][NP_MAX * PV], shift[NP_MAX * PV];
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) {
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++) acc[i][j] = vset(0.0f);
            if (shifted(format)) shift[j] = shift_of(format, b[j / PV] + at + LINE + (j % PV) * VL * 4);
        }
        if (VL < 16 && mr > 4) __asm__ volatile("" : : "r"(shift) : "memory"); /* in memory, not in registers that the sums need */
        at += ZEROED(format) ? 2 * LINE : LINE;
        long k = k0;
        for (; k < whole; k += per, at += LINE) {
            if (format != P_WIDENED) { /* further down the panel, then at the head of the panels that come next */
                const long ahead = at + CODES_AHEAD + (at + CODES_AHEAD < t->panel_bytes ? 0 : (np - 1) * t->panel_bytes);
#pragma GCC unroll 8
                for (int p = 0; p < np; p++) __builtin_prefetch(b[p] + ahead, 0, 3);
            }
#pragma GCC unroll 8
            for (int i = 0; i < per; i++) code_step(format, mr, nv, acc, row, k + i, b, at, i, shift, &table);
        }
        if (per > 1 && k < k1) {
            for (int i = 0; k + i < k1; i++) code_step(format, mr, nv, acc, row, k + i, b, at, i, shift, &table);
            at += LINE;
        }
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) {
            const vf scale = vload((const float *)(b[j / PV] + head) + (j % PV) * VL);
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++) {
                float *c = t->c + i * t->ldc + j * VL;
                vstore(c, vfma(acc[i][j], scale, k0 || t->add ? vload(c) : vset(0.0f)));
            }
        }
    }
}

typedef void (*codes_fn)(const codes_args *);
#define CODES_OF(name, format, mr, np) static void codes_##name##_##mr##x##np(const codes_args *t) { codes_kernel(format, mr, np, t); }
/* Rows: widths of 1, 4 and 8 panels for one row, and so on; what is not there runs as several narrower ones. */
#if VL == 16
#define CODES_WIDE(mr) ((mr) <= 2 ? 8 : (mr) <= 5 ? 4 : 2)
#define CODES_ALL(name, format) \
    CODES_OF(name, format, 1, 1) CODES_OF(name, format, 1, 4) CODES_OF(name, format, 1, 8) CODES_OF(name, format, 2, 1) CODES_OF(name, format, 2, 4) CODES_OF(name, format, 2, 8) \
    CODES_OF(name, format, 3, 1) CODES_OF(name, format, 3, 4) CODES_OF(name, format, 4, 1) CODES_OF(name, format, 4, 4) \
    CODES_OF(name, format, 5, 1) CODES_OF(name, format, 5, 4) CODES_OF(name, format, 6, 1) CODES_OF(name, format, 6, 2)
#define CODES_ROW(name) \
    {{0}, {codes_##name##_1x1, codes_##name##_1x4, codes_##name##_1x8}, {codes_##name##_2x1, codes_##name##_2x4, codes_##name##_2x8}, {codes_##name##_3x1, codes_##name##_3x4}, \
     {codes_##name##_4x1, codes_##name##_4x4}, {codes_##name##_5x1, codes_##name##_5x4}, {codes_##name##_6x1, codes_##name##_6x2}}
static const int CODES_WIDTHS[MR + 1][3] = {{0}, {1, 4, 8}, {1, 4, 8}, {1, 4}, {1, 4}, {1, 4}, {1, 2}};
#else
#define CODES_WIDE(mr) ((mr) == 1 ? 4 : (mr) == 2 ? 2 : 1)
#define CODES_ALL(name, format) \
    CODES_OF(name, format, 1, 1) CODES_OF(name, format, 1, 4) CODES_OF(name, format, 2, 1) CODES_OF(name, format, 2, 2) CODES_OF(name, format, 3, 1) \
    CODES_OF(name, format, 4, 1) CODES_OF(name, format, 5, 1) CODES_OF(name, format, 6, 1)
#define CODES_ROW(name) \
    {{0}, {codes_##name##_1x1, codes_##name##_1x4}, {codes_##name##_2x1, codes_##name##_2x2}, {codes_##name##_3x1}, {codes_##name##_4x1}, {codes_##name##_5x1}, \
     {codes_##name##_6x1}}
static const int CODES_WIDTHS[MR + 1][3] = {{0}, {1, 4}, {1, 2}, {1}, {1}, {1}, {1}};
#endif
CODES_ALL(int8, P_INT8)
CODES_ALL(int8z, P_INT8_ZEROS)
CODES_ALL(e4m3, P_E4M3)
CODES_ALL(e5m2, P_E5M2)
CODES_ALL(int4z, P_INT4_ZEROS)
CODES_ALL(table4, P_TABLE4)
CODES_ALL(widened, P_WIDENED)
#if VL == 16
#define CODES_INT4 CODES_ROW(table4)
#else
CODES_ALL(int4, P_INT4)
#define CODES_INT4 CODES_ROW(int4)
#endif
static const codes_fn CODES[FORMATS - P_INT8][MR + 1][3] = {
    CODES_ROW(int8), CODES_ROW(int8z), CODES_ROW(e4m3), CODES_ROW(e5m2), CODES_INT4, CODES_ROW(int4z), CODES_ROW(table4), CODES_ROW(widened),
};

/* Runs mr rows times as many of `panels` as the widest micro-kernel takes; returns how many. */
static int codes_run(int format, int mr, int panels, const codes_args *t) {
    int which = 2;
    while (CODES_WIDTHS[mr][which] == 0 || CODES_WIDTHS[mr][which] > panels) which--;
    CODES[format - P_INT8][mr][which](t);
    return CODES_WIDTHS[mr][which];
}

/* --- Many rows: codes to float32 values. */

/* Rows [k0, k1) of K, which lie in one group that begins at `begin` with `head`, k0 a multiple of 8 behind it: to[k - k0][16]. */
INLINE void widen_codes(const int format, const char *head, long begin, long k0, long k1, const float *values, float *to) {
    const int per = NIBBLES(format) ? 8 : 4;
    const char *from = head + LINE * (ZEROED(format) ? 2 : 1) + (k0 - begin) / per * LINE;
    lookup table;
    vf shift[PV];
    if (NIBBLES(format)) table = lookup_of(values);
#pragma GCC unroll 4
    for (int j = 0; j < PV; j++)
        if (shifted(format)) shift[j] = shift_of(format, head + LINE + j * VL * 4);
    for (long k = k0; k < k1; k += per, from += LINE, to += per * PW) {
        const int count = (int)MIN(per, k1 - k);
#pragma GCC unroll 8
        for (int i = 0; i < per; i++) {
            if (i >= count) return;
#pragma GCC unroll 4
            for (int j = 0; j < PV; j++) {
                vstore(to + i * PW + j * VL, code_value(format, from, i, j, shift + j, &table));
            }
        }
    }
}
static void widen_group(int format, const char *head, long begin, long k0, long k1, const float *values, float *to) {
    switch (format) {
        case P_INT8: widen_codes(P_INT8, head, begin, k0, k1, values, to); break;
        case P_INT8_ZEROS: widen_codes(P_INT8_ZEROS, head, begin, k0, k1, values, to); break;
        case P_E4M3: widen_codes(P_E4M3, head, begin, k0, k1, values, to); break;
        case P_E5M2: widen_codes(P_E5M2, head, begin, k0, k1, values, to); break;
        case P_INT4: widen_codes(P_INT4, head, begin, k0, k1, values, to); break;
        case P_INT4_ZEROS: widen_codes(P_INT4_ZEROS, head, begin, k0, k1, values, to); break;
        default: widen_codes(P_TABLE4, head, begin, k0, k1, values, to);
    }
}

/* --- Packing: columns [row0, row0 + rows) of one half of a weight, from a row-major part of it. */
typedef struct {
    const uint8_t *data; /* [rows][k], or [rows][ceil(k / 2)] with the even column in the low half */
    const float *scales; /* [..][groups], a row of them every scale_rows rows */
    const int16_t *zeros; /* as scales, or NULL */
    char *to;
    long rows, row0, k, group, groups, scale_rows, panel_bytes, first; /* first: panel of row0 */
    int format, halves, half;
} code_packing;

static uint32_t nibble_at(const uint8_t *row, long k) { return (row[k / 2] >> (k % 2 * 4)) & 15u; }

static void pack_codes_unit(const void *job, long unit) {
    const code_packing *j = job;
    const long panel = j->first + unit, bytes = NIBBLES(j->format) ? (j->k + 1) / 2 : j->k;
    char *const to = j->to + (panel * j->halves + j->half) * j->panel_bytes;
    for (long c = 0; c < PW; c++) {
        const long r = panel * PW + c - j->row0;
        if (r < 0 || r >= j->rows) continue;
        const uint8_t *from = j->data + r * bytes;
        const long scale = r / j->scale_rows * j->groups;
        long at = 0;
        for (long g = 0; g < j->groups; g++) {
            const long k0 = g * j->group, k1 = MIN(k0 + j->group, j->k);
            ((float *)(to + at))[c] = j->scales[scale + g] * (j->format == P_E4M3 ? E4M3_SCALE : 1.0f);
            if (ZEROED(j->format)) ((float *)(to + at + LINE))[c] = (float)j->zeros[scale + g];
            char *codes = to + at + LINE * (ZEROED(j->format) ? 2 : 1);
            if (!NIBBLES(j->format))
                for (long k = k0; k < k1; k++) codes[(k - k0) / 4 * LINE + BYTE_AT((k - k0) % 4, c)] = (char)byte_code(j->format, from[k]);
            else
                for (long k = k0; k < k1; k += 8) {
                    uint32_t word = 0;
                    for (long i = 0; i < MIN(8, k1 - k); i++) word |= nibble_at(from, k + i) << NIBBLE_AT(i);
                    ((uint32_t *)(codes + (k - k0) / 8 * LINE))[c] = word;
                }
            at += group_bytes(j->format, k1 - k0);
        }
    }
}

#endif
