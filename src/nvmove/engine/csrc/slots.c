#define _GNU_SOURCE
#include "slots.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "atomics.h"
#include "nbd.h"

int ring_make_slots(struct ring *ring)
{
    if (!ring->slots)
        ring->slots = calloc(RING_SLOTS, sizeof *ring->slots);
    return ring->slots ? 0 : ENOMEM;
}

int ring_open_disks(struct ring *ring)
{
    int error = ring_make_slots(ring);

    if (error || ring->uring.fd >= 0)
        return error;
    return uring_open(&ring->uring, RING_SLOTS, ring->wake_fd);
}

struct ring_slot *slot_take(struct ring *ring, const struct sqe *sqe, const struct ring_disk *disk)
{
    int error = disk->nbd ? ring_make_slots(ring) : ring_open_disks(ring);

    return error ? NULL : slot_keep(ring, sqe, disk);
}

struct ring_slot *slot_keep(struct ring *ring, const struct sqe *sqe, const struct ring_disk *disk)
{
    /* No more commands are fetched than there are slots. */
    struct ring_slot *slot = &ring->slots[ring->free_slots[--ring->free_count]];

    store(ring->in_flight, ring->in_flight + 1);
    memcpy(slot->sqe, sqe, SQE_SIZE);
    slot->order = ring->fetched;
    slot->fd = disk->fd;
    slot->nbd = disk->nbd;
    slot->is_direct = disk->alignment > 1;
    slot->failed = slot->range = slot->range_count = 0;
    slot->error = slot->mode = slot->flushes = slot->told_once = 0;
    slot->length = slot->count = 0;
    return slot;
}

void slot_data(struct ring *ring, struct ring_slot *slot, uint32_t count, uint64_t length)
{
    memcpy(slot->iovecs, ring->iovecs, (size_t)count * sizeof *slot->iovecs);
    if (ring->tracks)
        memcpy(slot->addresses, ring->addresses, (size_t)count * sizeof *slot->addresses);
    slot->count = count;
    slot->length = length;
}

void slot_transfer(struct ring *ring, struct ring_slot *slot, uint32_t count, uint64_t offset, uint64_t length,
                   int is_durable)
{
    int is_read = slot->sqe[0] == OPCODE_READ;

    slot_data(ring, slot, count, length);
    slot->told_once = is_durable || slot->nbd;
    if (slot->nbd) {
        int has_fua = is_durable && slot->nbd->can_fua;

        slot->flushes = is_durable && !has_fua;
        nbd_prepare(ring, slot, is_read ? NBD_READ : NBD_WRITE, has_fua ? NBD_FUA : 0, offset, (uint32_t)length);
        return;
    }
    if (is_durable)
        uring_prepare_durable(&ring->uring, slot->is_direct, slot->fd, slot->iovecs, count, offset,
                              (uint64_t)(slot - ring->slots));
    else
        uring_prepare(&ring->uring, is_read, slot->fd, slot->iovecs, count, offset, (uint64_t)(slot - ring->slots));
}

int slot_next(struct ring *ring, struct ring_slot *slot)
{
    uint64_t id = (uint64_t)(slot - ring->slots);

    if (slot->range < slot->range_count) {
        const struct ring_range *range = &slot->ranges[slot->range++];

        if (slot->nbd)
            nbd_prepare(ring, slot, NBD_MODE_TYPE(slot->mode), NBD_MODE_FLAGS(slot->mode), range->offset,
                        (uint32_t)range->length);
        else
            uring_prepare_allocate(&ring->uring, slot->fd, slot->mode, range->offset, range->length, id);
        return 1;
    }
    if (!slot->flushes)
        return 0;
    slot->flushes = 0;
    slot->told_once = 1;
    if (slot->nbd)
        nbd_prepare(ring, slot, NBD_FLUSH, 0, 0, 0);
    else
        uring_prepare_sync(&ring->uring, slot->fd, id);
    return 1;
}

void slot_count(struct ring *ring, const struct ring_slot *slot)
{
    struct ring_disk *disk;
    struct sqe sqe;
    uint64_t bytes = 0;

    memcpy(&sqe, slot->sqe, sizeof sqe);
    disk = &ring->disks[sqe.nsid];
    for (uint32_t i = 0; i < slot->range_count; i++)
        bytes += slot->ranges[i].length;
    switch (sqe.opcode) {
    case OPCODE_READ:
        ring_count(disk, KIND_READ, 1, slot->length);
        break;
    case OPCODE_WRITE:
        ring_count(disk, KIND_WRITE, 1, slot->length);
        break;
    case OPCODE_FLUSH:
        ring_count(disk, KIND_FLUSH, 1, 0);
        break;
    case OPCODE_WRITE_ZEROES:
        ring_count(disk, KIND_ZEROES, 1, bytes);
        break;
    case OPCODE_DATASET_MANAGEMENT:
        ring_count(disk, KIND_DISCARD, slot->range_count, bytes);
        break;
    }
}

/* Whether the kernel, or the server, refused the call as such: it has not looked for errors then. */
static int is_refusal(int32_t error)
{
    return error == EINVAL || error == EOPNOTSUPP || error == ENOSYS || error == EAGAIN || error == EINTR ||
           error == ECANCELED;
}

void slot_fail(struct ring *ring, struct ring_slot *slot, int32_t result)
{
    slot->failed = 1;
    ring->failed++;
    if (slot->told_once && result < 0 && !is_refusal(-result))
        slot->error = -result;
}
