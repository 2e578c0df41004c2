#include "sgl.h"

#include <string.h>

/* Common command format, Base 2.0 3.3.3.1: what the flags say of the data pointer. Value 3 is reserved, and the two that
 * mean an SGL differ in where metadata is. */
#define PSDT(flags) ((flags) >> 6)

/* SGL descriptor type and sub type, Base 2.0 4.1.2; the sub type of all of these is 0. */
#define DATA_BLOCK 0x00
#define LAST_SEGMENT 0x30

/* Linux gives a command 256 at most. */
#define DESCRIPTORS 256

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint8_t reserved[3], identifier;
};
_Static_assert(sizeof(struct descriptor) == 16, "a descriptor has 16 bytes");

/* Resolve data blocks, whose list the guest may change at any time: each is read once. */
static int blocks_resolve(struct ring *ring, const uint8_t *list, uint32_t blocks, uint64_t length, int for_writing)
{
    int count = 0;

    for (uint32_t i = 0; i < blocks; i++) {
        struct descriptor block;

        memcpy(&block, list + i * sizeof block, sizeof block);
        if (block.identifier != DATA_BLOCK || block.length > length)
            return 0;
        if (!block.length)
            continue;
        count = memory_add(ring, count, block.address, block.length, for_writing);
        if (!count)
            return 0;
        length -= block.length;
    }
    return length ? 0 : count;
}

/* One data block, or one segment of them; segments that lead to others are for Python. */
static int sgl_resolve(struct ring *ring, const struct descriptor *first, uint64_t length, int for_writing)
{
    const uint8_t *list;

    if (first->identifier == DATA_BLOCK)
        return blocks_resolve(ring, (const uint8_t *)first, 1, length, for_writing);
    if (first->identifier != LAST_SEGMENT || first->length % sizeof *first ||
        first->length / sizeof *first > DESCRIPTORS)
        return 0;
    list = region_at(ring, first->address, first->length, 0);
    return list ? blocks_resolve(ring, list, first->length / sizeof *first, length, for_writing) : 0;
}

int data_resolve(struct ring *ring, const struct sqe *sqe, uint64_t length, int for_writing)
{
    uint64_t pointer[] = {sqe->prp1, sqe->prp2};
    struct descriptor first;

    switch (PSDT(sqe->flags)) {
    case 0:
        return prp_resolve(ring, sqe->prp1, sqe->prp2, length, for_writing);
    case 1:
    case 2:
        memcpy(&first, pointer, sizeof first);
        return sgl_resolve(ring, &first, length, for_writing);
    default:
        return 0;
    }
}
