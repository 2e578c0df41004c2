/* The short way back: a loop that was halted stops where it is, and whoever wants the ring takes it from there. So the
 * loop's thread needs no GIL, and several rings no turns at it. */
#ifndef NVMOVE_PARK_H
#define NVMOVE_PARK_H

#include <stdint.h>

struct ring;

enum stop {
    STOP_NOT,
    STOP_RETURN, /* the loop is to come back */
    STOP_PARK,   /* it may park before: somebody is about to take the ring */
};

/* The loop, with nothing under way: wait to be taken, if that is to be; whether it was. */
int park(struct ring *ring);

/* Any thread: the loop is to come back. */
void ring_revoke(struct ring *ring);
/* Take a ring back whose loop sleeps; it is not woken for that. Whether it did. */
int ring_take(struct ring *ring);
/* Any thread: the loop is to stop; then wait until it has, at most `ns`. */
void ring_halt(struct ring *ring);
void ring_await(const struct ring *ring, int64_t ns);
/* The ring was given back. */
void ring_end(struct ring *ring);

#endif
