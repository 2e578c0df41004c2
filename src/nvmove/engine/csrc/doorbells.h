/* A queue pair's two doorbells, as the loop of run.c looks at them. */
#ifndef NVMOVE_DOORBELLS_H
#define NVMOVE_DOORBELLS_H

#include "ring.h"

/* How many steps it is from one place of a queue of `size` entries to another. */
static inline uint32_t distance(uint32_t from, uint32_t to, uint32_t size)
{
    return to >= from ? to - from : to + size - from;
}

/* Any thread: the host has rung; 0: with a value that cannot be. */
int ring_set_tail(struct ring *ring, uint32_t tail);
int ring_set_head(struct ring *ring, uint32_t head);

/* Look at both; 0: one has a value that cannot be. */
int look_at_both(struct ring *ring);
/* Let the host ring from its next step on; whether it did one before that took effect, a look must show. */
void arm(struct ring *ring);
/* Let the host not ring at its next step: the loop looks by itself, and arms before it sleeps. */
void disarm(struct ring *ring);
/* Doorbells are in memory that the host has mapped, and a poller compares what is there with the loop's `event`. */
int is_page(const struct ring *ring);

#endif
