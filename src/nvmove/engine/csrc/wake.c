#include "wake.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "atomics.h"
#include "clock.h"
#include "receive.h"

/* A loop that is always at work looks for messages so often. */
#define LOOK_NS 200000

void write_event(int fd)
{
    uint64_t one = 1;

    /* It fails only when the counter is full, and then the event is there already. */
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

void write_clients_event(int fd)
{
    struct pollfd room = {.fd = fd, .events = POLLOUT};

    /* The client may have made it one that waits when it is full: O_NONBLOCK is the open file's, which it has too. */
    if (poll(&room, 1, 0) != 0)
        write_event(fd);
}

void wake(struct ring *ring)
{
    if (load_strict(ring->dozing) && !__atomic_exchange_n(&ring->woken, 1, __ATOMIC_SEQ_CST))
        write_event(ring->wake_fd);
}

void clear_wake(struct ring *ring)
{
    uint64_t count;

    if (read(ring->wake_fd, &count, sizeof count) < 0 && errno != EAGAIN && errno != EINTR)
        return;
    store_strict(ring->woken, 0);
}

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

void ring_kick(struct ring *ring)
{
    store_strict(ring->kicked, 1);
    store_strict(ring->rung, 1);
    wake(ring);
}

void ring_wait(struct ring *ring)
{
    store_strict(ring->dozing, 1);
    while (!__atomic_exchange_n(&ring->kicked, 0, __ATOMIC_SEQ_CST))
        doze(ring);
    store_strict(ring->dozing, 0);
}

void ring_revoke(struct ring *ring)
{
    store_strict(ring->stop, STOP_RETURN);
    wake(ring);
}

/* What `ring_take_marks` took is marked. */
void ring_marked(struct ring *ring)
{
    store_strict(ring->marked, 1);
    wake(ring);
}

/* Take a ring back whose loop sleeps; it is not woken for that. */
int ring_take(struct ring *ring)
{
    uint32_t asleep = RING_ASLEEP;

    return __atomic_compare_exchange_n(&ring->state, &asleep, RING_TAKEN, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
