#define _GNU_SOURCE
#include "park.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "atomics.h"
#include "attend.h"
#include "clock.h"
#include "completions.h"
#include "ring.h"
#include "wake.h"

/* How long a loop waits to be taken: longer than whoever halts it needs, and that one may have been held up. */
#define PARK_NS INT64_C(20000000)

/* Wait for `state` to be another than `expected`; may return early. */
static void wait_for_state(const struct ring *ring, uint32_t expected, int64_t ns)
{
    struct timespec most = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};

    syscall(SYS_futex, &ring->state, FUTEX_WAIT_PRIVATE, expected, &most, NULL, 0);
}

static void tell_state(const struct ring *ring)
{
    syscall(SYS_futex, &ring->state, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

int park(struct ring *ring)
{
    uint32_t asleep = RING_ASLEEP;
    int64_t until = now_ns() + PARK_NS, left = PARK_NS;

    if (load_strict(ring->stop) != STOP_PARK)
        return 0;
    give_messages(ring);
    store_strict(ring->state, RING_ASLEEP);
    tell_state(ring);
    for (; load_strict(ring->state) == RING_ASLEEP && left > 0; left = until - now_ns())
        wait_for_state(ring, RING_ASLEEP, left);
    return !__atomic_compare_exchange_n(&ring->state, &asleep, RING_RUNNING, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

void ring_revoke(struct ring *ring)
{
    store_strict(ring->stop, STOP_RETURN);
    wake(ring);
}

int ring_take(struct ring *ring)
{
    uint32_t asleep = RING_ASLEEP;

    return __atomic_compare_exchange_n(&ring->state, &asleep, RING_TAKEN, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

void ring_halt(struct ring *ring)
{
    store_strict(ring->stop, STOP_PARK);
    wake(ring);
}

void ring_await(const struct ring *ring, int64_t ns)
{
    int64_t until = now_ns() + ns;

    for (; load_strict(ring->state) == RING_RUNNING && ns > 0; ns = until - now_ns())
        wait_for_state(ring, RING_RUNNING, ns);
}

void ring_end(struct ring *ring)
{
    if (load_strict(ring->state) != RING_TAKEN)
        store_strict(ring->state, RING_AWAY);
    tell_state(ring); /* a loop that is parked goes on */
    ring_mute(ring);
}
