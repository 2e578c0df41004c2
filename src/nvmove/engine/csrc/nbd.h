/* A connection to an NBD server as a disk: requests go out and replies come in while the loop of run.c goes on.
 *
 * The transmission phase with simple replies (NBD's proto.md). Whoever lends the connection has made it ready, with nothing
 * under way. Nothing here waits: sockets that are full or empty are left for later, and `nbd_poll` says for what.
 */
#ifndef NVMOVE_NBD_H
#define NVMOVE_NBD_H

#include <poll.h>

#include "ring.h"

#define NBD_BUFFER 32768 /* of what comes behind a read's data */

/* proto.md, "Request types" and "Command flags" */
enum nbd_type { NBD_READ, NBD_WRITE, NBD_FLUSH = 3, NBD_TRIM, NBD_WRITE_ZEROES = 6 };
#define NBD_FUA (1u << 0)
#define NBD_NO_HOLE (1u << 1)

/* How ranges are zeroed or given back, as `mode` of a slot: a request's type and flags. */
#define NBD_MODE_TYPE(mode) ((enum nbd_type)((mode) & 0xffff))
#define NBD_MODE_FLAGS(mode) ((uint16_t)((mode) >> 16))

struct nbd {
    int32_t fd;
    uint8_t can_fua;
    uint8_t is_lost;   /* for good: nothing is sent or received any more */
    uint32_t maximum;  /* bytes of data in one request */
    uint32_t in_flight; /* slots whose request has not ended */
    uint64_t requests; /* so far */
    uint32_t unsent[RING_SLOTS], unsent_first, unsent_count; /* slots, in order, in a ring */
    uint64_t sent;     /* bytes of the first of those */
    struct ring_slot *reading; /* whose data comes next; NULL: a reply */
    uint32_t iovec;            /* which of its iovecs is filled next, */
    uint64_t filled;           /* how much of that is, */
    uint64_t missing;          /* and how much is to come for all */
    uint32_t parsed, received; /* of the buffer */
    uint8_t buffer[NBD_BUFFER];
};

/* Prepare a slot's request: of its iovecs' data, where the type has any. `length` is in bytes. */
void nbd_prepare(struct ring *ring, struct ring_slot *slot, enum nbd_type type, uint16_t flags, uint64_t offset,
                 uint32_t length);
/* Send what is prepared, as far as the socket takes it. */
void nbd_send(struct ring *ring, struct nbd *nbd);
/* Receive what has come; return whether there may be more. The caller takes what ended with `nbd_reap` in between. */
int nbd_receive(struct ring *ring, struct nbd *nbd);
/* Take one that ended; return whether there was one. `result` is the length of the slot, or -errno. */
int nbd_reap(struct ring *ring, struct nbd *nbd, uint64_t *index, int64_t *result);

/* All connections of a ring. */
uint32_t nbd_unsent(const struct ring *ring);
void nbd_send_all(struct ring *ring);
/* Say what to wait for, in at most `ring->nbd_count` entries, and return how many. */
uint32_t nbd_poll(const struct ring *ring, struct pollfd *wanted);
/* Whether something has come. */
int nbd_has_news(const struct ring *ring);

static inline uint32_t nbd_in_flight(const struct ring *ring)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < ring->nbd_count; i++)
        count += ring->nbds[i].in_flight;
    return count;
}

#endif
