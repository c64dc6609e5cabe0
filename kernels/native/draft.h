/* Prompt lookup; the definition is kernels/drafting/reference.py.
 *
 * What it is: one row a unit. Places are tried from the end of the history backwards, so that the first one with a length is the last in the history;
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

#endif
