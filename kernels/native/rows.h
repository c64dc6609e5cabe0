/* Row operations: normalisation, activation, rotary embedding and the cache's panel order.
 *
 * What it is: functions on one row, in float32 with the roundings of the model's dtype (`bf16` != 0: round to bfloat16 where Hugging Face's
 * modules would), used alike by the separate operations and by the decoder program, so that both give the same bits.
 * What it does not know: batches, threads.
 */
#ifndef PENSTOCK_ROWS_H
#define PENSTOCK_ROWS_H

#include "vec.h"

INLINE vf vrounded(vf v, int bf16) { return bf16 ? vround_bf16(v) : v; }
INLINE float rounded(float x, int bf16) { return bf16 ? round_bf16(x) : x; }

/* y = w * round(x / sqrt(mean(x^2) + eps)); x and y rows (may be one), n elements, float32 or, if `narrow`, y bfloat16; 16 partial sums, folded as a
 * fixed tree. */
static void norm_row(const float *x, const float *w, void *y, long n, float eps, int bf16, int narrow) {
    vf sum[16 / VL];
    for (int j = 0; j < 16 / VL; j++) sum[j] = vset(0.0f);
    long i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16 / VL; j++) {
            vf v = vload(x + i + j * VL);
            sum[j] = vfma(v, v, sum[j]);
        }
    if (i < n) {
        float tail[16] = {0};
        memcpy(tail, x + i, (size_t)(n - i) * 4);
        for (int j = 0; j < 16 / VL; j++) {
            vf v = vload(tail + j * VL);
            sum[j] = vfma(v, v, sum[j]);
        }
    }
    vf all = sum[0];
    for (int j = 1; j < 16 / VL; j++) all += sum[j];
    float inv = 1.0f / sqrtf(hsum(all) / (float)n + eps);
    for (i = 0; i + VL <= n; i += VL) vstore_as(y, i, vrounded(vrounded(vload(x + i) * inv, bf16) * vload(w + i), bf16), narrow);
    for (; i < n; i++) store_as(y, i, rounded(rounded(x[i] * inv, bf16) * w[i], bf16), narrow);
}

enum { ACT_SILU = 0, ACT_GELU_TANH = 1, ACT_GELU = 2 };

/* round(round(act(g)) * u). gelu_tanh(g) = g * sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3)), which has no cancellation. */
INLINE vf gate(vf g, vf u, int kind, int bf16) {
    vf y;
    if (kind == ACT_SILU) {
        y = vlogistic(g, g);
    } else if (kind == ACT_GELU_TANH) {
        const vf t = vset(1.5957691216057308f) * vfma(vset(0.044715f) * (g * g), g, g);
        y = vlogistic(g, t);
    } else {
        for (int i = 0; i < VL; i++) y[i] = 0.5f * g[i] * erfcf(g[i] * -0.70710678118654752f);
    }
    return vrounded(vrounded(y, bf16) * u, bf16);
}

/* Rotate one head in place: x[:h] cos - x[h:2h] sin, x[h:2h] cos + x[:h] sin. */
static void rotate_head(float *x, const float *cos_sin, long half, int bf16) {
    const float *cosine = cos_sin, *sine = cos_sin + half;
    float *low = x, *high = x + half;
    long i = 0;
    for (; i + VL <= half; i += VL) {
        vf a = vload(low + i), b = vload(high + i), c = vload(cosine + i), s = vload(sine + i);
        vstore(low + i, vrounded(a * c - b * s, bf16));
        vstore(high + i, vrounded(b * c + a * s, bf16));
    }
    for (; i < half; i++) {
        float a = low[i], b = high[i], c = cosine[i], s = sine[i];
        low[i] = rounded(a * c - b * s, bf16);
        high[i] = rounded(b * c + a * s, bf16);
    }
}

/* Write one head's key and value (rounded float32) at `offset` of a (block, head) of the cache in panel order (see attention/layout.py). */
static void write_cache(void *k_head, void *v_head, long offset, const float *k, const float *v, long dim, int bf16) {
    long group = offset / 16 * 16 * dim, r = offset % 16;
    if (bf16) {
        uint16_t *kc = (uint16_t *)k_head + group + r * 2, *vc = (uint16_t *)v_head + group + (r / 2) * 32 + (r & 1);
        for (long d = 0; d < dim; d += 2) {
            kc[d * 16] = upper(k[d]);
            kc[d * 16 + 1] = upper(k[d + 1]);
        }
        for (long d = 0; d < dim; d++) vc[d / 16 * 256 + d % 16 * 2] = upper(v[d]);
    } else {
        float *kc = (float *)k_head + group + r, *vc = (float *)v_head + group + r * 16;
        for (long d = 0; d < dim; d++) kc[d * 16] = k[d];
        for (long d = 0; d < dim; d++) vc[d / 16 * 256 + d % 16] = v[d];
    }
}

/* First maximum of a row; -1 when the row holds NaN or +inf or nothing above -inf. */
static int32_t argmax_row(const float *x, long n) {
    vf best = vset(-INFINITY);
    vu bad = vuset(0);
    long i = 0;
    for (; i + VL <= n; i += VL) {
        vf v = vload(x + i);
        best = vmax(v, best);
        bad |= (vu)(v != v);
    }
    float top = hmax(best);
    for (int j = 0; j < VL; j++)
        if (bad[j]) return -1;
    for (; i < n; i++) {
        if (x[i] != x[i]) return -1;
        top = x[i] > top ? x[i] : top;
    }
    if (isinf(top)) return -1;
    for (i = 0; i + VL <= n; i += VL) {
        vu hit = (vu)(vload(x + i) == top);
        for (int j = 0; j < VL; j += 4)
            if (hit[j] | hit[j + 1] | hit[j + 2] | hit[j + 3])
                for (int l = j; l < j + 4; l++)
                    if (hit[l]) return (int32_t)(i + l);
    }
    for (; i < n; i++)
        if (x[i] == top) return (int32_t)i;
    return -1;
}

#endif
