#include "doorbells.h"

#include "atomics.h"
#include "wake.h"

/* Take a value over that the control thread was told; 0: it steps over more than `room` entries. Where the cell counts
 * it is a wake-up, and may be older than what the cell has. */
static int tell(struct ring *ring, struct ring_doorbell *bell, uint32_t value, uint32_t size, uint32_t room)
{
    if (value >= size)
        return 0;
    if (!bell->cell || load(bell->late)) {
        if (distance(bell->told, value, size) > room)
            return 0;
        store_strict(bell->told, value);
    }
    store_strict(ring->rung, 1);
    wake(ring);
    return 1;
}

/* Each returns whether the value is possible: the tail passes no entry that was not fetched, the head none posted. */

int ring_set_tail(struct ring *ring, uint32_t tail)
{
    uint32_t size = ring->sq_size, waiting = distance(load(ring->sq_head), ring->tail.told, size);

    return tell(ring, &ring->tail, tail, size, size - 1 - waiting);
}

int ring_set_head(struct ring *ring, uint32_t head)
{
    uint32_t size = ring->cq_size;

    return tell(ring, &ring->head, head, size, distance(ring->head.told, load(ring->cq_tail), size));
}

/* Look at a doorbell; 0: it has a value that steps over more than `room` entries. */
static int look(struct ring_doorbell *bell, uint32_t size, uint32_t room)
{
    uint32_t value;

    if (bell->cell) {
        value = load_strict(*bell->cell);
        if (!bell->late || value != bell->untouched) {
            store(bell->late, 0);
            if (value >= size || distance(bell->seen, value, size) > room)
                return 0;
            bell->seen = value;
            return 1;
        }
    }
    bell->seen = load_strict(bell->told);
    return 1;
}

int look_at_both(struct ring *ring)
{
    uint32_t waiting = distance(ring->sq_head, ring->tail.seen, ring->sq_size);

    return look(&ring->tail, ring->sq_size, ring->sq_size - 1 - waiting) &&
           look(&ring->head, ring->cq_size, distance(ring->head.seen, ring->cq_tail, ring->cq_size));
}

static void say(struct ring_doorbell *bell, uint32_t seen)
{
    store_strict(*bell->event, seen);
    if (bell->written)
        store(*bell->written, 1);
}

void arm(struct ring *ring)
{
    uint32_t used = distance(ring->head.seen, ring->cq_tail, ring->cq_size);

    if (ring->tail.event)
        say(&ring->tail, ring->tail.seen);
    if (ring->head.event && (ring->head.always || used == ring->cq_size - 1))
        say(&ring->head, ring->head.seen);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

int is_page(const struct ring *ring)
{
    return ring->tail.cell && ring->head.always;
}

void disarm(struct ring *ring)
{
    if (ring->tail.event && !is_page(ring))
        say(&ring->tail, ring->tail.seen ? ring->tail.seen - 1 : ring->sq_size - 1);
}
