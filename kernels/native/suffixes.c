/* Suffix automata over tokens in flat arrays; the definitions are kernels/suffixes/reference.py. A library of its own, which is compiled in a second: hosts of a GPU need no other.
 *
 * What it is: automata (Blumer et al., 1985), and rows that each add to one of their own and are followed in another one (or none). A state's edges are a chain; where they are more
 * than FEW, a table of all automaton's such edges finds them: most states have one or two.
 * What it does not know: whose texts they are, how long they live.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { FEW = 4, BREAK = -1 };
static const int64_t MOST = 1 << 29; /* tokens: states and edges are numbered in 32 bits */

typedef struct {
    int32_t length, link, first, edges, degree;
} state;
typedef struct {
    int32_t from, token, target, next;
} edge;
typedef struct {
    state *states;
    edge *edges;
    int32_t *tokens, *table; /* of edges + 1; 0: nothing there */
    int64_t state_count, state_room, edge_count, edge_room, token_count, token_room, table_size, table_used;
    int32_t last;
} automaton;

static int room(void **array, int64_t *has, int64_t wanted, size_t size) {
    if (wanted <= *has) return 0;
    int64_t more = *has ? 2 * *has : 32;
    while (more < wanted) more *= 2;
    void *grown = realloc(*array, (size_t)more * size);
    if (!grown) return -1;
    *array = grown;
    *has = more;
    return 0;
}

static uint64_t slot_of(const automaton *a, int32_t from, int32_t token) {
    const uint64_t key = ((uint64_t)(uint32_t)from << 32 | (uint32_t)token) * 0x9E3779B97F4A7C15ull;
    return (key ^ key >> 32) & (uint64_t)(a->table_size - 1);
}

static void put(automaton *a, int32_t at) {
    uint64_t slot = slot_of(a, a->edges[at].from, a->edges[at].token);
    while (a->table[slot]) slot = (slot + 1) & (uint64_t)(a->table_size - 1);
    a->table[slot] = at + 1;
    a->table_used++;
}

/* The table twice as large. */
static int widen(automaton *a) {
    const int64_t size = a->table_size ? 2 * a->table_size : 64;
    int32_t *table = calloc((size_t)size, sizeof *table);
    if (!table) return -1;
    free(a->table);
    a->table = table;
    a->table_size = size;
    a->table_used = 0;
    for (int64_t at = 0; at < a->edge_count; at++)
        if (a->states[a->edges[at].from].degree > FEW) put(a, (int32_t)at);
    return 0;
}

/* The edge of a state for a token, or -1. */
static int32_t look(const automaton *a, int32_t from, int32_t token) {
    const state *s = a->states + from;
    if (s->degree <= FEW) {
        int32_t at = s->edges;
        while (at >= 0 && a->edges[at].token != token) at = a->edges[at].next;
        return at;
    }
    for (uint64_t slot = slot_of(a, from, token); a->table[slot]; slot = (slot + 1) & (uint64_t)(a->table_size - 1)) {
        const int32_t at = a->table[slot] - 1;
        if (a->edges[at].from == from && a->edges[at].token == token) return at;
    }
    return -1;
}

static int connect(automaton *a, int32_t from, int32_t token, int32_t target) {
    if (room((void **)&a->edges, &a->edge_room, a->edge_count + 1, sizeof *a->edges)) return -1;
    if (2 * (a->table_used + FEW + 1) > a->table_size && a->states[from].degree >= FEW && widen(a)) return -1;
    const int32_t at = (int32_t)a->edge_count++;
    state *s = a->states + from;
    a->edges[at] = (edge){from, token, target, s->edges};
    s->edges = at;
    if (++s->degree == FEW + 1)
        for (int32_t mine = at; mine >= 0; mine = a->edges[mine].next) put(a, mine);
    else if (s->degree > FEW)
        put(a, at);
    return 0;
}

static int32_t fresh(automaton *a, int32_t length, int32_t first) {
    a->states[a->state_count] = (state){length, 0, first, -1, 0};
    return (int32_t)a->state_count++;
}

/* Amortised in constant time. */
static int add(automaton *a, int32_t token) {
    if (a->token_count >= MOST || room((void **)&a->states, &a->state_room, a->state_count + 2, sizeof *a->states) ||
        room((void **)&a->tokens, &a->token_room, a->token_count + 1, sizeof *a->tokens))
        return -1;
    const int32_t made = fresh(a, a->states[a->last].length + 1, (int32_t)a->token_count);
    a->tokens[a->token_count++] = token;
    int32_t at = a->last, found = -1;
    a->last = made;
    for (; at >= 0 && (found = look(a, at, token)) < 0; at = a->states[at].link)
        if (connect(a, at, token, made)) return -1;
    if (at < 0) return 0; /* its link is the root */
    const int32_t target = a->edges[found].target, length = a->states[at].length + 1;
    if (a->states[target].length == length) {
        a->states[made].link = target;
        return 0;
    }
    const int32_t copy = fresh(a, length, a->states[target].first);
    for (int32_t mine = a->states[target].edges; mine >= 0; mine = a->edges[mine].next)
        if (connect(a, copy, a->edges[mine].token, a->edges[mine].target)) return -1;
    a->states[copy].link = a->states[target].link;
    a->states[made].link = a->states[target].link = copy;
    for (; at >= 0 && (found = look(a, at, token)) >= 0 && a->edges[found].target == target; at = a->states[at].link) a->edges[found].target = copy;
    return 0;
}

/* From the longest match of a text so far to that with one token more. */
static void walk(const automaton *a, int32_t *at, int32_t *matched, int32_t token) {
    int32_t here = *at, length = *matched, found = -1;
    while (here && length <= a->states[a->states[here].link].length) here = a->states[here].link; /* states were split since */
    while ((found = look(a, here, token)) < 0 && here) {
        here = a->states[here].link;
        length = a->states[here].length;
    }
    *at = found < 0 ? 0 : a->edges[found].target;
    *matched = found < 0 ? 0 : length + 1;
}

EXPORT void ps_suffix_free(automaton *a) {
    if (!a) return;
    free(a->states);
    free(a->edges);
    free(a->tokens);
    free(a->table);
    free(a);
}

/* NULL: no memory. */
EXPORT automaton *ps_suffix_new(void) {
    automaton *a = calloc(1, sizeof *a);
    if (!a) return 0;
    if (room((void **)&a->states, &a->state_room, 2, sizeof *a->states)) {
        ps_suffix_free(a);
        return 0;
    }
    a->states[fresh(a, 0, -1)].link = -1;
    return a;
}

/* -1: no memory; the automaton can only be freed then. */
EXPORT int64_t ps_suffix_add(automaton *a, const int32_t *tokens, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (add(a, tokens[i])) return -1;
    return 0;
}

EXPORT int64_t ps_suffix_count(const automaton *a) { return a->token_count; }

EXPORT int64_t ps_suffix_bytes(const automaton *a) {
    return a->state_room * (int64_t)sizeof *a->states + a->edge_room * (int64_t)sizeof *a->edges + (a->token_room + a->table_size) * (int64_t)sizeof(int32_t);
}

EXPORT void ps_suffix_copy(const automaton *a, int64_t first, int32_t *to) {
    memcpy(to, a->tokens + first, (size_t)(a->token_count - first) * sizeof *to);
}

/* Rows: own, past, states and matched are columns of `room` rows; a call is about `count` of them. -2: one of them has not begun; -3: counts say another number of tokens than there are. */
typedef struct {
    automaton **own, **past;
    int32_t *states, *matched;
    int64_t room;
} readers;

static int begun(const readers *r, const int64_t *rows, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (rows[i] < 0 || rows[i] >= r->room || !r->own[rows[i]]) return 0;
    return 1;
}

/* They go on with counts[i] of the `size` tokens each. */
EXPORT int64_t ps_suffix_follow(const readers *r, const int64_t *rows, const int32_t *counts, const int32_t *tokens, int64_t count, int64_t size) {
    if (!begun(r, rows, count)) return -2;
    for (int64_t i = 0; i < count; i++) {
        if (counts[i] < 0) return -3;
        size -= counts[i];
    }
    if (size) return -3;
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = rows[i];
        for (int32_t k = 0; k < counts[i]; k++, tokens++) {
            if (add(r->own[row], *tokens)) return -1;
            if (r->past[row]) walk(r->past[row], r->states + row, r->matched + row, *tokens);
        }
    }
    return 0;
}

/* counts [count], found: so many of each, one behind the other; how many there are. */
EXPORT int64_t ps_suffix_propose(const readers *r, const int64_t *rows, const int32_t *most, int64_t count, int64_t least, int64_t factor, int32_t *counts, int32_t *found) {
    if (!begun(r, rows, count)) return -2;
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = rows[i];
        const automaton *source = r->own[row];
        int32_t at = source->states[source->last].link; /* the longest suffix that was there before */
        int64_t length = at > 0 ? source->states[at].length : 0;
        if (r->past[row] && r->matched[row] > length) {
            source = r->past[row];
            at = r->states[row];
            length = r->matched[row];
        }
        counts[i] = 0;
        if (length < least || length == 0) continue;
        const int32_t *after = source->tokens + source->states[at].first + 1;
        int64_t wanted = source->token_count - source->states[at].first - 1;
        if (wanted > most[i]) wanted = most[i];
        if (wanted > factor * length) wanted = factor * length;
        int64_t k = 0;
        for (; k < wanted && after[k] != BREAK; k++) found[total++] = after[k];
        counts[i] = (int32_t)k;
    }
    return total;
}
