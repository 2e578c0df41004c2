#define _GNU_SOURCE
#include "run.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "atomics.h"
#include "attend.h"
#include "clock.h"
#include "completions.h"
#include "doorbells.h"
#include "execute.h"
#include "marks.h"
#include "nbd.h"
#include "park.h"
#include "prp.h"
#include "slots.h"
#include "wake.h"

/* Completions of quick commands are announced together, but none waits longer for that. */
#define SIGNAL_AFTER_NS 30000

/* After so many busy waits in vain, one of so many is tried. */
#define SPIN_MISSES 4
#define SPIN_SELDOM 8
/* A long busy wait leaves the processor to others, if there are any. */
#define SPIN_ALONE_NS 20000
/* The longest one where somebody else looks for the loop at intervals only. */
#define SPIN_PAGE_NS 300000

int ring_init(struct ring *ring)
{
    memset(ring, 0, sizeof *ring);
    ring->interrupt_fd = -1;
    ring->uring.fd = -1;
    ring->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ring->wake_fd < 0)
        return errno;
    return pthread_mutex_init(&ring->signalling, NULL);
}

void ring_destroy(struct ring *ring)
{
    uring_close(&ring->uring);
    free(ring->slots);
    if (ring->wake_fd >= 0)
        close(ring->wake_fd);
    ring->wake_fd = -1;
    pthread_mutex_destroy(&ring->signalling);
}

int ring_begin(struct ring *ring)
{
    ring->last_region = ring->fetched = ring->executing = ring->unsignalled = ring->owed = 0;
    ring->in_flight = ring->failed = ring->unmarked_count = ring->marking_count = ring->marked = 0;
    for (uint32_t i = 0; i < RING_SLOTS; i++) {
        ring->free_slots[i] = i;
        if (ring->slots) {
            ring->slots[i].failed = 0;
            ring->slots[i].nbd = NULL;
        }
    }
    ring->free_count = RING_SLOTS;
    ring->announced = ring->cq_tail;
    ring->announced_at = 0;
    ring->completions = region_at(ring, ring->cq_address, (uint64_t)ring->cq_size * CQE_SIZE, 1);
    ring->completions_written = written_at(ring, ring->cq_address);
    return ring->completions != NULL;
}

/* The entry at the head is fetched. */
static void advance(struct ring *ring)
{
    uint32_t head = ring->sq_head + 1;

    store(ring->sq_head, head == ring->sq_size ? 0 : head);
    store(ring->fetched, ring->fetched + 1);
}

/* What a slot had under way has ended. Go on where there is more to do; a success is posted, the rest is for Python. */
static void settle(struct ring *ring, uint64_t index, int64_t result)
{
    struct ring_slot *slot = &ring->slots[index];
    int is_read = slot->sqe[0] == OPCODE_READ, is_done = result >= 0 && (uint64_t)result == slot->length;

    if (is_done && slot_next(ring, slot))
        return;
    if (is_done)
        slot_count(ring, slot);
    if (is_done && is_read && ring->marks) {
        ring->unmarked[ring->unmarked_count++] = (uint32_t)index;
        return;
    }
    if (is_read && ring->tracks) /* of one that failed some may be there */
        note_all(ring, slot->addresses, slot->iovecs, slot->count);
    if (is_done) {
        post_slot(ring, (uint32_t)index);
    } else {
        store(ring->in_flight, ring->in_flight - 1);
        slot_fail(ring, slot, (int32_t)result);
    }
}

/* Take what has ended at disks that take their time; return whether there was any. */
static int collect(struct ring *ring)
{
    uint64_t index;
    int32_t result;
    int64_t outcome;
    int was_any = 0;

    while (uring_reap(&ring->uring, &index, &result)) {
        if (index == URING_WAKE) {
            clear_wake(ring);
            continue;
        }
        was_any = 1;
        settle(ring, index, result);
    }
    for (uint32_t i = 0; i < ring->nbd_count; i++) {
        struct nbd *nbd = &ring->nbds[i];
        int is_more;

        do {
            is_more = nbd_receive(ring, nbd);
            while (nbd_reap(ring, nbd, &index, &outcome)) {
                was_any = 1;
                settle(ring, index, outcome);
            }
        } while (is_more);
    }
    return was_any;
}

/* Wait as `doze` does, and until something can be received or sent, or has ended at a file. */
static void wait_for_servers(struct ring *ring)
{
    struct pollfd wanted[1 + RING_NBDS] = {{.fd = ring->uring.fd, .events = POLLIN}};

    doze_with(ring, wanted, 1 + nbd_poll(ring, wanted + 1));
}

/* Start what is prepared, and wait for something to end; what cannot be started is for Python. */
static void submit(struct ring *ring, int and_wait)
{
    int at_servers = and_wait && nbd_in_flight(ring), is_failed;
    uint64_t index;

    nbd_send_all(ring);
    is_failed = and_wait && !at_servers ? uring_submit_and_wait(&ring->uring) : uring_submit(&ring->uring);
    if (!is_failed) {
        if (at_servers)
            wait_for_servers(ring);
        return;
    }
    while (uring_drop(&ring->uring, &index)) {
        store(ring->in_flight, ring->in_flight - 1);
        slot_fail(ring, &ring->slots[index], 0);
    }
}

/* Run `count` commands from the head; 0: the one that is at the head now is for Python. */
static int run_batch(struct ring *ring, uint32_t count)
{
    struct sqe batch[RING_BATCH];
    uint64_t from = ring->sq_address + (uint64_t)ring->sq_head * SQE_SIZE;
    const void *entries = region_at(ring, from, (uint64_t)count * SQE_SIZE, 0);

    if (!entries)
        return 0;
    memcpy(batch, entries, (size_t)count * SQE_SIZE);
    for (uint32_t i = 0; i < count; i++) {
        enum outcome outcome;

        if (load(ring->stop))
            return 1;
        store(ring->executing, 1);
        outcome = execute(ring, &batch[i]);
        store(ring->executing, 0);
        if (outcome == FOR_PYTHON)
            return 0;
        advance(ring);
        if (outcome == STARTED)
            continue;
        if (ring->interrupt && i + 1 < count) {
            int64_t now = now_ns();

            if (!ring->unsignalled)
                ring->unsignalled_since = now;
            post(ring, batch[i].cid);
            if (now - ring->unsignalled_since > SIGNAL_AFTER_NS)
                announce_unless_expected(ring);
        } else {
            post(ring, batch[i].cid);
        }
    }
    return 1;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint32_t at_disks(const struct ring *ring)
{
    return ring->in_flight - ring->unmarked_count - ring->marking_count;
}

/* Look for work for a while; return whether there is some. Where that is in vain it is tried seldom: how soon the next
 * command would have come cannot be known from a sleep, which itself takes long to end. */
static int spin(struct ring *ring)
{
    int64_t since, waited = 0, longest = is_page(ring) ? SPIN_PAGE_NS : ring->spin_ns;

    /* With a page nobody wakes the loop soon: it is always worth it. */
    if (!ring->spin_ns || (!is_page(ring) && ring->misses >= SPIN_MISSES && ++ring->idles % SPIN_SELDOM))
        return 0;
    submit(ring, 0);
    since = now_ns();
    do {
        if (waited > SPIN_ALONE_NS) {
            if (is_reader(ring))
                read_doorbells(ring);
            sched_yield();
        }
        for (int i = 0; i < 64; i++) {
            if (load_strict(ring->stop) || !look_at_both(ring) || available(ring) ||
                (at_disks(ring) && uring_has_ended(&ring->uring))) {
                ring->misses = 0;
                return 1;
            }
            relax();
        }
        if (nbd_has_news(ring)) {
            ring->misses = 0;
            return 1;
        }
        announce_unless_expected(ring);
        waited = now_ns() - since;
    } while (waited < longest);
    ring->misses++;
    return 0;
}

/* Sleep until somebody rings or revokes; 0: the ring was taken back meanwhile. Asleep, guest memory is out of bounds. */
static int sleep_well(struct ring *ring)
{
    uint32_t asleep = RING_ASLEEP;

    store_strict(ring->dozing, 1);
    while (load_strict(ring->state) == RING_ASLEEP && !load_strict(ring->rung) && !load_strict(ring->stop))
        doze(ring);
    store_strict(ring->dozing, 0);
    return __atomic_compare_exchange_n(&ring->state, &asleep, RING_RUNNING, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* Start what is prepared, and wait for a command at a disk to end, for what is being marked, or, unless `is_ending`, for the host. The pair cannot
 * be taken meanwhile. */
static void wait_for_flight(struct ring *ring, int is_ending)
{
    int is_stopped, has_news, waits;

    if (!nbd_in_flight(ring)) /* only then that wait is for nothing else */
        give_messages(ring);
    store_strict(ring->dozing, 1);
    is_stopped = (int)load_strict(ring->stop);
    has_news = (at_disks(ring) && uring_has_ended(&ring->uring)) || (ring->marking_count && load_strict(ring->marked));
    waits = !has_news && (is_ending ? !is_stopped || at_disks(ring) : !is_stopped && !load_strict(ring->rung));
    if (at_disks(ring))
        submit(ring, waits);
    else if (waits)
        doze(ring);
    store_strict(ring->dozing, 0);
    disarm(ring);
}

/* Run commands until there is a reason to come back. Without `may_wait` having nothing to do is one: the ring is lent
 * still, and asleep. */
static enum ring_reason run(struct ring *ring, int may_wait, int may_attend)
{
    uint32_t asleep = RING_ASLEEP;
    int was_busy = 0, is_odd = 0;

    __atomic_compare_exchange_n(&ring->state, &asleep, RING_RUNNING, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    if (load_strict(ring->state) != RING_RUNNING)
        return RING_GONE;
    for (;;) {
        uint32_t count = 0, prepared = ring->uring.pending + nbd_unsent(ring);

        store_strict(ring->rung, 0);
        if (at_disks(ring) && collect(ring))
            was_busy = 1;
        post_marked(ring);
        if (!is_odd && !ring->failed && !load_strict(ring->stop)) {
            is_odd = !look_at_both(ring);
            count = is_odd ? 0 : available(ring);
            if (count)
                leave_messages(ring);
            if (count)
                is_odd = !run_batch(ring, count);
        }
        if (prepared) /* what is prepared now starts with the next wait, or after one more batch */
            submit(ring, 0);
        if (load_strict(ring->stop))
            give_up_marks(ring);
        if (is_odd || ring->failed || ring->in_flight || load_strict(ring->stop))
            announce(ring);
        else
            announce_unless_expected(ring);
        if (has_marks(ring, !count || is_odd)) {
            submit(ring, 0);
            return RING_MARK;
        }
        if (is_odd || ring->failed || load_strict(ring->stop)) {
            /* Whoever wants the pair back does not wait for what is being marked: Python completes that. */
            if (!ring->in_flight && !is_odd && !ring->failed)
                return park(ring) ? RING_GONE : RING_REVOKED;
            if (!ring->in_flight || (load_strict(ring->stop) && ring->in_flight == ring->marking_count))
                return is_odd || ring->failed ? RING_ODD : RING_REVOKED;
            wait_for_flight(ring, 1);
            continue;
        }
        if (count) {
            was_busy = 1;
            look_at_messages(ring);
            continue;
        }
        if (!ring->in_flight)
            store(ring->attends, may_attend);
        if (may_wait && was_busy && !ring->marking_count && spin(ring))
            continue;
        announce(ring);
        was_busy = 0;
        arm(ring);
        if (!look_at_both(ring) || available(ring))
            continue;
        if (ring->in_flight) {
            if (!may_wait && !at_disks(ring))
                return RING_IDLE;
            wait_for_flight(ring, 0);
            continue;
        }
        store_strict(ring->state, RING_ASLEEP);
        if (!may_wait)
            return RING_IDLE;
        if (!sleep_well(ring))
            return RING_GONE;
    }
}

/* Whether all that is done without a slot is done soon. */
static int is_quick(const struct ring *ring)
{
    for (uint32_t i = 0; i < ring->disk_count; i++)
        if (ring->disks[i].alignment > 1 && !ring->disks[i].nbd)
            return 0;
    return 1;
}

enum ring_reason ring_run(struct ring *ring, int may_wait)
{
    enum ring_reason reason = run(ring, may_wait, ring->bells && may_wait && is_quick(ring));

    give_messages(ring);
    return reason;
}
