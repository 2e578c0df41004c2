/* Receives a vfio-user client's messages; doorbells of lent queues go to their rings, everything else is for Python. */
#ifndef NVMOVE_RECEIVE_H
#define NVMOVE_RECEIVE_H

#include <stddef.h>
#include <stdint.h>

#include "bells.h"

#define RECEIVE_MAX_FDS 16 /* vfio/message.py, MAX_MSG_FDS */

/* Wait for the next message that is for Python, and put it into `buffer`: whole, or its header alone where that
 * announces what cannot be. Descriptors that came with it go into `fds`; they are the caller's, whatever is returned.
 * Returns 1; 0 where the stream has ended; or an errno, negative. */
int receive(int fd, uint8_t *buffer, size_t size, struct bells *bells, int *fds, uint32_t *fd_count);

#endif
