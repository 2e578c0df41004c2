#define _GNU_SOURCE
#include "receive.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* vfio-user 0.0: what a posted write of a region looks like; host order, as everywhere in it. */
#define COMMAND_REGION_WRITE 10
#define COMMAND_REGION_WRITE_MULTI 15
#define FLAGS_POSTED 0x10 /* a command, and nobody waits for a reply */

struct header {
    uint16_t id, command;
    uint32_t size, flags, error;
};
_Static_assert(sizeof(struct header) == 16, "a header has 16 bytes");

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

/* Take over the descriptors of a message. */
static void keep_fds(struct msghdr *message, int *fds, uint32_t *fd_count)
{
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof *fds;

        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; i < count; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
            fds[(*fd_count)++] = fd;
        }
    }
}

/* Read exactly `length` bytes. 1; 0: the stream ends before that; or an errno, negative.
 * Without `fds` the kernel closes what descriptors come along. */
static int read_all(int fd, uint8_t *buffer, size_t length, int *fds, uint32_t *fd_count)
{
    while (length) {
        union {
            struct cmsghdr alignment;
            char bytes[CMSG_SPACE(RECEIVE_MAX_FDS * sizeof(int))];
        } control;
        struct iovec iovec = {.iov_base = buffer, .iov_len = length};
        struct msghdr message = {.msg_iov = &iovec, .msg_iovlen = 1};
        ssize_t count;

        if (fds && !*fd_count) { /* a header comes in one piece from every client that means well */
            message.msg_control = control.bytes;
            message.msg_controllen = sizeof control.bytes;
        }
        count = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return count ? -errno : 0;
        if (message.msg_control)
            keep_fds(&message, fds, fd_count);
        buffer += count;
        length -= (size_t)count;
    }
    return 1;
}

/* Try to hand a write over to a ring; whether one has taken it. `data` is of DOORBELL_SIZE bytes at least. */
static int ring_one(struct bells *bells, const struct region_write *write, const uint8_t *data)
{
    uint32_t value;
    uint64_t cell = (write->offset - DOORBELLS) / DOORBELL_SIZE;

    if (write->region != BAR0 || write->count != DOORBELL_SIZE || write->offset < DOORBELLS ||
        write->offset % DOORBELL_SIZE || cell > UINT32_MAX)
        return 0;
    memcpy(&value, data, sizeof value);
    return bells_ring(bells, (uint32_t)cell, value);
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
        if (!ring_one(bells, &write, at + sizeof write))
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
        return ring_one(bells, &write, payload + sizeof write);
    }
    if (header.command == COMMAND_REGION_WRITE_MULTI) {
        is_done = ring_many(bells, &header, payload);
        memcpy(buffer, &header, sizeof header);
    }
    return is_done;
}

int receive(int fd, uint8_t *buffer, size_t size, struct bells *bells, int *fds, uint32_t *fd_count)
{
    struct header header;

    for (;;) {
        int got;

        *fd_count = 0;
        got = read_all(fd, buffer, sizeof header, fds, fd_count);
        if (got <= 0)
            return got;
        memcpy(&header, buffer, sizeof header);
        if (header.size < sizeof header || header.size > size)
            return 1;
        got = read_all(fd, buffer + sizeof header, header.size - sizeof header, NULL, NULL);
        if (got <= 0)
            return got;
        if (*fd_count || !is_for_rings(bells, buffer))
            return 1;
    }
}
