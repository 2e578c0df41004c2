/* What one command of the loop of run.c does. */
#ifndef NVMOVE_EXECUTE_H
#define NVMOVE_EXECUTE_H

#include "ring.h"
#include "sqe.h"

/* Run a command to its success, or start it. */
enum outcome execute(struct ring *ring, const struct sqe *sqe);

#endif
