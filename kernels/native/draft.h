/* Drafts: checking them, putting them behind, and prompt lookup; the definitions are kernels/drafting/reference.py.
 *
 * What it is: of prompt lookup one row is a unit. Places are tried from the end of the history backwards, so that the first one with a length is the last in the history;
 * most fail at their first comparison.
 * What it does not know: slots' owners, draws.
 */
#ifndef PENSTOCK_DRAFT_H
#define PENSTOCK_DRAFT_H

#include <stdint.h>

typedef struct {
    const int32_t *history, *slots, *ends;
    int32_t *out;
    long width, shortest, longest, count;
} prompt_lookup;

static void lookup_unit(const void *job, long row) {
    const prompt_lookup *j = job;
    int32_t *out = j->out + row * j->count;
    for (long k = 0; k < j->count; k++) out[k] = -1;
    if (j->slots[row] < 0) return;
    const long end = j->ends[row];
    const int32_t *known = j->history + j->slots[row] * j->width, *last = known + end - 1;
    long best = j->shortest - 1, source = -1;
    for (long at = end - 2; at >= best; at--) {
        if (known[at] != *last || (best > 0 && known[at - best] != last[-best])) continue;
        const long most = at + 1 < j->longest ? at + 1 : j->longest;
        long fits = 1;
        while (fits < most && known[at - fits] == last[-fits]) fits++;
        if (fits > best) {
            best = fits;
            source = at + 1;
            if (best == j->longest) break;
        }
    }
    if (source < 0) return;
    for (long k = 0; k < j->count; k++) out[k] = source + k < end ? known[source + k] : out[source + k - end];
}

/* counts [rows], kept [bounds[rows]]. */
static void verify_rows(const int32_t *tokens, const int32_t *slots, const int32_t *positions, const int32_t *bounds, long rows, int32_t *history, long width,
                        int32_t *counts, int32_t *kept) {
    for (long r = 0; r < rows; r++) {
        const long first = bounds[r], drawn = bounds[r + 1] - first;
        int32_t *there = slots[r] < 0 ? 0 : history + slots[r] * width;
        const int32_t *mine = tokens + first;
        long stop = 0;
        while (stop < drawn - 1 && there && positions[r] + stop < width && mine[stop] == there[positions[r] + stop]) stop++;
        const long count = mine[stop] < 0 && stop > 0 ? stop : stop + 1, at = positions[r] + count - 1;
        counts[r] = (int32_t)count;
        for (long j = 0; j < drawn; j++) kept[first + j] = j < count ? mine[j] : -1;
        if (there && at < width) there[at] = mine[count - 1] < 0 ? 0 : mine[count - 1];
    }
}

/* counts [rows], kept [bounds[rows]], sources [rows][deepest]. Node c of a row stands at positions[r] - 1 + c; parents come before their children. */
static void verify_trees(const int32_t *tokens, const int32_t *slots, const int32_t *positions, const int32_t *bounds, long rows, int32_t *history, long width,
                         const int32_t *parents, long deepest, int32_t *counts, int32_t *kept, int32_t *sources) {
    for (long r = 0; r < rows; r++) {
        const long first = bounds[r], drawn = bounds[r + 1] - first, root = positions[r] - 1L;
        int32_t *there = slots[r] < 0 ? 0 : history + slots[r] * width, *from = sources + r * deepest;
        for (long j = 0; j < drawn; j++) kept[first + j] = -1;
        for (long i = 0; i < deepest; i++) from[i] = -1;
        long node = 0, count = 0;
        for (;;) {
            const int32_t token = tokens[first + node];
            if (token < 0 && count > 0) { /* the row ends before a bad draw */
                from[count - 1] = -1;
                break;
            }
            kept[first + node] = token;
            long child = node + 1;
            while (child < drawn && !(parents[child] == node && there && root + child < width && there[root + child] == token)) child++;
            if (there && positions[r] + count < width) there[positions[r] + count] = token < 0 ? 0 : token;
            count++;
            if (token < 0 || child >= drawn || count > deepest) break;
            from[count - 1] = (int32_t)child;
            node = child;
        }
        counts[r] = (int32_t)count;
    }
}

static void put_rows(int32_t *drafts, const int32_t *slots, const int32_t *ends, long rows, long count, int32_t *history, long width, long vocab) {
    for (long r = 0; r < rows; r++) {
        int32_t *mine = drafts + r * count;
        long k = 0;
        for (; k < count && mine[k] >= 0 && mine[k] < vocab && ends[r] + k < width; k++)
            if (slots[r] >= 0) history[slots[r] * width + ends[r] + k] = mine[k];
        for (; k < count; k++) mine[k] = -1;
    }
}

#endif
