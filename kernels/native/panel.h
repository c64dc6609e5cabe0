/* The micro-kernel: C[mr][16 np] (+)= A[mr][K] B[K][16 np] on packed panels, the one loop under linear layers and attention.
 *
 * What it is: a *panel* is 16 columns of B, K-major; bfloat16 panels hold pairs of k in 32 bits ([K/2][16][2]), which AVX2 widens with one
 * shift or one mask, and which is also the operand order of AVX-512's dot products. K may come in segments (blocks of the KV
 * cache). A is float32. Every element of C is one chain of fused multiply-adds over k = 0, 1, 2, ..., whatever mr, np and the segments
 * are: that is what makes a row's result independent of its batch.
 * What it does not know: threads, epilogues, who packed.
 */
#ifndef PENSTOCK_PANEL_H
#define PENSTOCK_PANEL_H

#include "vec.h"

#define PW 16        /* columns of a panel */
#define PV (PW / VL) /* vectors of a panel's row */
#define MR 6         /* rows of the largest micro-kernel */
#define NP_MAX 8     /* panels of the widest micro-kernel */

#if VL == 16
static const int WIDTH[MR + 1] = {0, 8, 4, 4, 4, 4, 4};
#elif VL == 8
static const int WIDTH[MR + 1] = {0, 4, 2, 1, 1, 1, 1}; /* 3 x 2 would spill */
#else
static const int WIDTH[MR + 1] = {0, 2, 1, 1, 1, 1, 1};
#endif

#define AHEAD 16 /* k-pairs (one cache line each) that the prefetch of a streamed weight runs ahead */

typedef struct {
    const void *a; /* [mr][lda], float32 (dot.h: bfloat16) */
    long lda;
    const char *const *b; /* [segments][np] panel pointers */
    long segments, seg_k, last_k; /* K of each segment but the last; of the last */
    float *c; /* [mr][ldc] */
    long ldc;
    int add;   /* start from C instead of 0 */
    float scale; /* dot.h: of the result */
    long ahead; /* k-pairs to prefetch ahead (0: the caller did) */
    long jump;  /* bytes from a panel's end to where this stream goes on */
} tile_args;

/* The panel rows of one k (fp32) or k-pair (bf16) for all np panels, times mr rows. */
INLINE void pair_step(const int mr, const int nv, vf (*acc)[NP_MAX * PV], const float *const *row, long k, const char *const *b, long at) {
    if (mr <= 3) { /* wide and flat: the broadcasts stay in registers, the panels stream */
        vf a0[3], a1[3];
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) a0[i] = vset(row[i][k]);
        if (mr == 1) a1[0] = vset(row[0][k + 1]);
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) {
            vu w = *(const vu_any *)(b[j / PV] + at + (j % PV) * VL * 4);
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++) acc[i][j] = vfma(a0[i], (vf)(w << 16), acc[i][j]);
            if (mr == 3) __asm__ volatile("" ::: "memory"); /* no load ahead of its turn: every register is taken */
            if (mr == 1) acc[0][j] = vfma(a1[0], (vf)(w & 0xffff0000u), acc[0][j]);
        }
        if (mr == 1) return;
        __asm__ volatile("" ::: "memory");
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) a1[i] = vset(row[i][k + 1]);
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) {
            vf hi = (vf)(*(const vu_any *)(b[j / PV] + at + (j % PV) * VL * 4) & 0xffff0000u);
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++) acc[i][j] = vfma(a1[i], hi, acc[i][j]);
            if (mr == 3) __asm__ volatile("" ::: "memory");
        }
        return;
    }
    vf v[NP_MAX * PV];
#pragma GCC unroll 32
    for (int j = 0; j < nv; j++) v[j] = (vf)(*(const vu_any *)(b[j / PV] + at + (j % PV) * VL * 4) << 16);
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        vf a = vset(row[i][k]);
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) acc[i][j] = vfma(a, v[j], acc[i][j]);
    }
    __asm__ volatile("" ::: "memory"); /* load the pairs again (a cache hit) rather than spill an accumulator */
#pragma GCC unroll 32
    for (int j = 0; j < nv; j++) v[j] = (vf)(*(const vu_any *)(b[j / PV] + at + (j % PV) * VL * 4) & 0xffff0000u);
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        vf a = vset(row[i][k + 1]);
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) acc[i][j] = vfma(a, v[j], acc[i][j]);
    }
}

/* One k: from a float32 panel, or (half) the even half of a bfloat16 panel's last pair. */
INLINE void one_step(const int mr, const int nv, const int half, vf (*acc)[NP_MAX * PV], const float *const *row, long k, const char *const *b, long at) {
    vf v[NP_MAX * PV];
#pragma GCC unroll 32
    for (int j = 0; j < nv; j++) {
        vu w = *(const vu_any *)(b[j / PV] + at + (j % PV) * VL * 4);
        v[j] = (vf)(half ? w << 16 : w);
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        vf a = vset(row[i][k]);
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) acc[i][j] = vfma(a, v[j], acc[i][j]);
    }
}

INLINE void tile_kernel(const int bf16, const int mr, const int np, const tile_args *t) {
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
        long k_all = s + 1 == t->segments ? t->last_k : t->seg_k;
        if (bf16) {
            long pairs = k_all / 2, first = t->jump ? MAX(pairs - t->ahead, 0) : pairs;
            /* Two stretches: prefetch further down the panel, then at the head of the panels that come next. */
            for (long q = 0, end = first, ahead = t->ahead * 64; q < pairs; end = pairs, ahead = t->ahead * 64 + t->jump) {
                for (; q < end; q++) {
                    if (mr <= 3) {
#pragma GCC unroll 8
                        for (int p = 0; p < np; p++) __builtin_prefetch(b[p] + q * 64 + ahead, 0, 3);
                    }
                    pair_step(mr, nv, acc, row, 2 * q, b, q * 64);
                }
            }
            if (k_all & 1) one_step(mr, nv, 1, acc, row, k_all - 1, b, pairs * 64);
        } else {
            for (long k = 0; k < k_all; k++) {
                if (mr <= 3) {
#pragma GCC unroll 8
                    for (int p = 0; p < np; p++) __builtin_prefetch(b[p] + (k + t->ahead) * 64, 0, 3);
                }
                one_step(mr, nv, 0, acc, row, k, b, k * 64);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) row[i] += k_all;
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 32
        for (int j = 0; j < nv; j++) vstore(t->c + i * t->ldc + j * VL, acc[i][j]);
}

typedef void (*tile_fn)(const tile_args *);
#define TILE(mr, np) \
    static void tile_bf16_##mr##x##np(const tile_args *t) { tile_kernel(1, mr, np, t); } \
    static void tile_f32_##mr##x##np(const tile_args *t) { tile_kernel(0, mr, np, t); }
#define PAIR(mr, np) {tile_f32_##mr##x##np, tile_bf16_##mr##x##np}
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1)
#if VL >= 8
TILE(1, 2) TILE(1, 4) TILE(2, 2)
#else
TILE(1, 2)
#endif
#if VL == 16
TILE(3, 2) TILE(1, 8) TILE(2, 4) TILE(3, 4) TILE(4, 2) TILE(4, 4) TILE(5, 2) TILE(5, 4) TILE(6, 2) TILE(6, 4)
static const tile_fn TILES[MR + 1][4][2] = {
    {{0}},
    {PAIR(1, 1), PAIR(1, 2), PAIR(1, 4), PAIR(1, 8)},
    {PAIR(2, 1), PAIR(2, 2), PAIR(2, 4)}, {PAIR(3, 1), PAIR(3, 2), PAIR(3, 4)}, {PAIR(4, 1), PAIR(4, 2), PAIR(4, 4)},
    {PAIR(5, 1), PAIR(5, 2), PAIR(5, 4)}, {PAIR(6, 1), PAIR(6, 2), PAIR(6, 4)},
};
#elif VL == 8
static const tile_fn TILES[MR + 1][4][2] = {
    {{0}}, {PAIR(1, 1), PAIR(1, 2), PAIR(1, 4)}, {PAIR(2, 1), PAIR(2, 2)}, {PAIR(3, 1)},
    {PAIR(4, 1)}, {PAIR(5, 1)}, {PAIR(6, 1)},
};
#else
static const tile_fn TILES[MR + 1][4][2] = {
    {{0}}, {PAIR(1, 1), PAIR(1, 2)}, {PAIR(2, 1)}, {PAIR(3, 1)}, {PAIR(4, 1)}, {PAIR(5, 1)}, {PAIR(6, 1)},
};
#endif

/* The widest micro-kernel for mr rows that is not wider than `panels`: 1, 2, 4 or 8 panels. */
INLINE int tile_width(int mr, long panels) {
    int width = WIDTH[mr];
    while (width > panels) width /= 2;
    return width;
}
INLINE tile_fn tile_of(int mr, int width, int bf16) { return TILES[mr][width == 1 ? 0 : width == 2 ? 1 : width == 4 ? 2 : 3][bf16]; }

#endif
