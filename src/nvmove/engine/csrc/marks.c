#include "marks.h"

#include <string.h>

#include "atomics.h"
#include "completions.h"
#include "prp.h"

void note_all(struct ring *ring, const uint64_t *addresses, const struct iovec *iovecs, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        note_written(ring, addresses[i], iovecs[i].iov_len);
}

void ring_take_marks(struct ring *ring)
{
    uint32_t taken = 0, runs = 0;

    while (taken < ring->unmarked_count) {
        runs += ring->slots[ring->unmarked[taken]].count;
        if (taken && runs > MARK_RUNS)
            break;
        ring->marking[taken] = ring->unmarked[taken];
        taken++;
    }
    ring->unmarked_count -= taken;
    memmove(ring->unmarked, ring->unmarked + taken, ring->unmarked_count * sizeof *ring->unmarked);
    store(ring->marked, 0);
    ring->marking_count = taken;
}

int has_marks(const struct ring *ring, int is_idle)
{
    int is_full = ring->unmarked_count >= MARK_READS;

    return ring->unmarked_count && !ring->marking_count && (is_idle || is_full || ring->failed);
}

void post_marked(struct ring *ring)
{
    if (!ring->marking_count || !load_strict(ring->marked))
        return;
    for (uint32_t i = 0; i < ring->marking_count; i++)
        post_slot(ring, ring->marking[i]);
    ring->marking_count = 0;
}

void give_up_marks(struct ring *ring)
{
    for (uint32_t i = 0; i < ring->unmarked_count; i++) {
        const struct ring_slot *slot = &ring->slots[ring->unmarked[i]];

        note_all(ring, slot->addresses, slot->iovecs, slot->count);
        post_slot(ring, ring->unmarked[i]);
    }
    ring->unmarked_count = 0;
}
