/* Dot products: the micro-kernel of panel.h where the processor multiplies pairs of bfloat16 itself (AVX512-BF16).
 *
 * What it is: C[mr][16 np] (+)= A[mr][K] B[K][16 np], A in bfloat16 rows, B in bfloat16 panels, twice as many products an instruction as fused
 * multiply-adds of float32 and nothing to widen. Every element of C is one chain of `vdot` over the pairs (0, 1), (2, 3), ... of k, whatever mr, np and
 * the segments are: a row's result does not depend on its batch. The instruction rounds to nearest and takes subnormal numbers for 0, whatever the
 * thread's settings are; at the end of an odd K the other half of the pair is 0 on both sides.
 * What it does not know: as panel.h.
 */
#ifndef PENSTOCK_DOT_H
#define PENSTOCK_DOT_H

#include "panel.h"

#define DR 16          /* rows of the largest micro-kernel, */
#define DR_MANY 12     /* and where more than one goes over the same panels: two panels at once ask less of the L2 cache */
#define DOT_AHEAD 128  /* lines that the prefetch runs ahead, over all panels */

#if DOTS
/* Accumulators, the panels' row and a broadcast of A fill the 32 registers. */
static const int DOT_WIDTH[DR + 1] = {0, 8, 8, 8, 4, 4, 4, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1};

INLINE vf vdot(vf c, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }

/* Rows of A by few addresses: one for each four of them, which move along K, and the distance of rows. */
typedef struct {
    const char *at[DR / 4];
    long next, third; /* bytes from a row to the next, and to the third behind it */
} dot_rows;
INLINE dot_rows dot_rows_of(const int mr, const void *a, long lda) {
    dot_rows r = {.next = lda * 2, .third = lda * 6};
#pragma GCC unroll 4
    for (int i = 0; i < mr; i += 4) r.at[i / 4] = (const char *)a + i * r.next;
    return r;
}
INLINE void dot_rows_move(const int mr, dot_rows *r, long k) {
#pragma GCC unroll 4
    for (int i = 0; i < mr; i += 4) r->at[i / 4] += k * 2;
}
/* The pair of row i that is `ahead` pairs behind its place. */
INLINE vu row_pair(const dot_rows *r, const int i, long ahead, const int half) {
    const char *p = r->at[i / 4] + (i % 4 == 3 ? r->third : i % 4 * r->next) + ahead * 4;
    uint16_t one;
    uint32_t two;
    if (half) {
        memcpy(&one, p, 2);
        return vuset(one);
    }
    memcpy(&two, p, 4);
    return vuset(two);
}

/* One pair of k; `half`: its second k lies beyond the end. */
INLINE void dot_step(const int mr, const int np, const int half, vf (*acc)[NP_MAX], const dot_rows *r, const char *const *b, long at) {
    vu a[3], w[NP_MAX];
    if (mr <= 3) { /* the broadcasts stay in registers, the panels stream */
#pragma GCC unroll 4
        for (int i = 0; i < mr; i++) a[i] = row_pair(r, i, 0, half);
#pragma GCC unroll 8
        for (int j = 0; j < np; j++) {
            w[0] = *(const vu_any *)(b[j] + at);
            if (half) w[0] &= 0xffffu;
#pragma GCC unroll 4
            for (int i = 0; i < mr; i++) acc[i][j] = vdot(acc[i][j], a[i], w[0]);
        }
        return;
    }
#pragma GCC unroll 8
    for (int j = 0; j < np; j++) {
        w[j] = *(const vu_any *)(b[j] + at);
        if (half) w[j] &= 0xffffu;
    }
#pragma GCC unroll 16
    for (int i = 0; i < mr; i++) {
        a[0] = row_pair(r, i, 0, half);
#pragma GCC unroll 8
        for (int j = 0; j < np; j++) acc[i][j] = vdot(acc[i][j], a[0], w[j]);
    }
}

INLINE void dot_kernel(const int mr, const int np, const tile_args *t) {
    vf acc[DR][NP_MAX];
    dot_rows r = dot_rows_of(mr, t->a, t->lda);
#pragma GCC unroll 16
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < np; j++) acc[i][j] = t->add ? vload(t->c + i * t->ldc + j * PW) : vset(0.0f);
    for (long s = 0; s < t->segments; s++) {
        const char *b[NP_MAX];
#pragma GCC unroll 8
        for (int p = 0; p < np; p++) b[p] = t->b[s * np + p];
        const long k_all = s + 1 == t->segments ? t->last_k : t->seg_k, pairs = k_all / 2, first = t->jump ? MAX(pairs - t->ahead, 0) : pairs;
        /* Two stretches, as in panel.h. */
        for (long q = 0, end = first, ahead = t->ahead * 64; q < pairs; end = pairs, ahead = t->ahead * 64 + t->jump)
            for (; q < end; q++) {
#pragma GCC unroll 8
                for (int p = 0; p < np; p++) if (mr <= 6) __builtin_prefetch(b[p] + q * 64 + ahead, 0, 3); else __builtin_prefetch(b[p] + q * 64 + ahead, 0, 2);
                dot_step(mr, np, 0, acc, &r, b, q * 64);
                dot_rows_move(mr, &r, 2);
            }
        if (k_all & 1) {
            dot_step(mr, np, 1, acc, &r, b, pairs * 64);
            dot_rows_move(mr, &r, 1);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < np; j++) vstore(t->c + i * t->ldc + j * PW, acc[i][j] * t->scale);
}

#define DOT(mr, np) static void dot_##mr##x##np(const tile_args *t) { dot_kernel(mr, np, t); }
#define DOT_2(mr) DOT(mr, 1) DOT(mr, 2)
#define DOT_4(mr) DOT_2(mr) DOT(mr, 4)
#define DOT_8(mr) DOT_4(mr) DOT(mr, 8)
DOT_8(1) DOT_8(2) DOT_8(3) DOT_4(4) DOT_4(5) DOT_4(6) DOT_2(7) DOT_2(8) DOT_2(9) DOT_2(10) DOT_2(11) DOT_2(12) DOT_2(13) DOT_2(14)
DOT(15, 1) DOT(16, 1)
#define ROW_2(mr) dot_##mr##x1, dot_##mr##x2
#define ROW_4(mr) ROW_2(mr), dot_##mr##x4
#define ROW_8(mr) ROW_4(mr), dot_##mr##x8
static const tile_fn DOT_TILES[DR + 1][4] = {
    {0}, {ROW_8(1)}, {ROW_8(2)}, {ROW_8(3)}, {ROW_4(4)}, {ROW_4(5)}, {ROW_4(6)}, {ROW_2(7)}, {ROW_2(8)}, {ROW_2(9)}, {ROW_2(10)}, {ROW_2(11)}, {ROW_2(12)},
    {ROW_2(13)}, {ROW_2(14)}, {dot_15x1}, {dot_16x1},
};
#else
static const int DOT_WIDTH[DR + 1] = {0};
static const tile_fn DOT_TILES[DR + 1][4] = {{0}};
#endif

/* As tile_width and tile_of. */
INLINE int dot_width(int mr, long panels) {
    int width = DOT_WIDTH[mr];
    while (width > panels) width /= 2;
    return width;
}
INLINE tile_fn dot_tile_of(int mr, int width) { return DOT_TILES[mr][width == 1 ? 0 : width == 2 ? 1 : width == 4 ? 2 : 3]; }

#endif
