#define _GNU_SOURCE
#include "slots.h"

#include <errno.h>
#include <string.h>

#define store(field, value) __atomic_store_n(&(field), (value), __ATOMIC_RELEASE)

struct ring_slot *slot_take(struct ring *ring, const struct sqe *sqe, const struct ring_disk *disk)
{
    struct ring_slot *slot;

    if (ring_open_disks(ring))
        return NULL;
    slot = &ring->slots[ring->free_slots[--ring->free_count]]; /* no more commands are fetched than there are slots */
    store(ring->in_flight, ring->in_flight + 1);
    memcpy(slot->sqe, sqe, SQE_SIZE);
    slot->order = ring->fetched;
    slot->fd = disk->fd;
    slot->is_direct = disk->alignment > 1;
    slot->failed = slot->range = slot->range_count = 0;
    slot->error = slot->mode = slot->flushes = slot->told_once = 0;
    slot->length = 0;
    return slot;
}

void slot_transfer(struct ring *ring, struct ring_slot *slot, uint32_t count, uint64_t offset, uint64_t length,
                   int is_durable)
{
    int is_read = slot->sqe[0] == OPCODE_READ;

    memcpy(slot->iovecs, ring->iovecs, (size_t)count * sizeof *slot->iovecs);
    slot->length = length;
    slot->told_once = (uint8_t)is_durable;
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

        uring_prepare_allocate(&ring->uring, slot->fd, slot->mode, range->offset, range->length, id);
        return 1;
    }
    if (!slot->flushes)
        return 0;
    slot->flushes = 0;
    slot->told_once = 1;
    uring_prepare_sync(&ring->uring, slot->fd, id);
    return 1;
}

/* Whether the kernel refused the call as such: it has not looked for errors then. */
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
