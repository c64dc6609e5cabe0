/* The decoder program: a whole step of a Llama-like model in one parallel region.
 *
 * What it is: the phases embed, norm, QKV, rotary + cache write, attention, output projection, norm, gate-up, down, ... final norm, LM head,
 * argmax over one workspace, built from the same row, tile and attention functions as the separate operations, in the same order of
 * arithmetic. Activations are float32 in memory, rounded to the model's dtype wherever the separate operations would round. After the last layer's
 * cache write only the rows whose results are wanted go on (rows do not depend on each other, so this changes nothing but time).
 * The stream in front of a layer can be kept besides: the norm that reads it writes it down.
 * What it does not know: requests, sampling; it trusts pointers that Python has checked and checks every index itself.
 */
#ifndef PENSTOCK_DECODER_H
#define PENSTOCK_DECODER_H

#include "attention.h"
#include "gemm.h"
#include "team.h"

#define FEW 8        /* rows so few that a norm is a serial tail, not a phase */
#define MLP_ROWS 512 /* rows that go through gate-up and down together: bounds the workspace, stays in the L3 cache */

typedef struct {
    weight qkv, o, gate_up, down;
    const float *attn_norm, *mlp_norm, *q_norm, *k_norm; /* float32; q_norm and k_norm may be NULL */
    void *k_cache, *v_cache, *k_scales, *v_scales; /* scales: of caches of codes */
    int64_t window;
    double k_fixed, v_fixed; /* of codes: the scale that every token gets, or 0 */
} layer;

typedef struct {
    int64_t layers_count, hidden, heads, kv_heads, dim, inter, vocab, bf16, rotary, table_rows, embedding_rows, blocks, block_size;
    int64_t block_bytes; /* from one block of a cache to the next */
    int64_t kv_format;   /* of codes (codes.h), or 0: caches have the model's elements */
    double eps, scale;
    const void *embedding;
    const float *final_norm, *cos_sin;
    weight lm_head;
    const layer *layers;
} program;

typedef struct {
    const int32_t *tokens, *positions, *slots, *tables, *q_start, *kv_len, *rows;
    int64_t token_count, sequences, table_width, row_count;
    float *logits;
    void *hidden;
    int32_t *greedy;
    void *workspace;
    int64_t threads;
    const int32_t *tap_layers; /* ascending: in front of these the stream is kept; layers_count: behind the last, of the wanted rows alone */
    void *taps;                /* [tokens][tap_count][hidden], model dtype */
    int64_t tap_count;
    const void *given, *given_normed; /* or NULL: in place of the embedding of `tokens` and of the first layer's norm, [tokens][hidden] and [tokens][its qkv's k] */
    const int64_t *ancestors; /* [token_count], or NULL: see attention.h */
} step;

typedef struct {
    float *x, *qkv, *x_rows, *logits;
    void *a, *a_rows, *act; /* inputs of layers: float32 or, where narrow_inputs says so, bfloat16 */
    int32_t *units;
    phase *phases;
    long ldx, lda, ldq, ldi, bytes;
} space;

static long padded(long n) { return (n + 15) / 16 * 16 + 16; } /* the odd 16 keep rows off one cache set */

static space place(const program *p, const step *s) {
    space w = {.ldx = padded(p->hidden), .lda = padded(MAX(MAX(p->hidden, p->heads * p->dim), p->layers[0].qkv.k)), .ldq = padded((p->heads + 2 * p->kv_heads) * p->dim)};
    long t = s->token_count, l = s->row_count, most = MAX(t, l), at = 0; /* a token may be wanted twice: more rows than tokens */
    char *base = s->workspace;
    w.ldi = padded(p->inter);
#define TAKE(field, count, type) w.field = (type *)(base + at); at += ((long)(count) * (long)sizeof(type) + 63) / 64 * 64
    TAKE(phases, p->layers_count * (6 + 2 * ((most + MLP_ROWS - 1) / MLP_ROWS)) + 8, phase);
    TAKE(units, s->sequences + 1, int32_t);
    TAKE(x, t * w.ldx, float);
    TAKE(a, t * w.lda, float); /* or half of it */
    TAKE(qkv, t * w.ldq, float);
    TAKE(act, MIN(most, MLP_ROWS) * w.ldi, float);
    TAKE(x_rows, l * w.ldx, float);
    TAKE(a_rows, l * w.lda, float);
    TAKE(logits, s->greedy && !s->logits ? l * p->vocab : 0, float);
#undef TAKE
    w.bytes = at;
    return w;
}

/* What the units of the small phases need. */
typedef struct {
    const program *p;
    const step *s;
    const space *w;
    const layer *l;
    const float *x;
    void *a;
    const float *norm;
    long rows, per;
    int narrow; /* of a */
    void *tap; /* where row 0 of x is kept, or NULL */
} rows_job;

INLINE void *row_at(void *a, long row, long ld, int narrow) { return (char *)a + row * ld * (narrow ? 2 : 4); }

/* As it is: it was rounded where it was added to. */
static void keep_row(const rows_job *j, long row) {
    const long n = j->p->hidden, to = row * j->s->tap_count * n;
    const int bf16 = (int)j->p->bf16;
    const float *x = j->x + row * j->w->ldx;
    long i = 0;
    for (; i + VL <= n; i += VL) vstore_as(j->tap, to + i, vload(x + i), bf16);
    for (; i < n; i++) store_as(j->tap, to + i, x[i], bf16);
}
static void *tap_of(const program *p, const step *s, long layer) {
    for (long k = 0; k < s->tap_count; k++)
        if (s->tap_layers[k] == layer) return (char *)s->taps + k * p->hidden * (p->bf16 ? 2 : 4);
    return 0;
}

static void norm_unit(const void *job, long unit) {
    const rows_job *j = job;
    for (long r = unit * j->per; r < MIN((unit + 1) * j->per, j->rows); r++) {
        norm_row(j->x + r * j->w->ldx, j->norm, row_at(j->a, r, j->w->lda, j->narrow), j->p->hidden, (float)j->p->eps, (int)j->p->bf16, j->narrow);
        if (j->tap) keep_row(j, r);
    }
}
static void norm_all(const void *job) {
    rows_job j = *(const rows_job *)job;
    j.per = j.rows;
    norm_unit(&j, 0);
}

static void embed_unit(const void *job, long unit) {
    const rows_job *j = job;
    const long h = j->p->hidden;
    for (long r = unit * j->per; r < MIN((unit + 1) * j->per, j->rows); r++) {
        float *x = j->w->x + r * j->w->ldx;
        const long from = j->s->tokens[r] * h;
        if (j->p->bf16)
            for (long i = 0; i < h; i++) x[i] = widen(((const uint16_t *)j->p->embedding)[from + i]);
        else
            memcpy(x, (const float *)j->p->embedding + from, (size_t)h * 4);
    }
    norm_unit(job, unit);
}

static void load_row(float *to, const void *from, long at, long n, int bf16) {
    long i = 0;
    for (; i + VL <= n; i += VL) vstore(to + i, vload_as(from, at + i, bf16));
    for (; i < n; i++) to[i] = load_as(from, at + i, bf16);
}
static void given_unit(const void *job, long unit) {
    const rows_job *j = job;
    const long h = j->p->hidden, k = j->p->layers[0].qkv.k;
    const int bf16 = (int)j->p->bf16;
    for (long r = unit * j->per; r < MIN((unit + 1) * j->per, j->rows); r++) {
        load_row(j->w->x + r * j->w->ldx, j->s->given, r * h, h, bf16);
        void *a = row_at(j->w->a, r, j->w->lda, j->narrow);
        if (j->narrow)
            memcpy(a, (const uint16_t *)j->s->given_normed + r * k, (size_t)k * 2);
        else
            load_row(a, j->s->given_normed, r * k, k, bf16);
        if (j->tap) keep_row(j, r);
    }
}

static void rope_token(const program *p, const layer *l, float *qkv, int32_t position, int32_t slot) {
    const long dim = p->dim;
    const int bf16 = (int)p->bf16;
    const float *table = p->cos_sin + position * p->rotary;
    for (long h = 0; h < p->heads + p->kv_heads; h++) {
        float *x = qkv + h * dim;
        const float *norm = h < p->heads ? l->q_norm : l->k_norm;
        if (norm) norm_row(x, norm, x, dim, (float)p->eps, bf16, 0);
        rotate_head(x, table, p->rotary / 2, bf16);
    }
    if (slot < 0) return;
    if (p->kv_format) {
        for (long h = 0; h < p->kv_heads; h++) {
            const long block = slot / p->block_size * p->block_bytes, codes = block + h * p->block_size * dim, scales = block + h * p->block_size * 2;
            const kv_block to = {
                .k = (char *)l->k_cache + codes, .v = (char *)l->v_cache + codes, .k_scales = (uint16_t *)((char *)l->k_scales + scales),
                .v_scales = (uint16_t *)((char *)l->v_scales + scales), .k_fixed = (float)l->k_fixed, .v_fixed = (float)l->v_fixed,
            };
            write_codes((int)p->kv_format, &to, slot % p->block_size, qkv + (p->heads + h) * dim, qkv + (p->heads + p->kv_heads + h) * dim, dim);
        }
        return;
    }
    for (long h = 0; h < p->kv_heads; h++) {
        long at = slot / p->block_size * p->block_bytes + h * p->block_size * dim * (bf16 ? 2 : 4);
        write_cache((char *)l->k_cache + at, (char *)l->v_cache + at, slot % p->block_size, qkv + (p->heads + h) * dim,
                    qkv + (p->heads + p->kv_heads + h) * dim, dim, bf16);
    }
}
static void rope_unit(const void *job, long unit) {
    const rows_job *j = job;
    for (long r = unit * j->per; r < MIN((unit + 1) * j->per, j->rows); r++)
        rope_token(j->p, j->l, j->w->qkv + r * j->w->ldq, j->s->positions[r], j->s->slots[r]);
}
static void rope_all(const void *job) {
    rows_job j = *(const rows_job *)job;
    j.per = j.rows;
    rope_unit(&j, 0);
}

static void pick_unit(const void *job, long unit) {
    const rows_job *j = job;
    const space *w = j->w;
    for (long r = unit * j->per; r < MIN((unit + 1) * j->per, j->rows); r++) {
        memcpy(w->x_rows + r * w->ldx, w->x + j->s->rows[r] * w->ldx, (size_t)j->p->hidden * 4);
        memcpy(row_at(w->a_rows, r, w->lda, j->narrow), row_at(w->a, j->s->rows[r], w->lda, j->narrow), (size_t)(j->p->heads * j->p->dim) * (j->narrow ? 2 : 4));
    }
}

static void final_unit(const void *job, long unit) {
    const rows_job *j = job;
    norm_unit(job, unit);
    if (j->s->hidden)
        for (long r = unit * j->per; r < MIN((unit + 1) * j->per, j->rows); r++)
            for (long i = 0; i < j->p->hidden; i++) store_as(j->s->hidden, r * j->p->hidden + i, load_as(j->a, r * j->w->lda + i, j->narrow), (int)j->p->bf16);
}

typedef struct {
    const float *logits;
    int32_t *out;
    long n;
} argmax_job;
static void argmax_unit(const void *job, long unit) {
    const argmax_job *j = job;
    j->out[unit] = argmax_row(j->logits + unit * j->n, j->n);
}

/* One thread's way through the step. */
static void step_thread(const program *p, const step *s, const space *w, team team, attention attn, long attn_units) {
    const int bf16 = (int)p->bf16, threads = team.threads;
    int n = 0; /* phase number: the same sequence on every thread */
    long rows = s->token_count;
    float *x = w->x;
    void *a = w->a;
#define UNITS(j) (((j).rows + (j).per - 1) / (j).per)
    rows_job norm = {.p = p, .s = s, .w = w, .x = x, .a = a, .norm = p->layers[0].attn_norm, .rows = rows, .per = rows <= FEW ? rows : 16,
                     .narrow = narrow_inputs(&p->layers[0].qkv, bf16)};
    norm.tap = tap_of(p, s, 0);
    phase_run(&team, n++, UNITS(norm), s->given ? given_unit : embed_unit, &norm, 0, 0);
    for (long i = 0; i < p->layers_count; i++) {
        const layer *l = &p->layers[i];
        const int final = i + 1 == p->layers_count, o_narrow = narrow_inputs(&l->o, bf16), up_narrow = narrow_inputs(&l->gate_up, bf16);
        const int down_narrow = narrow_inputs(&l->down, bf16);
        gemm qkv = {.w = &l->qkv, .a = a, .lda = w->lda, .rows = rows, .narrow = norm.narrow, .kind = TO_F32, .round = bf16, .out = w->qkv, .ldo = w->ldq};
        rows_job rope = {.p = p, .s = s, .w = w, .l = l, .rows = rows, .per = 4};
        phase_run(&team, n++, gemm_plan(&qkv, threads), gemm_unit, &qkv, rows <= 2 ? rope_all : 0, &rope);
        if (rows > 2) phase_run(&team, n++, UNITS(rope), rope_unit, &rope, 0, 0);
        if (final && s->row_count == 0) return;
        attn.k_cache = l->k_cache;
        attn.v_cache = l->v_cache;
        attn.k_scales = l->k_scales;
        attn.v_scales = l->v_scales;
        attn.window = l->window;
        attn.out_bf16 = o_narrow;
        phase_run(&team, n++, attn_units, attention_unit, &attn, 0, 0);
        if (final) {
            rows_job pick = {.p = p, .s = s, .w = w, .rows = s->row_count, .per = 16, .narrow = o_narrow};
            phase_run(&team, n++, UNITS(pick), pick_unit, &pick, 0, 0);
            rows = s->row_count;
            x = w->x_rows;
            a = w->a_rows;
        }
        gemm o = {.w = &l->o, .a = a, .lda = w->lda, .rows = rows, .narrow = o_narrow, .kind = TO_RESIDUAL, .round = bf16, .out = x, .ldo = w->ldx};
        norm = (rows_job){.p = p, .s = s, .w = w, .x = x, .a = a, .norm = l->mlp_norm, .rows = rows, .per = 16, .narrow = up_narrow};
        phase_run(&team, n++, gemm_plan(&o, threads), gemm_unit, &o, rows <= FEW ? norm_all : 0, &norm);
        if (rows > FEW) phase_run(&team, n++, UNITS(norm), norm_unit, &norm, 0, 0);
        norm.norm = final ? p->final_norm : l[1].attn_norm;
        norm.narrow = narrow_inputs(final ? &p->lm_head : &l[1].qkv, bf16);
        norm.tap = tap_of(p, s, i + 1);
        for (long r = 0; r < rows; r += MLP_ROWS) {
            long count = MIN(MLP_ROWS, rows - r);
            int tail = rows <= FEW && !final;
            gemm up = {.w = &l->gate_up, .a = row_at(a, r, w->lda, up_narrow), .lda = w->lda, .rows = count, .narrow = up_narrow, .kind = TO_GATED,
                       .round = bf16, .out = w->act, .out_bf16 = down_narrow, .ldo = w->ldi};
            gemm down = {.w = &l->down, .a = w->act, .lda = w->ldi, .rows = count, .narrow = down_narrow, .kind = TO_RESIDUAL, .round = bf16, .out = x + r * w->ldx, .ldo = w->ldx};
            phase_run(&team, n++, gemm_plan(&up, threads), gemm_unit, &up, 0, 0);
            phase_run(&team, n++, gemm_plan(&down, threads), gemm_unit, &down, tail ? norm_all : 0, &norm);
        }
        if (final)
            phase_run(&team, n++, UNITS(norm), final_unit, &norm, 0, 0);
        else if (rows > FEW)
            phase_run(&team, n++, UNITS(norm), norm_unit, &norm, 0, 0);
    }
    if (!s->logits && !s->greedy) return;
    float *logits = s->logits ? s->logits : w->logits;
    gemm head = {.w = &p->lm_head, .a = a, .lda = w->lda, .rows = rows, .narrow = norm.narrow, .kind = TO_F32, .round = 0, .out = logits, .ldo = p->vocab};
    phase_run(&team, n++, gemm_plan(&head, threads), gemm_unit, &head, 0, 0);
    if (s->greedy) {
        argmax_job best = {.logits = logits, .out = s->greedy, .n = p->vocab};
        phase_run(&team, n++, rows, argmax_unit, &best, 0, 0);
    }
#undef UNITS
}

static int inside(const int32_t *v, long n, long low, long high) {
    int bad = 0;
    for (long i = 0; i < n; i++) bad |= (v[i] < low) | (v[i] >= high);
    return !bad;
}

/* 0, or which index lies outside: 1 query rows, 2 lengths, 3 blocks. */
static int check_sequences(const int32_t *q_start, const int32_t *kv_len, const int32_t *tables, long sequences, long width, long tokens, long blocks, long block_size) {
    if (q_start[0] != 0 || q_start[sequences] != tokens) return 1;
    for (long r = 0; r < sequences; r++) {
        long rows = (long)q_start[r + 1] - q_start[r];
        if (rows < 0) return 1;
        if (kv_len[r] < rows || kv_len[r] > width * block_size) return 2;
        if (!inside(tables + r * width, (kv_len[r] + block_size - 1) / block_size, 0, blocks)) return 3;
    }
    return 0;
}

typedef struct {
    const program *p;
    const step *s;
    const space *w;
    attention attn;
    long units;
} step_job;
static void step_run(void *all) {
    const step_job *j = all;
    step_thread(j->p, j->s, j->w, (team){.phases = j->w->phases, .threads = (int)j->s->threads}, j->attn, j->units);
}

/* 0, or which index lies outside: 1..3 as above, 4 token ids, 5 positions, 6 slots, 7 rows. */
static int run_step(const program *p, const step *s) {
    int wrong = check_sequences(s->q_start, s->kv_len, s->tables, s->sequences, s->table_width, s->token_count, p->blocks, p->block_size);
    if (wrong) return wrong;
    if (!s->given && !inside(s->tokens, s->token_count, 0, p->embedding_rows)) return 4;
    if (!inside(s->positions, s->token_count, 0, p->table_rows)) return 5;
    if (!inside(s->slots, s->token_count, INT32_MIN, p->blocks * p->block_size)) return 6;
    if (!inside(s->rows, s->row_count, 0, s->token_count)) return 7;
    if (!inside(s->tap_layers, s->tap_count, 0, p->layers_count + (s->row_count <= s->token_count))) return 10;
    if (s->token_count == 0) return 0;
    space w = place(p, s);
    memset(w.phases, 0, (size_t)((char *)w.units - (char *)w.phases));
    attention attn = {
        .q = w.qkv, .ldq = w.ldq, .out = w.a, .ldo = w.lda, .cache_bf16 = (int)p->bf16, .round = (int)p->bf16, .tables = s->tables,
        .q_start = s->q_start, .kv_len = s->kv_len, .table_width = s->table_width, .sequences = s->sequences, .heads = p->heads,
        .kv_heads = p->kv_heads, .dim = p->dim, .block_size = p->block_size, .block_bytes = p->block_bytes, .kv_format = (int)p->kv_format,
        .scale = (float)p->scale, .ancestors = s->ancestors,
    };
    long units = attention_plan(&attn, w.units);
    step_job job = {.p = p, .s = s, .w = &w, .attn = attn, .units = units};
    share((int)s->threads, step_run, &job);
    return 0;
}

#endif
