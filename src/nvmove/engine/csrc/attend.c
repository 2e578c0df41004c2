#include "attend.h"

#include <errno.h>
#include <string.h>

#include "atomics.h"
#include "clock.h"
#include "receive.h"
#include "wake.h"

/* A loop that is always at work looks for messages so often. */
#define LOOK_NS 200000

int is_reader(struct ring *ring)
{
    if (!ring->reads && ring->attends) {
        ring->reads = (uint32_t)bells_take(ring->bells);
        ring->left_at = 0;
    }
    return (int)ring->reads;
}

void read_doorbells(struct ring *ring)
{
    ring->reads = (uint32_t)receive_doorbells(ring->bells, &ring->rung);
}

void leave_messages(struct ring *ring)
{
    if (ring->reads) {
        bells_leave(ring->bells);
        ring->left_at = now_ns();
    }
    ring->reads = 0;
}

void look_at_messages(struct ring *ring)
{
    if (ring->left_at && now_ns() - ring->left_at > LOOK_NS && is_reader(ring))
        read_doorbells(ring);
}

void give_messages(struct ring *ring)
{
    if (!ring->attends && !ring->reads)
        return;
    store(ring->attends, 0);
    ring->left_at = 0;
    if (ring->reads)
        bells_return(ring->bells, -EAGAIN);
    else
        bells_give(ring->bells);
    ring->reads = 0;
}

void doze_with(struct ring *ring, const struct pollfd *others, uint32_t count)
{
    struct pollfd wanted[2 + RING_OTHERS] = {
        {.fd = ring->wake_fd, .events = POLLIN},
        {.fd = is_reader(ring) ? ring->bells->inbox.socket : -1, .events = POLLIN},
    };

    memcpy(wanted + 2, others, count * sizeof *others);
    while (poll(wanted, 2 + count, -1) < 0 && errno == EINTR)
        ;
    if (wanted[0].revents)
        clear_wake(ring);
    if (wanted[1].revents) {
        store_strict(ring->dozing, 0); /* who tells this ring something is this thread */
        read_doorbells(ring);
        store_strict(ring->dozing, 1);
    }
}

void doze(struct ring *ring)
{
    struct pollfd none;

    doze_with(ring, &none, 0);
}

void ring_wait(struct ring *ring)
{
    store_strict(ring->dozing, 1);
    while (!__atomic_exchange_n(&ring->kicked, 0, __ATOMIC_SEQ_CST))
        doze(ring);
    store_strict(ring->dozing, 0);
}
