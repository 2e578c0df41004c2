#define _GNU_SOURCE
#include "nbd.h"

#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include "sqe.h"

/* proto.md, "Request message" and "Simple reply message"; big endian */
#define REQUEST_MAGIC 0x25609513u
#define REPLY_MAGIC 0x67446698u

struct request {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t length;
} __attribute__((packed));
_Static_assert(sizeof(struct request) == NBD_REQUEST_SIZE, "a request has 28 bytes");

struct reply {
    uint32_t magic, error;
    uint64_t cookie;
};
_Static_assert(sizeof(struct reply) == 16, "a reply has 16 bytes");

/* proto.md, "Error values": they are Linux' own numbers, and what is not among them counts as EINVAL. */
static int32_t errno_of(uint32_t error)
{
    switch (error) {
    case EPERM:
    case EIO:
    case ENOMEM:
    case ENOSPC:
    case EOVERFLOW:
    case ENOTSUP:
    case ESHUTDOWN:
        return (int32_t)error;
    default:
        return EINVAL;
    }
}

/* The connection is no good any more: nothing that the server still sends gets into guest memory. */
static void lose(struct nbd *nbd)
{
    shutdown(nbd->fd, SHUT_RDWR);
    nbd->is_lost = 1;
}

void nbd_prepare(struct ring *ring, struct ring_slot *slot, enum nbd_type type, uint16_t flags, uint64_t offset,
                 uint32_t length)
{
    struct nbd *nbd = slot->nbd;
    uint32_t index = (uint32_t)(slot - ring->slots);
    struct request request;

    slot->cookie = nbd->requests++ * RING_SLOTS + index; /* no two of a connection are the same */
    request = (struct request){
        .magic = htobe32(REQUEST_MAGIC),
        .flags = htobe16(flags),
        .type = htobe16((uint16_t)type),
        .cookie = htobe64(slot->cookie),
        .offset = htobe64(offset),
        .length = htobe32(length),
    };
    memcpy(slot->request, &request, sizeof request);
    slot->sends = type == NBD_WRITE;
    slot->receives = type == NBD_READ;
    slot->awaits = 0;
    nbd->unsent[(nbd->unsent_first + nbd->unsent_count++) % RING_SLOTS] = index;
    nbd->in_flight++;
}

static uint64_t size_of(const struct ring_slot *slot)
{
    return NBD_REQUEST_SIZE + (slot->sends ? slot->length : 0);
}

/* Say where the bytes to be sent are, in the ring's iovecs; return how many of those. */
static uint32_t gather(struct ring *ring, const struct nbd *nbd, uint64_t *bytes)
{
    uint32_t count = 0;
    uint64_t skipped = nbd->sent;

    *bytes = 0;
    for (uint32_t i = 0; i < nbd->unsent_count; i++) {
        struct ring_slot *slot = &ring->slots[nbd->unsent[(nbd->unsent_first + i) % RING_SLOTS]];
        uint32_t data = slot->sends ? slot->count : 0, first = count;

        if (count + 1 + data > RING_IOVECS)
            break;
        ring->iovecs[count++] = (struct iovec){slot->request, NBD_REQUEST_SIZE};
        memcpy(&ring->iovecs[count], slot->iovecs, data * sizeof *slot->iovecs);
        count += data;
        *bytes += size_of(slot);
        if (!i) { /* some of the first one may be gone */
            *bytes -= skipped;
            while (skipped >= ring->iovecs[first].iov_len)
                skipped -= ring->iovecs[first++].iov_len;
            ring->iovecs[first].iov_base = (uint8_t *)ring->iovecs[first].iov_base + skipped;
            ring->iovecs[first].iov_len -= skipped;
            memmove(ring->iovecs, &ring->iovecs[first], (count - first) * sizeof *ring->iovecs);
            count -= first;
        }
    }
    return count;
}

/* So many bytes more are sent. */
static void note_sent(struct ring *ring, struct nbd *nbd, uint64_t bytes)
{
    nbd->sent += bytes;
    while (nbd->unsent_count) {
        struct ring_slot *slot = &ring->slots[nbd->unsent[nbd->unsent_first]];

        if (nbd->sent < size_of(slot))
            return;
        nbd->sent -= size_of(slot);
        slot->awaits = 1;
        nbd->unsent_first = (nbd->unsent_first + 1) % RING_SLOTS;
        nbd->unsent_count--;
    }
}

void nbd_send(struct ring *ring, struct nbd *nbd)
{
    while (nbd->unsent_count && !nbd->is_lost) {
        uint64_t bytes;
        struct msghdr message = {.msg_iov = ring->iovecs, .msg_iovlen = gather(ring, nbd, &bytes)};
        ssize_t done = sendmsg(nbd->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0) {
            if (errno != EAGAIN)
                lose(nbd);
            return;
        }
        note_sent(ring, nbd, (uint64_t)done);
        if ((uint64_t)done < bytes) /* the socket is full */
            return;
    }
}

/* So many bytes of the data that is being read are in place. */
static void note_read(struct nbd *nbd, uint64_t bytes)
{
    const struct iovec *iovecs = nbd->reading->iovecs;

    nbd->missing -= bytes;
    nbd->filled += bytes;
    while (nbd->missing && nbd->filled >= iovecs[nbd->iovec].iov_len)
        nbd->filled -= iovecs[nbd->iovec++].iov_len;
}

int nbd_receive(struct ring *ring, struct nbd *nbd)
{
    struct iovec *iovecs = ring->iovecs;
    struct msghdr message = {.msg_iov = iovecs};
    uint32_t count = 0;
    uint64_t wanted, data = 0;
    ssize_t done;

    if (nbd->is_lost || !nbd->in_flight)
        return 0;
    if (nbd->parsed) { /* what is left is the beginning of a reply */
        memmove(nbd->buffer, nbd->buffer + nbd->parsed, nbd->received - nbd->parsed);
        nbd->received -= nbd->parsed;
        nbd->parsed = 0;
    }
    if (nbd->reading) { /* and then nothing is left */
        const struct ring_slot *slot = nbd->reading;

        data = nbd->missing;
        count = slot->count - nbd->iovec;
        memcpy(iovecs, &slot->iovecs[nbd->iovec], count * sizeof *iovecs);
        iovecs->iov_base = (uint8_t *)iovecs->iov_base + nbd->filled;
        iovecs->iov_len -= nbd->filled;
    }
    iovecs[count++] = (struct iovec){nbd->buffer + nbd->received, NBD_BUFFER - nbd->received};
    wanted = data + NBD_BUFFER - nbd->received;
    message.msg_iovlen = count;
    do {
        done = recvmsg(nbd->fd, &message, MSG_DONTWAIT);
    } while (done < 0 && errno == EINTR);
    if (done < 0 && errno == EAGAIN)
        return 0;
    if (done <= 0) {
        lose(nbd);
        return 0;
    }
    if (nbd->reading)
        note_read(nbd, (uint64_t)done < data ? (uint64_t)done : data);
    if ((uint64_t)done > data)
        nbd->received += (uint32_t)((uint64_t)done - data);
    return (uint64_t)done == wanted;
}

/* Copy what the buffer has of the data that is being read. */
static void copy_read(struct nbd *nbd)
{
    while (nbd->missing && nbd->parsed < nbd->received) {
        const struct iovec *to = &nbd->reading->iovecs[nbd->iovec];
        uint64_t bytes = to->iov_len - nbd->filled;

        if (bytes > nbd->received - nbd->parsed)
            bytes = nbd->received - nbd->parsed;
        memcpy((uint8_t *)to->iov_base + nbd->filled, nbd->buffer + nbd->parsed, bytes);
        nbd->parsed += (uint32_t)bytes;
        note_read(nbd, bytes);
    }
}

/* The slot's request has ended. */
static void end(struct ring *ring, struct nbd *nbd, struct ring_slot *slot, uint64_t *index)
{
    nbd->in_flight--;
    slot->awaits = 0;
    *index = (uint64_t)(slot - ring->slots);
}

/* Take one of those that a lost connection leaves. What the server never got whole can be asked elsewhere. */
static int reap_lost(struct ring *ring, struct nbd *nbd, uint64_t *index, int64_t *result)
{
    struct ring_slot *slot = ring->slots;

    nbd->reading = NULL;
    if (!nbd->in_flight)
        return 0;
    if (nbd->unsent_count) {
        slot = &ring->slots[nbd->unsent[nbd->unsent_first]];
        nbd->unsent_first = (nbd->unsent_first + 1) % RING_SLOTS;
        nbd->unsent_count--;
        *result = -EAGAIN;
    } else {
        while (slot->nbd != nbd || !slot->awaits)
            slot++;
        *result = -ENOTCONN;
    }
    end(ring, nbd, slot, index);
    return 1;
}

/* Look at the reply that is next in the buffer; return whose it is, or NULL: it is not complete, or not right. */
static struct ring_slot *next_reply(struct ring *ring, struct nbd *nbd, uint32_t *error)
{
    struct ring_slot *slot;
    struct reply reply;
    uint64_t cookie;

    if (nbd->received - nbd->parsed < sizeof reply) {
        if (!nbd->in_flight && nbd->received != nbd->parsed) /* to nothing that was asked */
            lose(nbd);
        return NULL;
    }
    memcpy(&reply, nbd->buffer + nbd->parsed, sizeof reply);
    nbd->parsed += sizeof reply;
    cookie = be64toh(reply.cookie);
    slot = &ring->slots[cookie % RING_SLOTS];
    if (be32toh(reply.magic) != REPLY_MAGIC || slot->nbd != nbd || !slot->awaits || slot->cookie != cookie) {
        lose(nbd);
        return NULL;
    }
    *error = be32toh(reply.error);
    return slot;
}

int nbd_reap(struct ring *ring, struct nbd *nbd, uint64_t *index, int64_t *result)
{
    if (!nbd->is_lost && !nbd->reading) {
        uint32_t error = 0;
        struct ring_slot *slot = next_reply(ring, nbd, &error);

        if (slot && (error || !slot->receives)) {
            end(ring, nbd, slot, index);
            *result = error ? -errno_of(error) : (int64_t)slot->length;
            return 1;
        }
        if (slot) {
            nbd->reading = slot;
            nbd->iovec = 0;
            nbd->filled = 0;
            nbd->missing = slot->length;
        }
    }
    if (nbd->is_lost)
        return reap_lost(ring, nbd, index, result);
    if (!nbd->reading)
        return 0;
    copy_read(nbd);
    if (nbd->missing)
        return 0;
    *result = (int64_t)nbd->reading->length;
    end(ring, nbd, nbd->reading, index);
    nbd->reading = NULL;
    return 1;
}

uint32_t nbd_unsent(const struct ring *ring)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < ring->nbd_count; i++)
        count += ring->nbds[i].unsent_count;
    return count;
}

void nbd_send_all(struct ring *ring)
{
    for (uint32_t i = 0; i < ring->nbd_count; i++)
        nbd_send(ring, &ring->nbds[i]);
}

uint32_t nbd_poll(const struct ring *ring, struct pollfd *wanted)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < ring->nbd_count; i++) {
        const struct nbd *nbd = &ring->nbds[i];

        if (nbd->in_flight)
            wanted[count++] = (struct pollfd){
                .fd = nbd->fd,
                .events = (short)(POLLIN | (nbd->unsent_count ? POLLOUT : 0)),
            };
    }
    return count;
}

int nbd_has_news(const struct ring *ring)
{
    struct pollfd wanted[RING_NBDS];
    uint32_t count = nbd_poll(ring, wanted);

    for (uint32_t i = 0; i < count; i++)
        wanted[i].events = POLLIN;
    return count && poll(wanted, count, 0) > 0;
}
