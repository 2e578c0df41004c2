#include "wake.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

#include "atomics.h"

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

void ring_kick(struct ring *ring)
{
    store_strict(ring->kicked, 1);
    store_strict(ring->rung, 1);
    wake(ring);
}

void ring_marked(struct ring *ring)
{
    store_strict(ring->marked, 1);
    wake(ring);
}
