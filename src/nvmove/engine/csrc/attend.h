/* How the loop of run.c sleeps, and reads the client's messages meanwhile. */
#ifndef NVMOVE_ATTEND_H
#define NVMOVE_ATTEND_H

#include <poll.h>

#include "ring.h"

#define RING_OTHERS (1 + RING_NBDS)

/* Wait for `wake`, or if the client's messages are this loop's, for one. The caller has set `dozing`, and looked after
 * that whether there is a reason to sleep. */
void doze(struct ring *ring);
/* The same, or for what the others say, RING_OTHERS at the most. */
void doze_with(struct ring *ring, const struct pollfd *others, uint32_t count);

/* Be the one who reads the client's messages, if that can be; whether so. */
int is_reader(struct ring *ring);
/* The reader: take what has come. */
void read_doorbells(struct ring *ring);
/* There is something to do that does not take long. */
void leave_messages(struct ring *ring);
/* There still is, after more than a while: take what has come, if nobody else reads. */
void look_at_messages(struct ring *ring);
/* There is something that may. */
void give_messages(struct ring *ring);

/* The ring's own thread: wait for `ring_kick`. */
void ring_wait(struct ring *ring);

#endif
