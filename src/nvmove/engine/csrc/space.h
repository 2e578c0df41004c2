/* Commands that change what a disk has of its space, and flushes. */
#ifndef NVMOVE_SPACE_H
#define NVMOVE_SPACE_H

#include "ring.h"
#include "sqe.h"

/* Run a Flush, a Write Zeroes or a Deallocate, or start it. */
enum outcome space_execute(struct ring *ring, const struct sqe *sqe, struct ring_disk *disk);

#endif
