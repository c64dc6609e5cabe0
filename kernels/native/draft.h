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
