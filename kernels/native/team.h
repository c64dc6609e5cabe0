/* The team: how the threads of one call share its phases.
 *
 * What it is: a *phase* is a number of independent units taken from a counter; it is over when all its units are done, not when all threads
 * have arrived, so a thread that the system has not scheduled holds nobody up unless it holds a unit. The thread that reports the last unit
 * may do a short serial tail before the others go on. Waiting spins for a bounded time, then sleeps in the kernel: the cores are shared
 * with other processes. Which thread computes a unit never changes its result.
 * What it does not know: what a unit is.
 */
#ifndef PENSTOCK_TEAM_H
#define PENSTOCK_TEAM_H

#include <omp.h>
#include <stdatomic.h>
#include <stdint.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#define SPINS 3000 /* pauses before a waiter sleeps: 40..120 us */

typedef struct {
    _Alignas(64) atomic_long next;
    _Alignas(64) atomic_long done;
    atomic_int ready, sleepers;
} phase;

typedef struct {
    phase *phases; /* zeroed before the call */
    int threads;
} team;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void phase_wait(phase *p) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&p->ready, memory_order_acquire)) return;
        relax();
    }
    atomic_fetch_add(&p->sleepers, 1);
    while (!atomic_load(&p->ready)) {
#if defined(__linux__)
        syscall(SYS_futex, &p->ready, FUTEX_WAIT_PRIVATE, 0, 0, 0, 0);
#else
        sched_yield();
#endif
    }
}

static void phase_release(phase *p) {
    atomic_store(&p->ready, 1);
#if defined(__linux__)
    if (atomic_load(&p->sleepers)) syscall(SYS_futex, &p->ready, FUTEX_WAKE_PRIVATE, INT32_MAX, 0, 0, 0);
#endif
}

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
        phase_release(p);
        return;
    }
    phase_wait(p);
}

/* One phase as a call of its own. */
static void run_alone(int threads, long units, unit_fn fn, const void *job) {
    if (threads <= 1 || units <= 1) {
        for (long u = 0; u < units; u++) fn(job, u);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long u = 0; u < units; u++) fn(job, u);
}

#endif
