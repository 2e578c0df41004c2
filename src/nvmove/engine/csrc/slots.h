/* Commands that a disk takes its time for: each has a slot while the loop of run.c goes on with others. */
#ifndef NVMOVE_SLOTS_H
#define NVMOVE_SLOTS_H

#include "ring.h"
#include "sqe.h"

/* Whether a write must be on stable storage when it completes. */
static inline int must_be_durable(const struct ring *ring, const struct sqe *sqe, const struct ring_disk *disk)
{
    return disk->syncs && (sqe->cdw12 & FORCE_UNIT_ACCESS || ring->durable || disk->durable);
}

/* Before a lease, or on the ring's own thread: make what commands want that are not done at once; 0, or an errno. */
int ring_make_slots(struct ring *ring);
/* The same, and what they need that a disk takes its time for. */
int ring_open_disks(struct ring *ring);

/* Take a slot for a command, to be started; NULL: there is none, or no io_uring here. Its disk is `disk`. */
struct ring_slot *slot_take(struct ring *ring, const struct sqe *sqe, const struct ring_disk *disk);
/* The same for one that needs no io_uring; the ring has slots. */
struct ring_slot *slot_keep(struct ring *ring, const struct sqe *sqe, const struct ring_disk *disk);
/* The command's data is in the first `count` iovecs of the ring, `length` bytes. */
void slot_data(struct ring *ring, struct ring_slot *slot, uint32_t count, uint64_t length);
/* Start a read or a write of these; a durable one ends when its data is on stable storage. */
void slot_transfer(struct ring *ring, struct ring_slot *slot, uint32_t count, uint64_t offset, uint64_t length,
                   int is_durable);
/* Start the next of the slot's ranges, or the flush after them; 0: nothing is left to do. */
int slot_next(struct ring *ring, struct ring_slot *slot);
/* Count what a slot has done, to its success. */
void slot_count(struct ring *ring, const struct ring_slot *slot);
/* The file answered with -errno, or did a part. */
void slot_fail(struct ring *ring, struct ring_slot *slot, int32_t result);

#endif
