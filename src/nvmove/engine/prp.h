/* Guest memory and PRPs (Base 2.0 4.1.1), for the loop of ring.c. */
#ifndef NVMOVE_PRP_H
#define NVMOVE_PRP_H

#include "ring.h"

/* Where `length` bytes at a guest address are, if all of them are in one region; NULL otherwise. */
void *region_at(struct ring *ring, uint64_t address, uint64_t length, int for_writing);

/* Resolve a data pointer of `length` bytes into ring->iovecs; return how many, or 0: it is wrong, or too scattered. */
int prp_resolve(struct ring *ring, uint64_t prp1, uint64_t prp2, uint64_t length, int for_writing);

#endif
