/* Panels of codes by dot products: the micro-kernel of codes.h where the processor multiplies pairs of bfloat16 itself (dot.h).
 *
 * What it is: as in codes.h, with inputs in bfloat16. Two codes of a column become a pair of bfloat16 in registers, which rounds nothing: integers of
 * up to 8 bits and small floats are bfloat16 values (a weight whose zero points or table are not is left to codes.h). The inner sums are chains of
 * `vdot` over the pairs of a group, the last of which may be half a pair; the outer one is a chain of fused multiply-adds over the groups. Codes are
 * widened again for each block of rows: the units that do it are not those that multiply.
 * What it does not know: as codes.h.
 */
#ifndef PENSTOCK_CODES_DOT_H
#define PENSTOCK_CODES_DOT_H

#include "codes.h"
#include "dot.h"

#if DOTS
/* Integers from -32 as bfloat16: a 4-bit code and 32 less its zero point are the place of their difference, in both halves of a column's word. */
static _Alignas(64) uint16_t SMALL_INTEGERS[64];
__attribute__((constructor)) static void small_integers(void) {
    for (int i = 0; i < 64; i++) SMALL_INTEGERS[i] = upper((float)(i - 32));
}
INLINE vf places_of(const char *zeros) {
    const vu place = (vu)__builtin_convertvector(32.0f - vload((const float *)zeros), vi);
    return (vf)(place | place << 16);
}
INLINE vu difference_pair(vu codes, vf places) {
    const __m512i at = _mm512_add_epi16((__m512i)(codes & 0x000f000fu), (__m512i)places);
    return (vu)_mm512_permutex2var_epi16(_mm512_load_si512(SMALL_INTEGERS), at, _mm512_load_si512(SMALL_INTEGERS + 32));
}

/* Values 2 `which` and 2 `which` + 1 of the line at `from`, all 16 columns. */
INLINE vu code_pair(const int format, const char *from, const int which, const vf *shift, const lookup *table, const pairs_table *pairs) {
    if (format == P_TABLE4) return look_up_pair(pairs, *(const vu_any *)from >> (4 * which));
    if (format == P_INT4_ZEROS) return difference_pair(*(const vu_any *)from >> (4 * which), *shift);
#if BYTE_PAIRS
    if (format == P_INT8 || format == P_E4M3 || format == P_E5M2) return which == 0 ? byte_pair(format, from, 0) : byte_pair(format, from, 1);
#endif
    const vf low = code_value(format, from, 2 * which, 0, shift, table), high = code_value(format, from, 2 * which + 1, 0, shift, table);
    return ((vu)low >> 16) | (vu)high;
}

/* As dot_step, `ahead` pairs behind the rows' places. */
INLINE void codes_dot_step(const int format, const int mr, const int np, const int half, vf (*acc)[NP_MAX], const dot_rows *r, long ahead, const char *const *b,
                           long at, const int which, const vf *shift, const lookup *table, const pairs_table *pairs) {
    vu a[3], w[NP_MAX];
    if (mr <= 3) { /* the broadcasts stay in registers, the panels stream */
#pragma GCC unroll 4
        for (int i = 0; i < mr; i++) a[i] = row_pair(r, i, ahead, half);
#pragma GCC unroll 8
        for (int j = 0; j < np; j++) {
            w[0] = code_pair(format, b[j] + at, which, shift + j, table, pairs);
#pragma GCC unroll 4
            for (int i = 0; i < mr; i++) acc[i][j] = vdot(acc[i][j], a[i], w[0]);
        }
        return;
    }
#pragma GCC unroll 8
    for (int j = 0; j < np; j++) w[j] = code_pair(format, b[j] + at, which, shift + j, table, pairs);
#pragma GCC unroll 16
    for (int i = 0; i < mr; i++) {
        a[0] = row_pair(r, i, ahead, half);
#pragma GCC unroll 8
        for (int j = 0; j < np; j++) acc[i][j] = vdot(acc[i][j], a[0], w[j]);
    }
}

INLINE void codes_dot_kernel(const int format, const int mr, const int np, const codes_args *t) {
    const int per = NIBBLES(format) ? 8 : 4; /* k's of one line */
    lookup table;
    pairs_table pairs;
    if (NIBBLES(format)) table = lookup_of(t->table);
    if (format == P_TABLE4) pairs = pairs_of(t->table);
    const char *b[NP_MAX];
    dot_rows r = dot_rows_of(mr, t->a, t->lda);
#pragma GCC unroll 8
    for (int p = 0; p < np; p++) b[p] = t->b[p];
    long at = 0; /* in every panel */
    for (long k0 = 0; k0 < t->k; k0 += t->group) {
        const long k1 = MIN(k0 + t->group, t->k), whole = k0 + (k1 - k0) / per * per, head = at;
        vf acc[DR][NP_MAX], shift[NP_MAX];
#pragma GCC unroll 8
        for (int j = 0; j < np; j++) {
#pragma GCC unroll 16
            for (int i = 0; i < mr; i++) acc[i][j] = vset(0.0f);
            if (shifted(format)) shift[j] = format == P_INT4_ZEROS ? places_of(b[j] + at + LINE) : shift_of(format, b[j] + at + LINE);
        }
        at += ZEROED(format) ? 2 * LINE : LINE;
        long k = k0;
        for (; k < whole; k += per, at += LINE) {
            const long far = at + CODES_AHEAD + (at + CODES_AHEAD < t->panel_bytes ? 0 : (np - 1) * t->panel_bytes);
#pragma GCC unroll 8
            for (int p = 0; p < np; p++) __builtin_prefetch(b[p] + far, 0, 3);
#pragma GCC unroll 4
            for (int i = 0; i < per / 2; i++) codes_dot_step(format, mr, np, 0, acc, &r, i, b, at, i, shift, &table, &pairs);
            dot_rows_move(mr, &r, per);
        }
        if (k < k1) {
            int i = 0;
            for (; k + 2 * i + 1 < k1; i++) codes_dot_step(format, mr, np, 0, acc, &r, i, b, at, i, shift, &table, &pairs);
            if (k + 2 * i < k1) codes_dot_step(format, mr, np, 1, acc, &r, i, b, at, i, shift, &table, &pairs);
            dot_rows_move(mr, &r, k1 - k);
            at += LINE;
        }
#pragma GCC unroll 8
        for (int j = 0; j < np; j++) {
            const vf scale = vload((const float *)(b[j] + head));
#pragma GCC unroll 16
            for (int i = 0; i < mr; i++) {
                float *c = t->c + i * t->ldc + j * PW;
                vstore(c, vfma(acc[i][j], scale, k0 ? vload(c) : vset(0.0f)));
            }
        }
    }
}

/* Rows of the micro-kernels, and their widths. Few of them: each is compiled for each format. */
#define CD(name, format, mr, np) static void codes_dot_##name##_##mr##x##np(const codes_args *t) { codes_dot_kernel(format, mr, np, t); }
#define CD_ALL(name, format) \
    CD(name, format, 1, 1) CD(name, format, 1, 4) CD(name, format, 1, 8) CD(name, format, 2, 1) CD(name, format, 2, 4) CD(name, format, 2, 8) CD(name, format, 3, 1) \
    CD(name, format, 3, 4) CD(name, format, 4, 1) CD(name, format, 4, 4) CD(name, format, 5, 1) CD(name, format, 5, 4) CD(name, format, 6, 1) CD(name, format, 6, 2) \
    CD(name, format, 8, 1) CD(name, format, 8, 2) CD(name, format, 12, 1) CD(name, format, 12, 2) CD(name, format, 16, 1)
#define CD_ROW(name) \
    {{0}, {codes_dot_##name##_1x1, codes_dot_##name##_1x4, codes_dot_##name##_1x8}, {codes_dot_##name##_2x1, codes_dot_##name##_2x4, codes_dot_##name##_2x8}, \
     {codes_dot_##name##_3x1, codes_dot_##name##_3x4}, {codes_dot_##name##_4x1, codes_dot_##name##_4x4}, {codes_dot_##name##_5x1, codes_dot_##name##_5x4}, \
     {codes_dot_##name##_6x1, codes_dot_##name##_6x2}, {0}, {codes_dot_##name##_8x1, codes_dot_##name##_8x2}, {0}, {0}, {0}, \
     {codes_dot_##name##_12x1, codes_dot_##name##_12x2}, {0}, {0}, {0}, {codes_dot_##name##_16x1}}
CD_ALL(int8, P_INT8)
CD_ALL(int8z, P_INT8_ZEROS)
CD_ALL(e4m3, P_E4M3)
CD_ALL(e5m2, P_E5M2)
CD_ALL(int4z, P_INT4_ZEROS)
CD_ALL(table4, P_TABLE4)
static const codes_fn CODES_DOT[P_WIDENED - P_INT8][DR + 1][3] = {
    CD_ROW(int8), CD_ROW(int8z), CD_ROW(e4m3), CD_ROW(e5m2), CD_ROW(table4), CD_ROW(int4z), CD_ROW(table4),
};
static const int CODES_DOT_WIDTHS[DR + 1][3] = {{0}, {1, 4, 8}, {1, 4, 8}, {1, 4}, {1, 4}, {1, 4}, {1, 2}, {0}, {1, 2}, {0}, {0}, {0}, {1, 2}, {0}, {0}, {0}, {1}};

/* As codes_run. */
static int codes_dot_run(int format, int mr, int panels, const codes_args *t) {
    int which = 2;
    while (CODES_DOT_WIDTHS[mr][which] == 0 || CODES_DOT_WIDTHS[mr][which] > panels) which--;
    CODES_DOT[format - P_INT8][mr][which](t);
    return CODES_DOT_WIDTHS[mr][which];
}
#else
INLINE int codes_dot_run(int format, int mr, int panels, const codes_args *t) {
    (void)format, (void)mr, (void)t;
    return panels;
}
#endif
/* Panels at once, and how many of `rows` rows go through a micro-kernel next. */
#define CODES_DOT_WIDE(mr) ((mr) <= 2 ? 8 : (mr) <= 5 ? 4 : (mr) <= 12 ? 2 : 1)
INLINE int codes_dot_rows(long rows) {
    if (rows <= 6 || rows == 8 || rows == 12 || rows == 16) return (int)rows;
    if (rows < 16) return rows == 7 ? 4 : rows <= 11 ? (int)(rows + 1) / 2 : rows <= 14 ? 8 : 12;
    return rows % 12 == 4 ? 16 : 12;
}

#endif
