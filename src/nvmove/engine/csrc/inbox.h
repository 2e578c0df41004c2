/* One message of a vfio-user client as it comes in, perhaps in pieces. */
#ifndef NVMOVE_INBOX_H
#define NVMOVE_INBOX_H

#include <stddef.h>
#include <stdint.h>

#define INBOX_MAX_FDS 16 /* vfio/message.py, MAX_MSG_FDS */
#define INBOX_LOST (-1)  /* in place of those that the kernel could not give us; vfio/receive.py, LOST */

/* vfio-user 0.0: what each message begins with; host order, as everywhere in it. */
struct header {
    uint16_t id, command;
    uint32_t size, flags, error;
};
_Static_assert(sizeof(struct header) == 16, "a header has 16 bytes");

struct inbox {
    int socket;
    uint8_t *buffer;
    size_t size, got; /* of `buffer`, and what is in it so far */
    int *fds;         /* those that came along, INBOX_MAX_FDS and INBOX_LOST: who empties the inbox has taken them over */
    uint32_t fd_count;
};

/* Read on until the message is whole; 1. Or a header is, which announces what cannot be: 1, too. 0: the stream has ended;
 * or an errno, negative. With `MSG_DONTWAIT` in `flags` that is EAGAIN where there is nothing more so far. */
int inbox_fill(struct inbox *inbox, int flags);

static inline void inbox_empty(struct inbox *inbox)
{
    inbox->got = inbox->fd_count = 0;
}

#endif
