#include "completions.h"

#include <string.h>

#include "atomics.h"
#include "clock.h"
#include "doorbells.h"
#include "sqe.h"
#include "wake.h"

/* How long the host may take from an interrupt to the doorbell that tells what it has consumed. */
#define EXPECTED_NS 100000

/* Base 2.0 3.3.3.2 */
struct cqe {
    uint32_t dw0, dw1;
    uint16_t sq_head, sqid;
    uint32_t cid_and_status; /* the phase tag is bit 16 */
};
_Static_assert(sizeof(struct cqe) == CQE_SIZE, "a CQE has 16 bytes");

void announce(struct ring *ring)
{
    if (!ring->unsignalled)
        return;
    ring->unsignalled = 0;
    if (!ring->interrupt)
        return;
    ring->announced = ring->cq_tail;
    ring->announced_at = now_ns();
    pthread_mutex_lock(&ring->signalling);
    if (ring->interrupt_fd >= 0)
        write_clients_event(ring->interrupt_fd);
    else
        ring->owed = 1;
    pthread_mutex_unlock(&ring->signalling);
}

/* Whether the host has been told of an entry that it has not consumed, a short while ago. */
static int is_expected(const struct ring *ring)
{
    uint32_t unread = distance(ring->head.seen, ring->cq_tail, ring->cq_size);

    return ring->head.cell && !ring->head.late && unread > distance(ring->announced, ring->cq_tail, ring->cq_size) &&
           now_ns() - ring->announced_at < EXPECTED_NS;
}

void announce_unless_expected(struct ring *ring)
{
    if (ring->unsignalled && !(ring->interrupt && is_expected(ring)))
        announce(ring);
}

void ring_mute(struct ring *ring)
{
    pthread_mutex_lock(&ring->signalling);
    ring->interrupt_fd = -1;
    pthread_mutex_unlock(&ring->signalling);
}

uint32_t available(struct ring *ring)
{
    uint32_t count = distance(ring->sq_head, ring->tail.seen, ring->sq_size);
    uint32_t free = ring->cq_size - 1 - distance(ring->head.seen, ring->cq_tail, ring->cq_size) - ring->in_flight;

    if (ring->slots && free > ring->free_count)
        free = ring->free_count;
    if (count > ring->sq_size - ring->sq_head)
        count = ring->sq_size - ring->sq_head;
    if (count > free)
        count = free;
    return count > RING_BATCH ? RING_BATCH : count;
}

/* Post a success. The tail moves first: who sees the entry may ring a doorbell that builds on it. */
void post(struct ring *ring, uint16_t cid)
{
    struct cqe *entry = (struct cqe *)(ring->completions + (uint64_t)ring->cq_tail * CQE_SIZE);
    uint32_t phase = ring->phase, at = ring->cq_tail, next = at + 1;

    if (next == ring->cq_size) {
        next = 0;
        store(ring->phase, phase ^ 1);
    }
    store(ring->cq_tail, next);
    entry->dw0 = entry->dw1 = 0;
    entry->sq_head = (uint16_t)ring->sq_head;
    entry->sqid = ring->sqid;
    store(entry->cid_and_status, cid | phase << 16);
    if (ring->completions_written) /* no completion waits for this one: it is found when the loop has stopped */
        store(ring->completions_written[(ring->cq_address % DIRTY_PAGE + (uint64_t)at * CQE_SIZE) / DIRTY_PAGE], 1);
    ring->unsignalled++;
}

void post_slot(struct ring *ring, uint32_t index)
{
    struct sqe sqe;

    memcpy(&sqe, ring->slots[index].sqe, sizeof sqe);
    ring->free_slots[ring->free_count++] = index;
    store(ring->in_flight, ring->in_flight - 1);
    post(ring, sqe.cid);
}
