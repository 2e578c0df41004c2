/* The completion queue, and the interrupts that tell of it. */
#ifndef NVMOVE_COMPLETIONS_H
#define NVMOVE_COMPLETIONS_H

#include "ring.h"

#define CQE_SIZE 16

/* How many entries can be fetched: those submitted, up to the ring's end, with room for their completions. */
uint32_t available(struct ring *ring);
/* Post a success, of which `announce` will tell the host. */
void post(struct ring *ring, uint16_t cid);
/* The same for the command of a slot, which is free from then on. */
void post_slot(struct ring *ring, uint32_t index);
/* Tell the host of what was posted and it has not been told of. */
void announce(struct ring *ring);
/* The same, unless the host has yet to consume what it was told of before: it looks for more then, and says with the
 * doorbell how far it came. Not where the loop may not look at that soon again. */
void announce_unless_expected(struct ring *ring);

/* Any thread. On return no interrupt is under way and none will be sent: what would have been is owed. */
void ring_mute(struct ring *ring);

#endif
