/* How the loop of run.c is woken, and others by it. */
#ifndef NVMOVE_WAKE_H
#define NVMOVE_WAKE_H

#include "ring.h"

/* Make an eventfd readable. */
void write_event(int fd);

/* Signal an eventfd of the client: as write_event, but it never waits for room. */
void write_clients_event(int fd);

/* Any thread: there is something to look at. */
void wake(struct ring *ring);
/* What `wake` has written is read; whatever it was for is still to be looked at. */
void clear_wake(struct ring *ring);
/* Any thread: the loop is to look at something, or to leave `ring_wait`. */
void ring_kick(struct ring *ring);
/* What `ring_take_marks` took is marked. */
void ring_marked(struct ring *ring);

#endif
