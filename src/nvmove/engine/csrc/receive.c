#define _GNU_SOURCE
#include "receive.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include "atomics.h"

/* vfio-user 0.0: what a posted write of a region looks like. */
#define COMMAND_REGION_WRITE 10
#define COMMAND_REGION_WRITE_MULTI 15
#define FLAGS_POSTED 0x10 /* a command, and nobody waits for a reply */

struct region_write {
    uint64_t offset;
    uint32_t region, count;
};
_Static_assert(sizeof(struct region_write) == 16, "and so has what precedes the data of a write");

/* One of WRITE_MULTI: room for 8 bytes of data, whatever `count` says. */
#define MULTI_SIZE (sizeof(struct region_write) + 8)

/* NVMe over PCIe 1.0, 3.1.2: BAR0's doorbells, 4 bytes each (CAP.DSTRD is 0). */
#define BAR0 0
#define DOORBELLS 0x1000
#define DOORBELL_SIZE 4

/* Try to hand a write over to a ring; whether one has taken it. `data` is of DOORBELL_SIZE bytes at least. */
static int ring_one(struct bells *bells, const struct region_write *write, const uint8_t *data,
                    int may_leave)
{
    uint32_t value;
    uint64_t cell = (write->offset - DOORBELLS) / DOORBELL_SIZE;

    if (write->region != BAR0 || write->count != DOORBELL_SIZE || write->offset < DOORBELLS ||
        write->offset % DOORBELL_SIZE || cell > UINT32_MAX)
        return 0;
    memcpy(&value, data, sizeof value);
    return bells_ring(bells, (uint32_t)cell, value, may_leave);
}

/* Hand over the writes that come first in a batch, and take those that rings took out of it: what is left keeps its
 * order. Returns whether nothing is left. */
static int ring_many(struct bells *bells, struct header *header, uint8_t *payload)
{
    uint8_t *writes = payload + sizeof(uint64_t);
    uint64_t count, taken = 0;
    size_t room = header->size - sizeof *header;

    if (room < sizeof count)
        return 0;
    memcpy(&count, payload, sizeof count);
    if (count > (room - sizeof count) / MULTI_SIZE || room != sizeof count + count * MULTI_SIZE)
        return 0; /* malformed: Python says how */
    while (taken < count) {
        struct region_write write;
        const uint8_t *at = writes + taken * MULTI_SIZE;

        memcpy(&write, at, sizeof write);
        if (!ring_one(bells, &write, at + sizeof write, 0))
            break;
        taken++;
    }
    if (!taken)
        return 0;
    count -= taken;
    memcpy(payload, &count, sizeof count);
    memmove(writes, writes + taken * MULTI_SIZE, count * MULTI_SIZE);
    header->size -= (uint32_t)(taken * MULTI_SIZE);
    return !count;
}

/* Whether a message was for rings, as a whole. */
static int is_for_rings(struct bells *bells, uint8_t *buffer)
{
    struct header header;
    uint8_t *payload = buffer + sizeof header;
    int is_done = 0;

    memcpy(&header, buffer, sizeof header);
    if (header.flags != FLAGS_POSTED)
        return 0;
    if (header.command == COMMAND_REGION_WRITE &&
        header.size == sizeof header + sizeof(struct region_write) + DOORBELL_SIZE) {
        struct region_write write;

        memcpy(&write, payload, sizeof write);
        return ring_one(bells, &write, payload + sizeof write, 1);
    }
    if (header.command == COMMAND_REGION_WRITE_MULTI) {
        is_done = ring_many(bells, &header, payload);
        memcpy(buffer, &header, sizeof header);
    }
    return is_done;
}

int receive(struct bells *bells, int fd, uint8_t *buffer, size_t size, int *fds, uint32_t *fd_count)
{
    struct inbox *inbox = &bells->inbox;
    int got = -EAGAIN;

    *inbox = (struct inbox){.socket = fd, .buffer = buffer, .size = size, .fds = fds};
    while (got == -EAGAIN) {
        got = inbox_fill(inbox, 0);
        if (got > 0 && !inbox->fd_count) {
            inbox_empty(inbox); /* before a loop may have it */
            if (is_for_rings(bells, buffer))
                got = bells_stand_by(bells);
        }
    }
    *fd_count = inbox->fd_count;
    return got;
}

int receive_doorbells(struct bells *bells, const uint32_t *rung)
{
    struct inbox *inbox = &bells->inbox;

    do {
        int got = inbox_fill(inbox, MSG_DONTWAIT);

        if (got == -EAGAIN && !inbox->got)
            return 1;
        if (got <= 0 || inbox->fd_count || !is_for_rings(bells, inbox->buffer)) {
            bells_return(bells, got);
            return 0;
        }
        inbox_empty(inbox);
    } while (!load_strict(*rung));
    return 1;
}
