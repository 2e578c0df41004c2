/* SGLs (Base 2.0 4.1.2), for the loop of run.c. */
#ifndef NVMOVE_SGL_H
#define NVMOVE_SGL_H

#include "prp.h"
#include "sqe.h"

/* Resolve a command's data pointer, PRPs or an SGL, as prp_resolve does: 0 is for Python. */
int data_resolve(struct ring *ring, const struct sqe *sqe, uint64_t length, int for_writing);

#endif
