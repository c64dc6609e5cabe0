/* The team: how the threads of one call share its phases, and the threads themselves.
 *
 * What it is: a *phase* is a number of independent units taken from a counter; it is over when all its units are done, not when all threads
 * have arrived. The thread that reports the last unit may do a short serial tail before the others go on. The caller starts at once and
 * never waits for a helper that has not begun: on cores shared with other processes a fork-join (OpenMP's) would wait a scheduler's
 * time slice for every late thread. Helpers are this library's own threads; they spin for a bounded time, then sleep in the kernel.
 * Which thread computes a unit never changes its result. A second caller at the same time works alone.
 * What it does not know: what a unit is.
 */
#ifndef PENSTOCK_TEAM_H
#define PENSTOCK_TEAM_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#else
#include <sched.h>
#endif

#define SPINS 2000 /* pauses before a waiter sleeps: 30..100 us */
#define HELPERS_MAX 255

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* A word that threads wait on: spin, then sleep until `wake`. */
typedef struct {
    atomic_int value, sleepers;
} gate_word;

static void word_wait_not(gate_word *w, int old) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&w->value, memory_order_acquire) != old) return;
        relax();
    }
    atomic_fetch_add(&w->sleepers, 1);
    while (atomic_load(&w->value) == old) {
#if defined(__linux__)
        syscall(SYS_futex, &w->value, FUTEX_WAIT_PRIVATE, old, 0, 0, 0);
#else
        sched_yield();
#endif
    }
    atomic_fetch_sub(&w->sleepers, 1);
}
static void word_set(gate_word *w, int value) {
    atomic_store(&w->value, value);
#if defined(__linux__)
    if (atomic_load(&w->sleepers)) syscall(SYS_futex, &w->value, FUTEX_WAKE_PRIVATE, INT32_MAX, 0, 0, 0);
#endif
}

/* The helpers. `state`: epoch in the upper half, CLOSED, and the number of helpers inside; a helper may enter only while it is open, and
 * the caller returns only when it is closed and empty, so that a job's memory outlives its users. */
#define CLOSED 0x10000u
static struct {
    pthread_mutex_t busy;
    pid_t owner; /* threads do not survive a fork */
    int helpers, wanted;
    void (*run)(void *);
    void *job;
    _Alignas(64) atomic_uint_fast64_t state;
    _Alignas(64) gate_word epoch, empty;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .state = CLOSED};

static void *helper(void *index) {
    const int me = (int)(intptr_t)index;
    int seen = 0;
    for (;;) {
        word_wait_not(&pool.epoch, seen);
        uint_fast64_t s = atomic_load(&pool.state);
        seen = (int)(s >> 32);
        while (!(s & CLOSED) && me < pool.wanted) {
            if (!atomic_compare_exchange_weak(&pool.state, &s, s + 1)) {
                seen = (int)(s >> 32);
                continue;
            }
            pool.run(pool.job);
            s = atomic_fetch_sub(&pool.state, 1) - 1;
            if ((s & CLOSED) && (s & 0xffffu) == 0) word_set(&pool.empty, (int)(s >> 32));
            break;
        }
        if (atomic_load(&pool.epoch.value) != seen) continue;
    }
    return 0;
}

/* Let up to `threads` threads, the caller among them, execute run(job), each once at most; returns when all who began have ended. */
static void share(int threads, void (*run)(void *), void *job) {
    if (threads <= 1 || pthread_mutex_trylock(&pool.busy)) {
        run(job);
        return;
    }
    if (pool.owner != getpid()) {
        pool.owner = getpid();
        pool.helpers = 0;
        atomic_store(&pool.epoch.sleepers, 0);
    }
    while (pool.helpers < threads - 1 && pool.helpers < HELPERS_MAX) {
        pthread_t thread;
        pthread_attr_t attr;
        sigset_t all, before;
        sigfillset(&all);
        pthread_attr_init(&attr);
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attr, 4 << 20);
        pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to Python's threads */
        int failed = pthread_create(&thread, &attr, helper, (void *)(intptr_t)pool.helpers);
        pthread_sigmask(SIG_SETMASK, &before, 0);
        pthread_attr_destroy(&attr);
        if (failed) break;
        pool.helpers++;
    }
    pool.run = run;
    pool.job = job;
    pool.wanted = threads - 1;
    const uint32_t epoch = (uint32_t)atomic_load(&pool.epoch.value) + 1;
    atomic_store(&pool.state, (uint64_t)epoch << 32);
    word_set(&pool.epoch, (int)epoch);
    run(job);
    uint_fast64_t s = atomic_fetch_or(&pool.state, CLOSED) | CLOSED;
    while (s & 0xffffu) {
        int old = atomic_load(&pool.empty.value);
        s = atomic_load(&pool.state);
        if ((s & 0xffffu) && old != (int)epoch) word_wait_not(&pool.empty, old);
        s = atomic_load(&pool.state);
    }
    pthread_mutex_unlock(&pool.busy);
}

typedef struct {
    _Alignas(64) atomic_long next;
    _Alignas(64) atomic_long done;
    gate_word ready;
} phase;

typedef struct {
    phase *phases; /* zeroed before the call */
    int threads;
} team;

typedef void (*unit_fn)(const void *job, long unit);

/* Run `units` of `fn`; `tail` (or NULL) runs once after the last of them and before anybody goes on. */
static void phase_run(const team *t, int index, long units, unit_fn fn, const void *job, void (*tail)(const void *), const void *tail_job) {
    if (t->threads == 1) {
        for (long u = 0; u < units; u++) fn(job, u);
        if (tail) tail(tail_job);
        return;
    }
    phase *p = &t->phases[index];
    long mine = 0;
    for (long u; (u = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed)) < units; mine++) fn(job, u);
    if (mine && atomic_fetch_add_explicit(&p->done, mine, memory_order_acq_rel) + mine == units) {
        if (tail) tail(tail_job);
        word_set(&p->ready, 1);
        return;
    }
    word_wait_not(&p->ready, 0);
}

/* One phase as a call of its own. */
typedef struct {
    atomic_long next;
    long units;
    unit_fn fn;
    const void *job;
} alone;
static void alone_run(void *all) {
    alone *a = all;
    for (long u; (u = atomic_fetch_add_explicit(&a->next, 1, memory_order_relaxed)) < a->units;) a->fn(a->job, u);
}
static void run_alone(int threads, long units, unit_fn fn, const void *job) {
    alone a = {.units = units, .fn = fn, .job = job};
    share(units <= 1 ? 1 : threads, alone_run, &a);
}

#endif
