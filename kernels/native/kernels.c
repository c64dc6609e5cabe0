/* The library's entries, called through ctypes (which releases the GIL). One translation unit: the headers beside this file are its rooms.
 *
 * What it is: each separate operation as one call over caller-owned memory, and the decoder program. Scratch memory of the separate
 * operations is malloc'ed per call (NULL is reported as -1).
 * What it does not know: tensors; the Python side checks shapes and dtypes, this side checks indices.
 */
#include <stdlib.h>

#include "decoder.h"
#include "draft.h"
#include "sample.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT const char *ps_isa(void) { return ISA; }
EXPORT int64_t ps_sizes(int64_t which) {
    return (int64_t)(which == 0 ? sizeof(weight) : which == 1 ? sizeof(layer) : which == 2 ? sizeof(program) : sizeof(step));
}

EXPORT void ps_pack(const void *rows_of, const void *second, void *to, int64_t n, int64_t k, int64_t bf16, int64_t panel_bytes, int64_t threads) {
    packing j = {.rows_of = rows_of, .second = second, .to = to, .n = n, .k = k, .panel_bytes = panel_bytes, .bf16 = (int)bf16};
    run_alone((int)threads, (n + PW - 1) / PW * (second ? 2 : 1), pack_unit, &j);
}

/* Columns of `half` of a weight whose panels were zeroed; where two parts meet in a panel, each writes its own columns. */
EXPORT void ps_pack_codes(const weight *w, const void *data, const float *scales, const int16_t *zeros, int64_t scale_rows, int64_t row0, int64_t rows, int64_t half,
                          int64_t threads) {
    code_packing j = {
        .data = data, .scales = scales, .zeros = zeros, .to = (char *)w->w, .rows = rows, .row0 = row0, .k = w->k, .group = w->group,
        .groups = (w->k + w->group - 1) / w->group, .scale_rows = scale_rows, .panel_bytes = w->panel_bytes, .first = row0 / PW,
        .format = (int)w->format, .halves = w->gated ? 2 : 1, .half = (int)half,
    };
    run_alone((int)threads, (row0 + rows - 1) / PW - row0 / PW + 1, pack_codes_unit, &j);
}
EXPORT int64_t ps_panel_bytes(int64_t format, int64_t k, int64_t group) {
    const long whole = k / group, rest = k % group;
    return whole * group_bytes((int)format, group) + (rest ? group_bytes((int)format, rest) : 0);
}

typedef struct {
    const void *from;
    const int32_t *perm;
    void *to;
    long n, ld;
    int bf16, narrow; /* of from and to */
} widening;
static void widen_unit(const void *job, long row) {
    const widening *j = job;
    float *to = (float *)j->to + row * j->ld;
    if (j->narrow && !j->perm)
        memcpy((uint16_t *)j->to + row * j->ld, (const uint16_t *)j->from + row * j->n, (size_t)j->n * 2);
    else if (j->narrow)
        for (long i = 0; i < j->n; i++) ((uint16_t *)j->to)[row * j->ld + i] = ((const uint16_t *)j->from)[row * j->n + j->perm[i]];
    else if (j->perm)
        for (long i = 0; i < j->n; i++) to[i] = load_as(j->from, row * j->n + j->perm[i], j->bf16);
    else
        for (long i = 0; i < j->n; i++) to[i] = widen(((const uint16_t *)j->from)[row * j->n + i]);
}

EXPORT int64_t ps_linear(const weight *w, const void *x, int64_t x_bf16, int64_t rows, void *out, int64_t out_bf16, int64_t threads) {
    gemm g = {
        .w = w, .a = x, .lda = w->k, .rows = rows, .narrow = narrow_inputs(w, (int)x_bf16), .kind = w->gated ? TO_GATED : out_bf16 ? TO_BF16 : TO_F32,
        .round = (int)out_bf16, .out_bf16 = (int)out_bf16, .out = out, .ldo = w->n,
    };
    void *wide = 0;
    const int aliased = g.narrow && rows > 4 && w->k % 512 == 0; /* rows a multiple of 1 KiB apart share few sets of the cache */
    if ((x_bf16 && !g.narrow) || w->perm || aliased) {
        g.lda = padded(w->k);
        wide = aligned_alloc(64, (size_t)(rows * g.lda * 4 + 63) / 64 * 64);
        if (!wide) return -1;
        widening j = {.from = x, .perm = w->perm, .to = wide, .n = w->k, .ld = g.lda, .bf16 = (int)x_bf16, .narrow = g.narrow};
        run_alone(rows < 16 ? 1 : (int)threads, rows, widen_unit, &j);
        g.a = wide;
    }
    run_alone((int)threads, gemm_plan(&g, (int)threads), gemm_unit, &g);
    free(wide);
    return 0;
}

typedef struct {
    const void *x;
    void *residual, *out;
    const float *w;
    long n;
    float eps;
    int bf16;
} norming;
static void norming_unit(const void *job, long row) {
    const norming *j = job;
    const long at = row * j->n;
    float buffer[j->n + 1];
    buffer[0] = 0.0f;
    for (long i = 0; i < j->n; i++) {
        float v = load_as(j->x, at + i, j->bf16);
        if (j->residual) {
            v = rounded(load_as(j->residual, at + i, j->bf16) + v, j->bf16);
            store_as(j->residual, at + i, v, j->bf16);
        }
        buffer[i] = v;
    }
    norm_row(buffer, j->w, buffer, j->n, j->eps, j->bf16, 0);
    for (long i = 0; i < j->n; i++) store_as(j->out, at + i, buffer[i], j->bf16);
}
EXPORT void ps_norm(const void *x, void *residual, const float *w, void *out, int64_t rows, int64_t n, double eps, int64_t bf16, int64_t threads) {
    norming j = {.x = x, .residual = residual, .out = out, .w = w, .n = n, .eps = (float)eps, .bf16 = (int)bf16};
    run_alone(rows * n < 16384 ? 1 : (int)threads, rows, norming_unit, &j);
}

typedef struct {
    const void *gate_up;
    void *out;
    long n;
    int kind, bf16;
} gating;
static void gating_unit(const void *job, long row) {
    const gating *j = job;
    const long g = row * 2 * j->n, u = g + j->n, o = row * j->n;
    long i = 0;
    for (; i + VL <= j->n; i += VL) vstore_as(j->out, o + i, gate(vload_as(j->gate_up, g + i, j->bf16), vload_as(j->gate_up, u + i, j->bf16), j->kind, j->bf16), j->bf16);
    if (i < j->n) { /* the same vector arithmetic on a padded tail */
        float a[VL] = {0}, b[VL] = {0};
        for (long t = i; t < j->n; t++) {
            a[t - i] = load_as(j->gate_up, g + t, j->bf16);
            b[t - i] = load_as(j->gate_up, u + t, j->bf16);
        }
        vstore(a, gate(vload(a), vload(b), j->kind, j->bf16));
        for (long t = i; t < j->n; t++) store_as(j->out, o + t, a[t - i], j->bf16);
    }
}
EXPORT void ps_gated(const void *gate_up, void *out, int64_t rows, int64_t n, int64_t kind, int64_t bf16, int64_t threads) {
    gating j = {.gate_up = gate_up, .out = out, .n = n, .kind = (int)kind, .bf16 = (int)bf16};
    run_alone(rows * n < 16384 ? 1 : (int)threads, rows, gating_unit, &j);
}

typedef struct {
    const program *p;
    const layer *l;
    const void *qkv;
    const int32_t *positions, *slots;
    void *out;
} roping;
static void roping_unit(const void *job, long token) {
    const roping *j = job;
    const program *p = j->p;
    const long width = (p->heads + 2 * p->kv_heads) * p->dim, q = p->heads * p->dim;
    float row[width];
    for (long i = 0; i < width; i++) row[i] = load_as(j->qkv, token * width + i, (int)p->bf16);
    rope_token(p, j->l, row, j->positions[token], j->slots[token]);
    for (long i = 0; i < q; i++) store_as(j->out, token * q + i, row[i], (int)p->bf16);
}
/* 0, or 5 (positions), 6 (slots). Of p: heads, kv_heads, dim, bf16, rotary, table_rows, blocks, block_size, block_bytes, kv_format, eps, cos_sin; of l: norms, caches. */
EXPORT int64_t ps_rope(const program *p, const layer *l, const void *qkv, const int32_t *positions, const int32_t *slots, int64_t tokens, void *out, int64_t threads) {
    if (!inside(positions, tokens, 0, p->table_rows)) return 5;
    if (!inside(slots, tokens, INT32_MIN, p->blocks * p->block_size)) return 6;
    roping j = {.p = p, .l = l, .qkv = qkv, .positions = positions, .slots = slots, .out = out};
    run_alone(tokens < 8 ? 1 : (int)threads, tokens, roping_unit, &j);
    return 0;
}

/* Codes as check_sequences. Of p: heads, kv_heads, dim, bf16, blocks, block_size, block_bytes, kv_format, scale; of l: caches, window; of s: tables, counts, threads. */
static void move_entry(const program *p, const layer *l, long from, long to, long head, long size) {
    const long il = size == 2 ? 2 : 1, dim = p->dim;
    const long a = from / p->block_size * p->block_bytes, b = to / p->block_size * p->block_bytes; /* blocks */
    const long i = head * p->block_size + from % p->block_size, j = head * p->block_size + to % p->block_size;
    char *k = (char *)l->k_cache, *v = (char *)l->v_cache;
    for (long d = 0; d < dim; d++) {
        const long x = d / il * 16 * il + d % il, y = d / 16 * 256 + d % 16 * il; /* inside a group of 16 keys, of key 0 */
        const long k_from = i / 16 * 16 * dim + i % 16 * il + x, k_to = j / 16 * 16 * dim + j % 16 * il + x;
        const long v_from = i / 16 * 16 * dim + i % 16 / il * il * 16 + i % il + y, v_to = j / 16 * 16 * dim + j % 16 / il * il * 16 + j % il + y;
        memcpy(k + b + k_to * size, k + a + k_from * size, (size_t)size);
        memcpy(v + b + v_to * size, v + a + v_from * size, (size_t)size);
    }
    if (!p->kv_format) return;
    memcpy((char *)l->k_scales + b + j * 2, (char *)l->k_scales + a + i * 2, 2);
    memcpy((char *)l->v_scales + b + j * 2, (char *)l->v_scales + a + i * 2, 2);
}

EXPORT int64_t ps_attention(const program *p, const layer *l, const step *s, const void *q, void *out) {
    int wrong = check_sequences(s->q_start, s->kv_len, s->tables, s->sequences, s->table_width, s->token_count, p->blocks, p->block_size);
    if (wrong || s->token_count == 0) return wrong;
    const int bf16 = (int)p->bf16;
    attention a = {
        .q = q, .ldq = p->heads * p->dim, .q_bf16 = bf16, .out = out, .ldo = p->heads * p->dim, .out_bf16 = bf16, .cache_bf16 = bf16,
        .round = bf16, .k_cache = l->k_cache, .v_cache = l->v_cache, .tables = s->tables, .q_start = s->q_start, .kv_len = s->kv_len,
        .table_width = s->table_width, .sequences = s->sequences, .heads = p->heads, .kv_heads = p->kv_heads, .dim = p->dim,
        .block_size = p->block_size, .block_bytes = p->block_bytes, .window = l->window, .scale = (float)p->scale,
        .kv_format = (int)p->kv_format, .k_scales = l->k_scales, .v_scales = l->v_scales, .ancestors = s->ancestors,
    };
    int32_t *scratch = malloc((size_t)(s->sequences + 1) * sizeof *scratch);
    if (!scratch) return -1;
    run_alone((int)s->threads, attention_plan(&a, scratch), attention_unit, &a);
    free(scratch);
    return 0;
}

typedef struct {
    const int32_t *ids;
    const char *table;
    char *out;
    long bytes;
} gathering;
static void gather_unit(const void *job, long row) {
    const gathering *j = job;
    memcpy(j->out + row * j->bytes, j->table + j->ids[row] * j->bytes, (size_t)j->bytes);
}
EXPORT int64_t ps_embedding(const int32_t *ids, const void *table, void *out, int64_t count, int64_t table_rows, int64_t row_bytes, int64_t threads) {
    if (!inside(ids, count, 0, table_rows)) return 4;
    gathering j = {.ids = ids, .table = table, .out = out, .bytes = row_bytes};
    run_alone(count * row_bytes < 262144 ? 1 : (int)threads, count, gather_unit, &j);
    return 0;
}

EXPORT void ps_argmax(const float *logits, int32_t *out, int64_t rows, int64_t n, int64_t threads) {
    argmax_job j = {.logits = logits, .out = out, .n = n};
    run_alone(rows < 4 ? 1 : (int)threads, rows, argmax_unit, &j);
}

typedef struct {
    float *logits;
    const int32_t *mask, *mask_rows;
    long n, words;
} masking;
static void masking_unit(const void *job, long row) {
    const masking *j = job;
    if (j->mask_rows[row] < 0) return;
    float *x = j->logits + row * j->n;
    const uint32_t *m = (const uint32_t *)j->mask + j->mask_rows[row] * j->words;
    for (long w = 0; w < j->words; w++, x += 32) {
        const uint32_t word = m[w];
        const long left = j->n - w * 32;
        if (left >= 32) {
            if (word != UINT32_MAX) {
#pragma omp simd
                for (int i = 0; i < 32; i++) x[i] = word >> i & 1 ? x[i] : -INFINITY;
            }
        } else {
            for (int i = 0; i < left; i++) x[i] = word >> i & 1 ? x[i] : -INFINITY;
        }
    }
}
/* 0, or 8: a row names no mask. Bit t % 32 of word t / 32 of mask[mask_rows[r]]: token t stays as it is, else it becomes -inf; below 0: all stay. */
EXPORT int64_t ps_mask(float *logits, int64_t rows, int64_t n, const int32_t *mask, int64_t masks, const int32_t *mask_rows, int64_t threads) {
    if (!inside(mask_rows, rows, INT32_MIN, masks)) return 8;
    masking j = {.logits = logits, .mask = mask, .mask_rows = mask_rows, .n = n, .words = (n + 31) / 32};
    run_alone(rows * n < 131072 ? 1 : (int)threads, rows, masking_unit, &j);
    return 0;
}

EXPORT int64_t ps_step_bytes(const program *p, const step *s) { return place(p, s).bytes; }
EXPORT int64_t ps_step(const program *p, const step *s) { return run_step(p, s); }

/* 0, or -1 without memory. out: the drawn tokens, -1 for a bad row. */
EXPORT int64_t ps_verify(const int32_t *tokens, const int32_t *slots, const int32_t *positions, const int32_t *bounds, int64_t rows, int32_t *history, int64_t slots_count,
                         int64_t width, int32_t *counts, int32_t *kept) {
    if (!inside(slots, rows, INT32_MIN, slots_count) || !inside(positions, rows, 0, width)) return 9;
    verify_rows(tokens, slots, positions, bounds, rows, history, width, counts, kept);
    return 0;
}
EXPORT int64_t ps_verify_tree(const int32_t *tokens, const int32_t *slots, const int32_t *positions, const int32_t *bounds, int64_t rows, int32_t *history,
                              int64_t slots_count, int64_t width, const int32_t *parents, int64_t deepest, int32_t *counts, int32_t *kept, int32_t *sources) {
    if (!inside(slots, rows, INT32_MIN, slots_count) || !inside(positions, rows, 1, width)) return 9;
    verify_trees(tokens, slots, positions, bounds, rows, history, width, parents, deepest, counts, kept, sources);
    return 0;
}
/* Entries of one layer's caches from places to places, one after the other; pairs with a place below 0 are left out. size: bytes of an element. */
EXPORT int64_t ps_move_kv(const program *p, const layer *l, const int32_t *from, const int32_t *to, int64_t count, int64_t size) {
    if (!inside(from, count, INT32_MIN, p->blocks * p->block_size) || !inside(to, count, INT32_MIN, p->blocks * p->block_size)) return 6;
    for (long i = 0; i < count; i++)
        if (from[i] >= 0 && to[i] >= 0)
            for (long head = 0; head < p->kv_heads; head++) move_entry(p, l, from[i], to[i], head, size);
    return 0;
}
EXPORT int64_t ps_put_drafts(int32_t *drafts, const int32_t *slots, const int32_t *ends, int64_t rows, int64_t count, int32_t *history, int64_t slots_count, int64_t width,
                             int64_t vocab) {
    if (!inside(slots, rows, INT32_MIN, slots_count) || !inside(ends, rows, 0, width + 1)) return 9;
    put_rows(drafts, slots, ends, rows, count, history, width, vocab);
    return 0;
}
EXPORT int64_t ps_ngrams(const int32_t *history, int64_t slots_count, int64_t width, const int32_t *slots, const int32_t *ends, int64_t rows, int64_t shortest,
                         int64_t longest, int32_t *out, int64_t count, int64_t threads) {
    if (!inside(slots, rows, INT32_MIN, slots_count) || !inside(ends, rows, 0, width + 1)) return 9;
    prompt_lookup j = {.history = history, .slots = slots, .ends = ends, .out = out, .width = width, .shortest = shortest, .longest = longest, .count = count};
    run_alone(rows * width < 65536 ? 1 : (int)threads, rows, lookup_unit, &j);
    return 0;
}

EXPORT int64_t ps_draw(
    const float *logits, int64_t rows, int64_t n, const float *temperature, const int32_t *top_k, const float *top_p, const float *min_p,
    const int64_t *seeds, const int32_t *choices, const int32_t *positions, int32_t *out, int64_t threads
) {
    drawing j = {
        .logits = logits, .temperature = temperature, .top_p = top_p, .min_p = min_p, .top_k = top_k, .choices = choices,
        .positions = positions, .seeds = seeds, .out = out, .n = n,
    };
    run_alone((int)threads, rows, draw_unit, &j);
    return atomic_load(&j.failed) ? -1 : 0;
}
