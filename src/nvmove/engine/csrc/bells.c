#include "bells.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "atomics.h"
#include "doorbells.h"
#include "ring.h"

/* How long the control thread does not look while a loop that should read is at work. */
#define TICK_NS 1000000
#define LONGEST_TICK_NS (16 * TICK_NS)

int bells_init(struct bells *bells)
{
    pthread_condattr_t monotonic;
    int error;

    memset(bells, 0, sizeof *bells);
    bells->result = -EAGAIN;
    bells->tick_ns = TICK_NS;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    error = pthread_cond_init(&bells->called, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return error ? error : pthread_mutex_init(&bells->lock, NULL);
}

void bells_destroy(struct bells *bells)
{
    free(bells->rings);
    pthread_cond_destroy(&bells->called);
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
    bells->rests = 0;
    pthread_cond_signal(&bells->called);
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

/* With the lock: wait for a call, or a tick; whether that is over. */
static int wait_tick(struct bells *bells)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += bells->tick_ns;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    return pthread_cond_timedwait(&bells->called, &bells->lock, &until) == ETIMEDOUT;
}

int bells_stand_by(struct bells *bells)
{
    struct pollfd come = {.fd = bells->inbox.socket, .events = POLLIN};
    uint32_t turns;
    int result;

    pthread_mutex_lock(&bells->lock);
    turns = bells->turns;
    while (bells->reader != READER_CONTROL) {
        if (bells->rests)
            pthread_cond_wait(&bells->called, &bells->lock);
        else if (wait_tick(bells)) {
            if (bells->reader == READER_NOBODY && poll(&come, 1, 0) > 0) {
                bells->reader = READER_CONTROL;
                bells->tick_ns = TICK_NS;
                break;
            }
            if (bells->tick_ns < LONGEST_TICK_NS)
                bells->tick_ns *= 2;
            if (bells->reader == READER_LOOP && bells->turns == turns)
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
