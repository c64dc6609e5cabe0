/* Linear layers: packing, the split into units, and what happens to a finished tile.
 *
 * What it is: Y[M][N] = A[M][K] W[N][K]^T for packed W, cut into units of (rows, panels) that never cut K. With few rows a unit streams
 * its panels once; with many it keeps a group of panels in the L2 cache and walks the rows. Panels of codes are widened in registers for few rows,
 * for many into scratch memory on the stack, some of K at a time: both give the same bits. The epilogue stores, adds to the residual, or
 * gates: in a gated weight the panels alternate gate, up, gate, up.
 * What it does not know: layers, heads.
 */
#ifndef PENSTOCK_GEMM_H
#define PENSTOCK_GEMM_H

#include "codes_dot.h"
#include "rows.h"

#define GROUP_BYTES (192 * 1024) /* of weights held in a core's L2 */
/* Panels of codes. On a Zen 5 core, whose conversions have execution units of their own, scratch memory gains nothing below 500 rows (AVX-512) or 60
 * (AVX2); where conversions take the multiplications' units, each block of rows in registers costs about a third more. */
#define CODES_BLOCKS (VL == 16 ? 32 : 8) /* blocks of rows that widen codes in registers */
#define WIDE_K 1024                      /* lines of a panel that scratch memory takes (codes_wide needs 512 KiB of stack), */
#define WIDE_PANELS 4                    /* of so many panels, */
#define WIDE_ROWS 512                    /* for so many rows */

enum { TO_F32 = 0, TO_BF16 = 1, TO_RESIDUAL = 2, TO_GATED = 3 };

typedef struct {
    const char *w; /* [panels][panel_bytes] */
    const float *bias;  /* [panels * 16] in panel order, or NULL */
    const float *table; /* 16 values that 4-bit codes mean (codes.h), or NULL */
    const int32_t *perm; /* column j of the weight belongs to input perm[j]; or NULL: to input j */
    const int32_t *exact; /* of codes: whether each value is a bfloat16 one */
    int64_t n, k, panels, panel_bytes, format, group, gated, act; /* n: outputs of the layer (gated: of one half); group: of codes, 1 to k */
} weight;

typedef struct {
    const weight *w;
    const void *a; /* [rows][lda], float32 or, if `narrow`, bfloat16 */
    long lda, rows;
    int narrow; /* by narrow_inputs */
    int kind, round; /* round: to bfloat16, kept as float32 */
    int out_bf16;    /* TO_GATED: element type of out */
    void *out;
    long ldo;
    long row_units, rows_per, panels_per; /* the split, by gemm_plan */
} gemm;

/* Whether a layer in bfloat16 takes its inputs as bfloat16 in memory and multiplies by dot products. A property of the weight alone. */
INLINE int narrow_inputs(const weight *w, int bf16) { return DOTS && bf16 && (w->format == P_BF16 || (CODED(w->format) && *w->exact)); }
INLINE const void *input_row(const gemm *g, long row) { return (const char *)g->a + row * g->lda * (g->narrow ? 2 : 4); }
/* Rows of the largest micro-kernel, and panels that one of so many rows takes at once. */
INLINE int gemm_tall(const gemm *g, long rows) { return !g->narrow ? MR : rows <= DR ? DR : DR_MANY; }
INLINE int gemm_wide(const gemm *g, int mr) { return g->narrow ? DOT_WIDTH[mr] : WIDTH[mr]; }

/* Choose the units; returns how many. The result of an element does not depend on them. */
static long gemm_plan(gemm *g, int threads) {
    const weight *w = g->w;
    long step = w->gated ? 2 : 1;
    long per = w->panels / (threads * 6L);
    per = MAX(per / 4 * 4, MIN(4, w->panels));
    if (threads == 1) per = w->panels;
    per = (per + step - 1) / step * step;
    long panel_units = (w->panels + per - 1) / per;
    g->rows_per = g->rows;
    g->row_units = 1;
    if (g->rows > 96 && panel_units < threads * 4L) {
        long want = (threads * 4L + panel_units - 1) / panel_units;
        long cut = MAX((g->rows + want - 1) / want, 48);
        const long tall = gemm_tall(g, cut);
        g->rows_per = (cut + tall - 1) / tall * tall;
        g->row_units = (g->rows + g->rows_per - 1) / g->rows_per;
    }
    g->panels_per = per;
    return g->row_units * panel_units;
}

INLINE void finish_plain(const gemm *g, const int kind, const float *c, long ldc, long row, int rows, long panel, int panels) {
    const weight *w = g->w;
    for (int i = 0; i < rows; i++)
        for (int p = 0; p < panels; p++) {
            const long col = (panel + p) * PW, room = MIN(PW, w->n - col), at = (row + i) * g->ldo + col;
            const float *s = c + i * ldc + p * PW;
            vf y[PV];
#pragma GCC unroll 4
            for (int v = 0; v < PV; v++) {
                y[v] = vload(s + v * VL);
                if (w->bias) y[v] += vload(w->bias + col + v * VL);
                y[v] = vrounded(y[v], g->round);
            }
            if (room == PW) {
#pragma GCC unroll 4
                for (int v = 0; v < PV; v++) {
                    float *o = (float *)g->out + at + v * VL;
                    if (kind == TO_BF16)
                        vstore_as(g->out, at + v * VL, y[v], 1);
                    else if (kind == TO_F32)
                        vstore(o, y[v]);
                    else
                        vstore(o, vrounded(vload(o) + y[v], g->round));
                }
                continue;
            }
            for (int x = 0; x < room; x++) {
                float *o = (float *)g->out + at + x, value = y[x / VL][x % VL];
                if (kind == TO_BF16)
                    store_as(g->out, at + x, value, 1);
                else
                    *o = kind == TO_F32 ? value : rounded(*o + value, g->round);
            }
        }
}

INLINE void finish_tile(const gemm *g, const float *c, long ldc, long row, int rows, long panel, int panels) {
    const weight *w = g->w;
    if (g->kind == TO_GATED) {
        for (int i = 0; i < rows; i++)
            for (int p = 0; p + 1 < panels; p += 2) {
                long col = (panel + p) / 2 * PW;
                long room = MIN(PW, w->n - col);
                const float *s = c + i * ldc + p * PW;
                const long at = (row + i) * g->ldo + col;
                _Alignas(64) float buffer[PW];
#pragma GCC unroll 4
                for (int v = 0; v < PV; v++) {
                    vf gv = vload(s + v * VL), uv = vload(s + PW + v * VL);
                    if (w->bias) {
                        gv += vload(w->bias + (panel + p) * PW + v * VL);
                        uv += vload(w->bias + (panel + p + 1) * PW + v * VL);
                    }
                    const vf y = gate(vrounded(gv, g->round), vrounded(uv, g->round), (int)w->act, g->round);
                    if (room == PW && g->out_bf16)
                        vstore_as(g->out, at + v * VL, y, 1);
                    else
                        vstore(buffer + v * VL, y);
                }
                if (!g->out_bf16)
                    memcpy((float *)g->out + at, buffer, (size_t)room * 4);
                else if (room < PW)
                    for (int x = 0; x < room; x++) store_as(g->out, at + x, buffer[x], 1);
            }
        return;
    }
    if (g->kind == TO_F32)
        finish_plain(g, TO_F32, c, ldc, row, rows, panel, panels);
    else if (g->kind == TO_BF16)
        finish_plain(g, TO_BF16, c, ldc, row, rows, panel, panels);
    else
        finish_plain(g, TO_RESIDUAL, c, ldc, row, rows, panel, panels);
}

/* mr rows from `row` times panels [p0, p1), stepping by `step` panels. `next`: lines from each to the panel to prefetch, if not those to come. */
static void gemm_rows(const gemm *g, long row, int mr, long p0, long p1, int step, long next) {
    const weight *w = g->w;
    _Alignas(64) float c[DR * NP_MAX * PW];
    const char *b[NP_MAX];
    for (long p = p0; p < p1; p += step) {
        int panels = (int)MIN(step, p1 - p);
        for (int q = 0; q < panels;) {
            int np = g->narrow ? dot_width(mr, panels - q) : tile_width(mr, panels - q);
            for (int j = 0; j < np; j++) b[j] = w->w + (p + q + j) * w->panel_bytes;
            tile_args t = {
                .a = input_row(g, row), .lda = g->lda, .b = b, .segments = 1, .seg_k = w->k, .last_k = w->k,
                .c = c + q * PW, .ldc = NP_MAX * PW, .add = 0, .scale = 1.0f, .ahead = next ? next : g->narrow ? MAX(DOT_AHEAD / np, AHEAD) : AHEAD, .jump = next ? 0 : (np - 1) * w->panel_bytes,
            };
            (g->narrow ? dot_tile_of(mr, np) : tile_of(mr, np, w->format == P_BF16))(&t);
            q += np;
        }
        finish_tile(g, c, NP_MAX * PW, row, mr, p, panels);
    }
}

/* The same for panels of codes. */
static void codes_rows(const gemm *g, long row, int mr, long p0, long p1) {
    const weight *w = g->w;
    const int wide = g->narrow ? CODES_DOT_WIDE(mr) : CODES_WIDE(mr), step = w->gated ? MAX(2, wide) : wide;
    _Alignas(64) float c[DR * NP_MAX * PW];
    const char *b[NP_MAX];
    for (long p = p0; p < p1; p += step) {
        const int panels = (int)MIN(step, p1 - p);
        for (int q = 0; q < panels;) {
            for (int j = q; j < panels; j++) b[j - q] = w->w + (p + j) * w->panel_bytes;
            codes_args t = {
                .a = input_row(g, row), .lda = g->lda, .k = w->k, .group = w->group, .b = b, .table = w->table, .c = c + q * PW, .ldc = NP_MAX * PW,
                .panel_bytes = w->panel_bytes,
            };
            q += (g->narrow ? codes_dot_run : codes_run)((int)w->format, mr, panels - q, &t);
        }
        finish_tile(g, c, NP_MAX * PW, row, mr, p, panels);
    }
}

/* Up to WIDE_ROWS rows times up to WIDE_PANELS panels of codes, widened WIDE_K at a time: several groups, or a piece of one. */
static __attribute__((noinline)) void codes_wide(const gemm *g, long row0, long rows, long panel, int panels) {
    const weight *w = g->w;
    const long ldc = WIDE_PANELS * PW, blocks = (rows + MR - 1) / MR, group = w->group, full = group_bytes((int)w->format, group);
    const int pieces = group + 1 > WIDE_K; /* of a group: its chain goes on in `part`, and is scaled when the group ends */
    const long at_once = pieces ? WIDE_K : WIDE_K / (group + 1) * group; /* a group's scales take a line, too */
    _Alignas(64) float wide[WIDE_PANELS][WIDE_K * PW], total[WIDE_ROWS * WIDE_PANELS * PW], part[WIDE_ROWS * WIDE_PANELS * PW];
    const char *b[NP_MAX];
    for (long k0 = 0, k1; k0 < w->k; k0 = k1) {
        const long begin = k0 / group * group, last = pieces ? MIN(begin + group, w->k) : w->k;
        k1 = MIN(k0 + at_once, last);
        for (int p = 0; p < panels; p++) {
            float *to = wide[p];
            for (long k = k0, end; k < k1; k = end) {
                const long first = k / group * group;
                const char *head = w->w + (panel + p) * w->panel_bytes + k / group * full;
                end = MIN(first + group, k1);
                if (!pieces) {
                    memcpy(to, head, LINE);
                    to += PW;
                }
                widen_group((int)w->format, head, first, k, end, w->table, to);
                to += (end - k) * PW;
            }
        }
        for (long i = 0, row = 0; i < blocks; i++) {
            const int mr = (int)(rows / blocks + (i < rows % blocks));
            const float *a = (const float *)input_row(g, row0 + row) + k0;
            for (int q = 0, np; q < panels; q += np) {
                for (int j = q; j < panels; j++) b[j - q] = (const char *)wide[j];
                if (pieces) {
                    np = tile_width(mr, panels - q);
                    tile_args t = {
                        .a = a, .lda = g->lda, .b = b, .segments = 1, .seg_k = k1 - k0, .last_k = k1 - k0, .c = part + row * ldc + q * PW, .ldc = ldc,
                        .add = k0 > begin,
                    };
                    tile_of(mr, np, 0)(&t);
                } else {
                    codes_args t = {.a = a, .lda = g->lda, .k = k1 - k0, .group = group, .b = b, .c = total + row * ldc + q * PW, .ldc = ldc, .add = k0 > 0};
                    np = codes_run(P_WIDENED, mr, panels - q, &t);
                }
            }
            for (int v = 0; pieces && k1 == last && v < panels * PV; v++) {
                const vf scale = vload((const float *)(w->w + (panel + v / PV) * w->panel_bytes + begin / group * full) + v % PV * VL);
                for (long r = row; r < row + mr; r++) {
                    float *c = total + r * ldc + v * VL;
                    vstore(c, vfma(vload(part + r * ldc + v * VL), scale, begin ? vload(c) : vset(0.0f)));
                }
            }
            if (k1 == w->k) finish_tile(g, total + row * ldc, ldc, row0 + row, mr, panel, panels);
            row += mr;
        }
    }
}

static void gemm_unit(const void *job, long unit) {
    const gemm *g = job;
    const weight *w = g->w;
    long r0 = unit % g->row_units * g->rows_per, r1 = MIN(r0 + g->rows_per, g->rows);
    long p0 = unit / g->row_units * g->panels_per, p1 = MIN(p0 + g->panels_per, w->panels);
    long rows = r1 - r0, tall = gemm_tall(g, rows), blocks = (rows + tall - 1) / tall;
    if (CODED(w->format) && g->narrow) {
        const long group = MAX(GROUP_BYTES / w->panel_bytes / 4 * 4, 4);
        for (long p = p0; p < p1; p += group)
            for (long row = r0, mr; row < r1; row += mr) {
                mr = codes_dot_rows(r1 - row);
                codes_rows(g, row, (int)mr, p, MIN(p + group, p1));
            }
        return;
    }
    if (CODED(w->format)) {
        if (blocks <= CODES_BLOCKS) {
            const long group = MAX(GROUP_BYTES / w->panel_bytes / 4 * 4, 4);
            for (long p = p0; p < p1; p += group) {
                for (long i = 0, row = r0; i < blocks; i++) {
                    const int mr = (int)(rows / blocks + (i < rows % blocks));
                    codes_rows(g, row, mr, p, MIN(p + group, p1));
                    row += mr;
                }
            }
            return;
        }
        for (long r = r0; r < r1; r += WIDE_ROWS)
            for (long p = p0; p < p1; p += WIDE_PANELS) codes_wide(g, r, MIN(WIDE_ROWS, r1 - r), p, (int)MIN(WIDE_PANELS, p1 - p));
        return;
    }
    if (blocks == 1) {
        const int wide = gemm_wide(g, (int)rows);
        gemm_rows(g, r0, (int)rows, p0, p1, w->gated ? MAX(2, wide) : wide, 0);
        return;
    }
    int step = w->panel_bytes * 4 <= GROUP_BYTES * 2 ? 4 : 2;
    long group = MAX(GROUP_BYTES / w->panel_bytes / step * step, step);
    for (long p = p0; p < p1; p += group) {
        long end = MIN(p + group, p1), row = r0;
        for (long i = 0; i < blocks; i++) {
            int mr = (int)(rows / blocks + (i < rows % blocks));
            /* The last rows of a group fetch the next one. */
            gemm_rows(g, row, mr, p, end, step, g->narrow && i + 1 == blocks && end < p1 ? group * w->panel_bytes / LINE : 0);
            row += mr;
        }
    }
}

/* Panels [first, first + count) of a weight; `second` (or NULL) interleaves its panels with those of `rows_of`. */
typedef struct {
    const void *rows_of, *second;
    char *to;
    long n, k, panel_bytes;
    int bf16;
} packing;

static void pack_unit(const void *job, long unit) {
    const packing *j = job;
    const void *from = j->second && (unit & 1) ? j->second : j->rows_of;
    long panel = j->second ? unit / 2 : unit;
    char *to = j->to + unit * j->panel_bytes;
    memset(to, 0, (size_t)j->panel_bytes);
    for (long c = 0; c < PW && panel * PW + c < j->n; c++) {
        long at = (panel * PW + c) * j->k;
        if (j->bf16)
            for (long k = 0; k < j->k; k++) ((uint16_t *)to)[k / 2 * 32 + c * 2 + (k & 1)] = ((const uint16_t *)from)[at + k];
        else
            for (long k = 0; k < j->k; k++) ((float *)to)[k * 16 + c] = ((const float *)from)[at + k];
    }
}

#endif
