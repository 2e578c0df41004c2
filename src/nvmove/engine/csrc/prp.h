/* Guest memory and PRPs (Base 2.0 4.1.1), for the loop of run.c. */
#ifndef NVMOVE_PRP_H
#define NVMOVE_PRP_H

#include "ring.h"

/* Where `length` bytes at a guest address are, if all of them are in one region; NULL otherwise. */
void *region_at(struct ring *ring, uint64_t address, uint64_t length, int for_writing);

/* Note that a run of guest memory was written, if anybody wants to know: after the data is in place, so that who asks
 * later finds both, and before the guest is told. */
void note_written(struct ring *ring, uint64_t address, uint64_t length);

/* Where that is noted for the page of an address; NULL: nobody wants to know. */
uint8_t *written_at(struct ring *ring, uint64_t address);

/* Add a run of guest memory behind the first `count` of ring->iovecs and addresses; return how many there are then, or 0:
 * it is not there, or that are too many. */
int memory_add(struct ring *ring, int count, uint64_t address, uint64_t length, int for_writing);

/* Resolve PRPs of `length` bytes into ring->iovecs and addresses; return how many, or 0: it is wrong, or too scattered. */
int prp_resolve(struct ring *ring, uint64_t prp1, uint64_t prp2, uint64_t length, int for_writing);

#endif
