#define _GNU_SOURCE
#include "bells.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "atomics.h"
#include "ring.h"

/* How often the control thread looks while a loop that should read is at work, in ms. */
#define TICK 1

int bells_init(struct bells *bells)
{
    memset(bells, 0, sizeof *bells);
    bells->result = -EAGAIN;
    bells->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (bells->call_fd < 0)
        return errno;
    return pthread_mutex_init(&bells->lock, NULL);
}

void bells_destroy(struct bells *bells)
{
    free(bells->rings);
    if (bells->call_fd >= 0)
        close(bells->call_fd);
    pthread_mutex_destroy(&bells->lock);
}

/* Make room for `cell`; 0, or ENOMEM. */
static int grow(struct bells *bells, uint32_t cell)
{
    uint32_t count = cell + 1 > 2 * bells->count ? cell + 1 : 2 * bells->count;
    struct ring **rings = realloc(bells->rings, count * sizeof *rings);

    if (!rings)
        return ENOMEM;
    memset(rings + bells->count, 0, (count - bells->count) * sizeof *rings);
    bells->rings = rings;
    bells->count = count;
    return 0;
}

int bells_hang(struct bells *bells, uint32_t cell, struct ring *ring)
{
    int error = 0;

    pthread_mutex_lock(&bells->lock);
    if (cell >= bells->count && ring)
        error = grow(bells, cell);
    if (cell < bells->count)
        bells->rings[cell] = ring;
    pthread_mutex_unlock(&bells->lock);
    return error;
}

int bells_ring(struct bells *bells, uint32_t cell, uint32_t value, int may_leave)
{
    struct ring *ring;
    int is_taken = 0;

    pthread_mutex_lock(&bells->lock);
    ring = cell < bells->count ? bells->rings[cell] : NULL;
    if (ring) {
        is_taken = cell & 1 ? ring_set_head(ring, value) : ring_set_tail(ring, value);
        if (is_taken) {
            __atomic_fetch_add(&ring->doorbells, 1, __ATOMIC_RELAXED);
            /* Before its loop sleeps again, since that wants the lock. */
            if (may_leave && bells->reader == READER_CONTROL && load(ring->attends))
                bells->reader = READER_NOBODY;
        }
    }
    pthread_mutex_unlock(&bells->lock);
    return is_taken;
}

/* --- who reads --------------------------------------------------------------------------------------------------- */

/* With the lock: wake the control thread from `bells_stand_by`. */
static void call(struct bells *bells)
{
    uint64_t one = 1;

    bells->rests = 0;
    while (write(bells->call_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

int bells_take(struct bells *bells)
{
    int is_taken;

    pthread_mutex_lock(&bells->lock);
    is_taken = bells->reader == READER_NOBODY;
    if (is_taken)
        bells->reader = READER_LOOP;
    pthread_mutex_unlock(&bells->lock);
    return is_taken;
}

void bells_leave(struct bells *bells)
{
    pthread_mutex_lock(&bells->lock);
    bells->reader = READER_NOBODY;
    bells->turns++;
    if (bells->rests)
        call(bells);
    pthread_mutex_unlock(&bells->lock);
}

void bells_give(struct bells *bells)
{
    pthread_mutex_lock(&bells->lock);
    if (bells->reader == READER_NOBODY) {
        bells->reader = READER_CONTROL;
        call(bells);
    }
    pthread_mutex_unlock(&bells->lock);
}

void bells_return(struct bells *bells, int result)
{
    pthread_mutex_lock(&bells->lock);
    bells->result = result;
    bells->reader = READER_CONTROL;
    call(bells);
    pthread_mutex_unlock(&bells->lock);
}

int bells_stand_by(struct bells *bells)
{
    uint32_t turns;
    int result;

    pthread_mutex_lock(&bells->lock);
    turns = bells->turns;
    while (bells->reader != READER_CONTROL) {
        struct pollfd called = {.fd = bells->call_fd, .events = POLLIN};
        struct pollfd come = {.fd = bells->inbox.socket, .events = POLLIN};
        int was_called, timeout = bells->rests ? -1 : TICK;

        pthread_mutex_unlock(&bells->lock);
        was_called = poll(&called, 1, timeout) > 0;
        pthread_mutex_lock(&bells->lock);
        if (was_called) {
            uint64_t count;

            while (read(bells->call_fd, &count, sizeof count) < 0 && errno == EINTR)
                ;
        } else if (bells->reader == READER_NOBODY && poll(&come, 1, 0) > 0) {
            bells->reader = READER_CONTROL;
        } else if (bells->reader == READER_LOOP && bells->turns == turns) {
            bells->rests = 1; /* nothing has happened for a while */
        }
        turns = bells->turns;
    }
    bells->rests = 0;
    result = bells->result;
    bells->result = -EAGAIN;
    pthread_mutex_unlock(&bells->lock);
    return result;
}
