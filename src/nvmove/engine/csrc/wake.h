/* How the loop of ring.c sleeps, and reads the client's messages meanwhile; and how it is woken. */
#ifndef NVMOVE_WAKE_H
#define NVMOVE_WAKE_H

#include <poll.h>

#include "ring.h"

#define RING_OTHERS (1 + RING_NBDS)

/* Make an eventfd readable. */
void write_event(int fd);

/* Signal an eventfd of the client: as write_event, but it never waits for room. */
void write_clients_event(int fd);

/* Any thread: there is something to look at. */
void wake(struct ring *ring);
/* What `wake` has written is read; whatever it was for is still to be looked at. */
void clear_wake(struct ring *ring);
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

#endif
