#include "prp.h"

#include <string.h>

#include "atomics.h"

#define PRP_SIZE 8

static struct ring_region *find(struct ring *ring, uint64_t address)
{
    uint32_t low = 0, high = ring->region_count;

    if (ring->last_region < high) {
        struct ring_region *last = &ring->regions[ring->last_region];

        if (address >= last->start && address < last->end)
            return last;
    }
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;

        if (ring->regions[middle].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == ring->region_count || address < ring->regions[low].start)
        return NULL;
    ring->last_region = low;
    return &ring->regions[low];
}

void *region_at(struct ring *ring, uint64_t address, uint64_t length, int for_writing)
{
    struct ring_region *region = find(ring, address);

    if (!region || length > region->end - address || !(for_writing ? region->writable : region->readable))
        return NULL;
    return region->base + (address - region->start);
}

uint8_t *written_at(struct ring *ring, uint64_t address)
{
    struct ring_region *region = find(ring, address);

    if (!region || !region->written)
        return NULL;
    return region->written + (address / DIRTY_PAGE - region->start / DIRTY_PAGE);
}

void note_written(struct ring *ring, uint64_t address, uint64_t length)
{
    uint64_t end = address + length;

    while (address < end) {
        uint64_t next = (address / DIRTY_PAGE + 1) * DIRTY_PAGE;
        struct ring_region *region = find(ring, address);
        uint8_t *written = written_at(ring, address);

        /* A plain store, also where it is set: whoever has just cleared it looks at memory after that. */
        if (written)
            store(*written, 1);
        address = region && region->end < next ? region->end : next; /* a page may be of two regions */
    }
}

int memory_add(struct ring *ring, int count, uint64_t address, uint64_t length, int for_writing)
{
    while (length) {
        struct ring_region *region = find(ring, address);
        struct iovec *last = count ? &ring->iovecs[count - 1] : NULL;
        uint64_t part;
        uint8_t *base;

        if (!region || !(for_writing ? region->writable : region->readable))
            return 0;
        part = region->end - address < length ? region->end - address : length;
        base = region->base + (address - region->start);
        if (last && (uint8_t *)last->iov_base + last->iov_len == base &&
            ring->addresses[count - 1] + last->iov_len == address) {
            last->iov_len += part;
        } else {
            if (count == RING_IOVECS)
                return 0;
            ring->iovecs[count].iov_base = base;
            ring->iovecs[count].iov_len = part;
            ring->addresses[count] = address;
            count++;
        }
        address += part;
        length -= part;
    }
    return count;
}

static uint64_t least(uint64_t one, uint64_t other)
{
    return one < other ? one : other;
}

int prp_resolve(struct ring *ring, uint64_t prp1, uint64_t prp2, uint64_t length, int for_writing)
{
    uint64_t page = UINT64_C(1) << ring->page_shift, mask = page - 1, first = least(length, page - (prp1 & mask));
    int count;

    if (prp1 & 3)
        return 0;
    count = memory_add(ring, 0, prp1, first, for_writing);
    length -= first;
    if (!count || !length)
        return count;
    if (length <= page)
        return prp2 & mask ? 0 : memory_add(ring, count, prp2, length, for_writing);
    if (prp2 & (PRP_SIZE - 1))
        return 0;
    /* Each list but the first starts on a page, so each gives at least a page of data: the walk ends. */
    for (;;) {
        uint64_t room = (page - (prp2 & mask)) / PRP_SIZE, wanted = (length + mask) >> ring->page_shift;
        uint64_t entries = least(room, wanted);
        const uint8_t *list = region_at(ring, prp2, entries * PRP_SIZE, 0);

        if (!list)
            return 0;
        for (uint64_t i = 0; i < entries; i++) {
            uint64_t entry, part = least(length, page);

            memcpy(&entry, list + i * PRP_SIZE, PRP_SIZE); /* once: the guest may change it */
            if (entry & mask)
                return 0;
            if (wanted > room && i + 1 == entries) {
                prp2 = entry;
                break;
            }
            count = memory_add(ring, count, entry, part, for_writing);
            if (!count)
                return 0;
            length -= part;
        }
        if (!length)
            return count;
    }
}
