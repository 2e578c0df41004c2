#include "space.h"

#include <string.h>

#include "sgl.h"
#include "slots.h"

/* Dataset Management, NVM Command Set 1.0, 3.2.3: dwords 10 and 11, and a range */
#define RANGES_MASK 0xffu
#define ATTRIBUTE_DEALLOCATE (1u << 2)

#define LONGEST_REQUEST (1u << 30)

struct dsm_range {
    uint32_t attributes, blocks;
    uint64_t lba;
};
_Static_assert(sizeof(struct dsm_range) == 16, "a range has 16 bytes");

static int is_inside(const struct ring_disk *disk, uint64_t lba, uint64_t blocks)
{
    return lba <= disk->blocks && blocks <= disk->blocks - lba;
}

/* NBD has 32 bits for a length. */
static int is_short(const struct ring_disk *disk, uint64_t blocks)
{
    return !disk->nbd || blocks << disk->shift <= LONGEST_REQUEST;
}

static struct ring_range range_of(const struct ring_disk *disk, uint64_t lba, uint64_t blocks)
{
    return (struct ring_range){lba << disk->shift, blocks << disk->shift};
}

static enum outcome start(struct ring *ring, struct ring_slot *slot)
{
    slot_next(ring, slot);
    return STARTED;
}

static enum outcome flush(struct ring *ring, const struct sqe *sqe, struct ring_disk *disk)
{
    struct ring_slot *slot;

    if (!disk->syncs) {
        if (disk->writable) /* nobody is asked to flush what cannot be written */
            ring_count(disk, KIND_FLUSH, 1, 0);
        return DONE;
    }
    slot = slot_take(ring, sqe, disk);
    if (!slot)
        return FOR_PYTHON;
    slot->flushes = 1;
    return start(ring, slot);
}

static enum outcome write_zeroes(struct ring *ring, const struct sqe *sqe, struct ring_disk *disk)
{
    int32_t mode = sqe->cdw12 & DEALLOCATE ? disk->unmapped_mode : disk->zeroes_mode;
    uint64_t lba = sqe_lba(sqe), blocks = (sqe->cdw12 & NLB_MASK) + 1;
    struct ring_slot *slot;

    if (sqe->cdw12 & ~(NLB_MASK | DEALLOCATE | FORCE_UNIT_ACCESS | LIMITED_RETRY))
        return FOR_PYTHON;
    if (!disk->writable || mode < 0 || !is_inside(disk, lba, blocks))
        return FOR_PYTHON;
    if (!mode) {
        ring_count(disk, KIND_ZEROES, 1, blocks << disk->shift);
        return DONE;
    }
    slot = slot_take(ring, sqe, disk);
    if (!slot)
        return FOR_PYTHON;
    slot->mode = mode;
    slot->flushes = (uint8_t)must_be_durable(ring, sqe, disk);
    slot->ranges[0] = range_of(disk, lba, blocks);
    slot->range_count = 1;
    return start(ring, slot);
}

/* Copy a list of ranges, which the guest may change at any time; 0: it is not all there. */
static int read_ranges(struct ring *ring, const struct sqe *sqe, struct dsm_range *ranges, uint32_t count)
{
    int iovecs = data_resolve(ring, sqe, count * sizeof *ranges, 0);
    uint8_t *to = (uint8_t *)ranges;

    for (int i = 0; i < iovecs; i++) {
        memcpy(to, ring->iovecs[i].iov_base, ring->iovecs[i].iov_len);
        to += ring->iovecs[i].iov_len;
    }
    return iovecs > 0;
}

static enum outcome deallocate(struct ring *ring, const struct sqe *sqe, struct ring_disk *disk)
{
    struct dsm_range ranges[SLOT_RANGES];
    uint32_t count = (sqe->cdw10 & RANGES_MASK) + 1, used = 0;
    uint64_t bytes = 0;
    struct ring_slot *slot;

    if (!read_ranges(ring, sqe, ranges, count))
        return FOR_PYTHON;
    if (!(sqe->cdw11 & ATTRIBUTE_DEALLOCATE)) /* the other attributes are hints */
        return DONE;
    if (!disk->writable || disk->discard_mode < 0)
        return FOR_PYTHON;
    for (uint32_t i = 0; i < count; i++) {
        if (!is_inside(disk, ranges[i].lba, ranges[i].blocks) || !is_short(disk, ranges[i].blocks))
            return FOR_PYTHON;
        if (ranges[i].blocks)
            ranges[used++] = ranges[i];
        bytes += (uint64_t)ranges[i].blocks << disk->shift;
    }
    if (!disk->discard_mode || !used) {
        ring_count(disk, KIND_DISCARD, used, bytes);
        return DONE;
    }
    slot = slot_take(ring, sqe, disk);
    if (!slot)
        return FOR_PYTHON;
    slot->mode = disk->discard_mode;
    slot->range_count = used;
    for (uint32_t i = 0; i < used; i++)
        slot->ranges[i] = range_of(disk, ranges[i].lba, ranges[i].blocks);
    return start(ring, slot);
}

enum outcome space_execute(struct ring *ring, const struct sqe *sqe, struct ring_disk *disk)
{
    switch (sqe->opcode) {
    case OPCODE_FLUSH:
        return flush(ring, sqe, disk);
    case OPCODE_WRITE_ZEROES:
        return write_zeroes(ring, sqe, disk);
    case OPCODE_DATASET_MANAGEMENT:
        return deallocate(ring, sqe, disk);
    default:
        return FOR_PYTHON;
    }
}
