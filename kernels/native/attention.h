/* Ragged causal attention over the paged cache in panel order.
 *
 * What it is: a unit is (sequence, KV head, a run of query rows); its query heads are folded into rows, so that K and V are read once. Keys
 * are taken in tiles of 64 at absolute positions 0, 64, 128...; the running maximum and sum (online softmax: Milakov and Gimelshein 2018,
 * arXiv:1805.02867; tiling: Dao et al. 2022, arXiv:2205.14135) are updated tile by tile. A row's arithmetic depends on its own position only:
 * keys that it may not see weigh exactly 0, tiles without visible keys leave it untouched, slots that nobody wrote are never read as values.
 * Where pairs of bfloat16 are multiplied as they are (dot.h), a bfloat16 cache's weights are rounded to bfloat16 before they are summed up and used.
 * Where steps have draft trees a row's keys are taken by position all the same, each from the place of the node that stands there on the row's own line, so that its
 * bits are those that it would have along a chain.
 * A cache of codes (kv.h) is read by the same loop: a key's scale multiplies its scores, a value's scale its weights, after the sum of the weights.
 * What it does not know: how keys came into the cache.
 */
#ifndef PENSTOCK_ATTENTION_H
#define PENSTOCK_ATTENTION_H

#include <limits.h>

#include "dot.h"
#include "kv.h"
#include "rows.h"

#define KEY_TILE 64
#define ROW_TILE 48 /* (query, head) rows of a unit */
#define DIM_MAX 512
#define KV_REGISTERS (4 * MR) /* rows of a unit that widen codes in registers; for more, scratch memory */
#define LINE_BYTES (KEY_TILE * DIM_MAX * 4)
#define KV_AHEAD 2            /* tiles of codes that are fetched ahead */

typedef struct {
    const void *q; /* [T][ldq], element type q_bf16; head h at h * dim */
    void *out;     /* [T][ldo], element type out_bf16 */
    long ldq, ldo;
    int q_bf16, out_bf16, cache_bf16, round;
    int kv_format; /* of codes, or 0: then elements are as cache_bf16 says */
    const char *k_cache, *v_cache; /* [kv_heads][block_size * dim] every block_bytes */
    const char *k_scales, *v_scales; /* of codes: [kv_heads][block_size] bfloat16 every block_bytes */
    const int32_t *tables, *q_start, *kv_len;
    const int64_t *ancestors; /* [T] of a draft tree's rows, or NULL: see place_of */
    long table_width, sequences, heads, kv_heads, dim, block_size, block_bytes, window;
    float scale;
    long head_runs, heads_per; /* the heads of a KV head, in runs of at most ROW_TILE */
    long queries_per;          /* query rows of a unit */
    const int32_t *unit_start; /* [sequences + 1]: units before each sequence, or NULL when each has one query row */
} attention;

/* Fill the split; unit_start [sequences + 1] is scratch. Returns the number of units. */
static long attention_plan(attention *a, int32_t *unit_start) {
    long group = a->heads / a->kv_heads;
    a->head_runs = (group + ROW_TILE - 1) / ROW_TILE;
    a->heads_per = (group + a->head_runs - 1) / a->head_runs;
    a->queries_per = MAX(1, ROW_TILE / a->heads_per);
    int32_t total = 0;
    int single = 1;
    for (long s = 0; s < a->sequences; s++) {
        long rows = a->q_start[s + 1] - a->q_start[s];
        unit_start[s] = total;
        total += (int32_t)((rows + a->queries_per - 1) / a->queries_per);
        if (rows != 1) single = 0;
    }
    unit_start[a->sequences] = total;
    a->unit_start = single ? 0 : unit_start;
    return total * a->kv_heads * a->head_runs;
}

/* Softmax weights of one row in one tile, in place. Scores are in units of log2 (the queries carry scale * log2 e); lanes [lo, hi) are visible,
 * `lanes` were computed. Updates the row's maximum, its 16 partial sums, whatever VL is, and its output; lanes that are not visible add exact zeros. */
INLINE void hide_outside(float *s, long lanes, long lo, long hi) {
    const vf none = vset(-INFINITY);
    vi iota;
    for (int i = 0; i < VL; i++) iota[i] = i;
    for (long j = 0; j < lanes; j += VL) {
        vi at = iota + (int32_t)j;
        vstore(s + j, vselect((vu)((at >= (int32_t)lo) & (at < (int32_t)hi)), vload(s + j), none));
    }
}
/* The sum of 16 partial ones, as a fixed tree. */
INLINE float fold(const float *sum) {
    vf all = vload(sum);
    for (long j = VL; j < 16; j += VL) all += vload(sum + j);
    return hsum(all);
}
/* A greater base of the weights: what was summed up shrinks. */
INLINE void rebase(float before, float now, float *sum, float *o, long dim) {
    const float keep = vexp2_falling(vset(before - now))[0];
    for (long j = 0; j < 16; j += VL) vstore(sum + j, vload(sum + j) * keep);
    for (long d = 0; d < dim; d += VL) vstore(o + d, vload(o + d) * keep);
}
INLINE void softmax_row(float *s, long lanes, long lo, long hi, float *maximum, float *sum, float *o, long dim) {
    if (hi <= lo) {
        memset(s, 0, (size_t)lanes * 4);
        return;
    }
    if (lo > 0 || hi < lanes) hide_outside(s, lanes, lo, hi);
    vf top = vset(-INFINITY);
    for (long j = 0; j < lanes; j += VL) top = vmax(vload(s + j), top);
    const float before = *maximum, seen = hmax(top), now = before > seen ? before : seen, base = now == -INFINITY ? 0.0f : now;
    if (now != before) { /* else times 1 would give the same bits */
        rebase(before, base, sum, o, dim);
        *maximum = now;
    }
    vf part[16 / VL];
    for (int j = 0; j < 16 / VL; j++) part[j] = vload(sum + j * VL);
    for (long j = 0; j < lanes; j += 16)
#pragma GCC unroll 4
        for (int i = 0; i < 16 / VL; i++) {
            vf p = vexp2_falling(vload(s + j + i * VL) - base);
            vstore(s + j + i * VL, p);
            part[i] += p;
        }
    for (int j = 0; j < 16 / VL; j++) vstore(sum + j * VL, part[j]);
}

/* The same, of weights in bfloat16, at the front of their row, which are rounded before they are summed up. The base follows the maximum only where a score
 * lies more than LAZY above it: the search for the tile's maximum is then one comparison, and weights of up to 2^LAZY are as exact as those up to 1. */
#define LAZY 8.0f
#if DOTS
INLINE void softmax_dots(float *s, long lanes, long lo, long hi, float *maximum, float *sum, float *o, long dim) {
    if (hi <= lo) {
        memset(s, 0, (size_t)lanes * 2);
        return;
    }
    if (lo > 0 || hi < lanes) hide_outside(s, lanes, lo, hi);
    vf v[KEY_TILE / 16], top = vset(-INFINITY);
#pragma GCC unroll 4
    for (int j = 0; j < KEY_TILE / 16; j++) {
        v[j] = j * 16 < lanes ? vload(s + j * 16) : vset(-INFINITY);
        top = vmax(v[j], top);
    }
    if (_mm512_cmp_ps_mask((__m512)top, (__m512)vset(*maximum + LAZY), _CMP_GT_OQ)) {
        const float now = hmax(top);
        rebase(*maximum, now, sum, o, dim);
        *maximum = now;
    }
    const vf base = vset(*maximum == -INFINITY ? 0.0f : *maximum);
    const vu ones = vuset(0x3f803f80u); /* pairs of 1 */
    vf part = vload(sum);
#pragma GCC unroll 2
    for (int j = 0; j < KEY_TILE / 32; j++) {
        if (j * 32 >= lanes) break;
        const vu pair = vnarrow_two(vexp2_coarse(v[2 * j] - base), vexp2_coarse(v[2 * j + 1] - base));
        *(vu_any *)(s + j * 16) = pair;
        part = vdot(part, pair, ones);
    }
    vstore(sum, part);
}
#else
INLINE void softmax_dots(float *s, long lanes, long lo, long hi, float *maximum, float *sum, float *o, long dim) {
    softmax_row(s, lanes, lo, hi, maximum, sum, o, dim);
}
#endif

/* The bfloat16 scales of `groups` times 16 keys, as float32 times `unit`. */
INLINE void load_scales(const char *const *group, long groups, float unit, float *to) {
    for (long g = 0; g < groups; g++)
        for (long j = 0; j < 16; j += VL) vstore(to + g * 16 + j, vload_as(group[g], j, 1) * unit);
}

/* Times a factor a column, `lanes` of them. */
INLINE void scale_rows(float *s, long rows, long lanes, const float *by) {
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < lanes; j += VL) vstore(s + r * KEY_TILE + j, vload(s + r * KEY_TILE + j) * vload(by + j));
}

/* Of the 64 entries up to its own, at `place`, a row sees those whose bit is 1: bit i is the entry i places before. Those that it sees are at the positions up to its own, one
 * each, so that its position is its place less the number of those that it does not see. Where is the one `back` positions before its own? */
INLINE long place_of(long place, uint64_t ancestors, long back) {
    const long seen = __builtin_popcountll(ancestors);
    if (back >= seen) return MAX(0, place - 64 + seen - back);
    for (long i = 0; i < back; i++) ancestors &= ancestors - 1;
    return MAX(0, place - __builtin_ctzll(ancestors));
}

/* Key `i` of a group of 16, and its value, to be key `j` of another. size: bytes of an element; a constant, so that they are copied without a call. */
INLINE void copy_lane_of(const long size, const char *k, const char *v, long i, char *to_k, char *to_v, long j, long dim) {
    const long il = size == 2 ? 2 : 1;
    for (long d = 0; d < dim; d += 16) /* of a value 16 dimensions lie in a row */
        for (long e = 0; e < 16; e++) {
            const long x = ((d + e) / il * 16 * il + (d + e) % il) * size, y = (d * 16 + e * il) * size;
            memcpy(to_k + x + j * il * size, k + x + i * il * size, (size_t)size);
            memcpy(to_v + y + (j / il * il * 16 + j % il) * size, v + y + (i / il * il * 16 + i % il) * size, (size_t)size);
        }
}
static void copy_lane(long size, const char *k, const char *v, long i, char *to_k, char *to_v, long j, long dim) {
    if (size == 1)
        copy_lane_of(1, k, v, i, to_k, to_v, j, dim);
    else if (size == 2)
        copy_lane_of(2, k, v, i, to_k, to_v, j, dim);
    else
        copy_lane_of(4, k, v, i, to_k, to_v, j, dim);
}

/* 16 keys and values from position `first` on of the row at `position`, which lies at `place`: copied to `line`, if some lie elsewhere than at their positions. Pointers as they
   are for keys at their positions. */
static void line_group(const attention *a, const int32_t *table, long kv_head, int coded, long first, long position, long place, uint64_t ancestors, long size,
                       const char **k, const char **v, const char **k_scale, const char **v_scale, char *line, char *scales) {
    const long dim = a->dim, bytes = 16 * dim * size, end = MIN(16, position + 1 - first);
    char *to_k = line, *to_v = line + LINE_BYTES, *to_ks = scales, *to_vs = scales + KEY_TILE * 2;
    int copied = 0;
    for (long j = 0; j < end; j++) {
        const long from = place_of(place, ancestors, position - first - j);
        if (from == first + j) continue;
        if (!copied) {
            memcpy(to_k, *k, (size_t)bytes);
            memcpy(to_v, *v, (size_t)bytes);
            if (coded) memcpy(to_ks, *k_scale, 32), memcpy(to_vs, *v_scale, 32);
            copied = 1;
        }
        const long block = table[from / a->block_size] * a->block_bytes, key = kv_head * a->block_size + from % a->block_size, group = block + key / 16 * bytes;
        copy_lane(size, a->k_cache + group, a->v_cache + group, key % 16, to_k, to_v, j, dim);
        if (coded) memcpy(to_ks + j * 2, a->k_scales + block + key * 2, 2), memcpy(to_vs + j * 2, a->v_scales + block + key * 2, 2);
    }
    if (!copied) return;
    *k = to_k;
    *v = to_v;
    *k_scale = to_ks;
    *v_scale = to_vs;
}

/* Returns whether a result of several rows is NaN: a later row's value may have been that weighed 0, and 0 times it is NaN as well. `coded` and `tree` are constants.
   wide [KEY_TILE * DIM_MAX]: scratch memory, for codes; line [2 * LINE_BYTES], for a tree: there the rows' last tiles of keys, which they do not share, are put together. */
INLINE int attention_rows_of(const int coded, const int tree, const attention *a, long s, long kv_head, long run, long first, long count, float *wide, char *line) {
    _Alignas(64) float q[ROW_TILE * DIM_MAX], o[ROW_TILE * DIM_MAX], score[ROW_TILE * KEY_TILE];
    _Alignas(64) float maximum[ROW_TILE], sum[ROW_TILE * 16];
    const long dim = a->dim, group = a->heads / a->kv_heads, size = coded ? 1 : a->cache_bf16 ? 2 : 4;
    const long head0 = kv_head * group + run * a->heads_per, heads = MIN(a->heads_per, group - run * a->heads_per);
    const long row0 = a->q_start[s] + first, rows = count * heads;
    const long length = a->kv_len[s], position0 = length - (a->q_start[s + 1] - a->q_start[s]) + first;
    const int32_t *table = a->tables + s * a->table_width;
    const int dots = DOTS && !coded && a->cache_bf16, narrow = dots ? 2 : 1, tall = dots ? DR_MANY : MR; /* narrow: of a float's place, how many elements */
    const float lift = coded ? KV_LIFT(a->kv_format) : 1.0f, scale = a->scale * 1.44269504088896341f * lift;
    for (long i = 0; i < count; i++)
        for (long h = 0; h < heads; h++) {
            long r = i * heads + h, from = (row0 + i) * a->ldq + (head0 + h) * dim;
            for (long d = 0; d < dim; d += VL) {
                const vf v = a->q_bf16 ? vload_as(a->q, from + d, 1) : vload_as(a->q, from + d, 0);
                if (dots) /* rounded already; its scale comes after the sum */
                    vstore_as(q, r * dim + d, v, 1);
                else
                    vstore(q + r * dim + d, v * scale);
                vstore(o + r * dim + d, vset(0.0f));
            }
            maximum[r] = -INFINITY;
            for (long j = 0; j < 16; j++) sum[r * 16 + j] = 0.0f;
        }
    long at[ROW_TILE], lowest = position0, last = position0 + count; /* positions of the rows; one past the last visible key of the unit */
    long shared = LONG_MAX; /* keys before it lie in the places of their positions, for all rows */
    for (long i = 0; i < count; i++) at[i] = position0 + i;
    if (tree) {
        lowest = LONG_MAX;
        last = 0;
        for (long i = 0; i < count; i++) {
            const uint64_t seen = (uint64_t)a->ancestors[row0 + i];
            if (~seen) shared = MIN(shared, at[i] - 63 + __builtin_clzll(~seen));
            at[i] = MAX(0, at[i] - 64 + __builtin_popcountll(seen));
            lowest = MIN(lowest, at[i]);
            last = MAX(last, at[i] + 1);
        }
    }
    const long start = a->window > 0 ? MAX(lowest - a->window + 1, 0) / KEY_TILE * KEY_TILE : 0;
    const long dim_panels = dim / PW;
    const char *k_group[KEY_TILE / 16], *v_group[KEY_TILE / 16], *b[KEY_TILE / 16 * NP_MAX];
    const char *k_scale[KEY_TILE / 16], *v_scale[KEY_TILE / 16];
    float scales[KEY_TILE];
    uint16_t line_scales[2 * KEY_TILE];
    const float unit = KV_UNIT(a->kv_format);
    for (long tile = start, turn = 0; tile < last;) {
        const int own = tree && tile + KEY_TILE - 1 >= shared; /* then one query row after the other, else all */
        const long row_from = own ? turn * heads : 0, many = own ? heads : rows, row_to = row_from + many;
        const long keys = MIN(KEY_TILE, (own ? at[turn] + 1 : last) - tile), groups = (keys + 15) / 16, blocks = (many + tall - 1) / tall;
        const int widened = coded && many > KV_REGISTERS;
        const long node = turn, here = tile;
        turn = own && turn + 1 < count ? turn + 1 : 0;
        if (!turn) tile += KEY_TILE;
        if (tree && keys <= 0) continue;
        for (long g = 0; g < groups; g++) {
            long key = here + g * 16, block = table[key / a->block_size];
            long from = block * a->block_bytes + (kv_head * a->block_size + key % a->block_size) * dim * size;
            k_group[g] = a->k_cache + from;
            v_group[g] = a->v_cache + from;
            if (coded) {
                from = block * a->block_bytes + (kv_head * a->block_size + key % a->block_size) * 2;
                k_scale[g] = a->k_scales + from;
                v_scale[g] = a->v_scales + from;
            }
            if (tree && own) line_group(a, table, kv_head, coded, here + g * 16, at[node], position0 + node, (uint64_t)a->ancestors[row0 + node], size, k_group + g, v_group + g,
                                        k_scale + g, v_scale + g, line + g * 16 * dim * size, (char *)(line_scales + g * 16));
        }
        if (!(tree && own) && rows <= (coded ? 16 : tall)) /* decode reads every block once: have the next tile's on the way */
            for (long key = here + (coded ? KV_AHEAD : 1) * KEY_TILE; key < MIN(here + (coded ? KV_AHEAD + 1 : 2) * KEY_TILE, last); key += 16) {
                long from = table[key / a->block_size] * a->block_bytes + (kv_head * a->block_size + key % a->block_size) * dim * size;
                if (coded) {
                    long scale = table[key / a->block_size] * a->block_bytes + (kv_head * a->block_size + key % a->block_size) * 2;
                    __builtin_prefetch(a->k_scales + scale, 0, 2);
                    __builtin_prefetch(a->v_scales + scale, 0, 2);
                }
                for (long byte = 0; byte < 16 * dim * size; byte += 64) {
                    __builtin_prefetch(a->k_cache + from + byte, 0, 2);
                    __builtin_prefetch(a->v_cache + from + byte, 0, 2);
                }
            }
        if (widened)
            for (long g = 0; g < groups; g++) {
                kv_widen(a->kv_format, k_group[g], dim, wide + g * dim * PW);
                k_group[g] = (const char *)(wide + g * dim * PW);
            }
        const int codes = coded && !widened;
        long row = row_from;
        for (long i = 0; i < blocks; i++) {
            int mr = (int)(many / blocks + (i < many % blocks));
            for (long g = 0; g < groups;) {
                int np = dots ? dot_width(mr, groups - g) : tile_width(mr, groups - g);
                for (int j = 0; j < np; j++) b[j] = k_group[g + j];
                tile_args t = {
                    .a = q + row * dim / narrow, .lda = dim, .b = b, .segments = 1, .seg_k = dim, .last_k = dim,
                    .c = score + row * KEY_TILE + g * 16, .ldc = KEY_TILE, .add = 0, .scale = scale,
                };
                (dots ? dot_tile_of(mr, np) : codes ? kv_tile_of(a->kv_format, mr, np) : tile_of(mr, np, coded ? 0 : a->cache_bf16))(&t);
                g += np;
            }
            row += mr;
        }
        if (coded) {
            load_scales(k_scale, groups, unit, scales);
            scale_rows(score + row_from * KEY_TILE, many, groups * 16, scales);
        }
        for (long r = row_from; r < row_to; r++) {
            long position = at[r / heads];
            long lo = a->window > 0 ? position - a->window + 1 - here : 0, hi = position + 1 - here;
            (dots ? softmax_dots : softmax_row)(score + r * KEY_TILE, groups * 16, MAX(lo, 0), MIN(hi, keys), maximum + r, sum + r * 16, o + r * dim, dim);
        }
        if (coded) {
            load_scales(v_scale, groups, lift, scales);
            scale_rows(score + row_from * KEY_TILE, many, groups * 16, scales);
        }
        if (widened)
            for (long g = 0; g < groups; g++) {
                kv_widen(a->kv_format, v_group[g], dim, wide + g * dim * PW);
                v_group[g] = (const char *)(wide + g * dim * PW);
            }
        const long panel_bytes = 256 * (widened ? 4 : size);
        row = row_from;
        for (long i = 0; i < blocks; i++) {
            int mr = (int)(many / blocks + (i < many % blocks));
            for (long d = 0; d < dim_panels;) {
                int np = dots ? dot_width(mr, dim_panels - d) : tile_width(mr, dim_panels - d);
                for (long g = 0; g < groups; g++)
                    for (int j = 0; j < np; j++) b[g * np + j] = v_group[g] + (d + j) * panel_bytes;
                tile_args t = {
                    .a = score + row * KEY_TILE, .lda = KEY_TILE * narrow, .b = b, .segments = groups, .seg_k = 16, .last_k = keys - (groups - 1) * 16,
                    .c = o + row * dim + d * PW, .ldc = dim, .add = 1, .scale = 1.0f,
                };
                (dots ? dot_tile_of(mr, np) : codes ? kv_tile_of(a->kv_format, mr, np) : tile_of(mr, np, coded ? 0 : a->cache_bf16))(&t);
                d += np;
            }
            row += mr;
        }
    }
    vu nan = {0};
    for (long i = 0; i < count; i++)
        for (long h = 0; h < heads; h++) {
            long r = i * heads + h, to = (row0 + i) * a->ldo + (head0 + h) * dim;
            const float inv = (coded ? unit : 1.0f) / fold(sum + r * 16);
            for (long d = 0; d < dim; d += VL) {
                vf v = vrounded(vload(o + r * dim + d) * inv, a->round);
                nan |= (vu)(v != v);
                if (a->out_bf16)
                    vstore_as(a->out, to + d, v, 1);
                else
                    vstore((float *)a->out + to + d, v);
            }
        }
    int any = 0;
    for (int lane = 0; lane < VL; lane++) any |= nan[lane] != 0;
    return any && count > 1;
}

static int attention_rows(const attention *a, long s, long kv_head, long run, long first, long count) {
    return attention_rows_of(0, 0, a, s, kv_head, run, first, count, 0, 0);
}
static int attention_rows_coded(const attention *a, long s, long kv_head, long run, long first, long count) {
    _Alignas(64) float wide[KEY_TILE * DIM_MAX];
    return attention_rows_of(1, 0, a, s, kv_head, run, first, count, wide, 0);
}
static int attention_rows_tree(const attention *a, long s, long kv_head, long run, long first, long count) {
    _Alignas(64) char line[2 * LINE_BYTES];
    return attention_rows_of(0, 1, a, s, kv_head, run, first, count, 0, line);
}
static int attention_rows_tree_coded(const attention *a, long s, long kv_head, long run, long first, long count) {
    _Alignas(64) float wide[KEY_TILE * DIM_MAX];
    _Alignas(64) char line[2 * LINE_BYTES];
    return attention_rows_of(1, 1, a, s, kv_head, run, first, count, wide, line);
}

static void attention_unit(const void *job, long unit) {
    const attention *a = job;
    long run = unit % a->head_runs, head = unit / a->head_runs % a->kv_heads, index = unit / a->head_runs / a->kv_heads, s = index, first = 0;
    if (a->unit_start) {
        long low = 0, high = a->sequences; /* the last s with unit_start[s] <= index */
        while (high - low > 1) {
            long mid = (low + high) / 2;
            if (a->unit_start[mid] <= index) low = mid; else high = mid;
        }
        s = low;
        long tiles = a->unit_start[s + 1] - a->unit_start[s];
        first = (tiles - 1 - (index - a->unit_start[s])) * a->queries_per; /* the longest first */
    }
    long rows = a->q_start[s + 1] - a->q_start[s];
    const long count = MIN(a->queries_per, rows - first);
    int tree = 0;
    for (long i = 0; a->ancestors && i < count; i++) tree |= a->ancestors[a->q_start[s] + first + i] != -1;
    int (*const of)(const attention *, long, long, long, long, long) =
        tree ? a->kv_format ? attention_rows_tree_coded : attention_rows_tree : a->kv_format ? attention_rows_coded : attention_rows;
    if (of(a, s, head, run, first, count)) /* each by itself sees nothing behind it, nor beside: drafts cannot spoil what comes before them */
        for (long i = 0; i < count; i++) of(a, s, head, run, first + i, 1);
}

#endif
