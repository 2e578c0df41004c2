/* Receives a vfio-user client's messages; doorbells of lent queues go to their rings, everything else is for Python. */
#ifndef NVMOVE_RECEIVE_H
#define NVMOVE_RECEIVE_H

#include <stddef.h>
#include <stdint.h>

#include "bells.h"

/* The control thread: wait for the next message that is for Python, and have it in `buffer`: whole, or its header alone
 * where that announces what cannot be. Descriptors that came with it go into `fds`; they are the caller's, whatever is
 * returned. Returns 1; 0 where the stream has ended; or an errno, negative. */
int receive(struct bells *bells, int fd, uint8_t *buffer, size_t size, int *fds, uint32_t *fd_count);

/* The loop that reads: take what has come, at least one doorbell if there is one, and more while `ring` was not rung.
 * 0: something else has come, and the control thread reads now. */
int receive_doorbells(struct bells *bells, const uint32_t *rung);

#endif
