/* The loop that runs a ring, from its set-up to its end. */
#ifndef NVMOVE_RUN_H
#define NVMOVE_RUN_H

#include "ring.h"

/* 0, or an errno. */
int ring_init(struct ring *ring);
void ring_destroy(struct ring *ring);

/* Before a lease: set the loop's own fields up; 0: the completion queue is not in guest memory. */
int ring_begin(struct ring *ring);

/* The ring's own thread, without the GIL. */
enum ring_reason ring_run(struct ring *ring, int may_wait);

#endif
