#include "bells.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int bells_init(struct bells *bells)
{
    memset(bells, 0, sizeof *bells);
    return pthread_mutex_init(&bells->lock, NULL);
}

void bells_destroy(struct bells *bells)
{
    free(bells->rings);
    pthread_mutex_destroy(&bells->lock);
}

/* Make room for `cell`; 0, or ENOMEM. */
static int grow(struct bells *bells, uint32_t cell)
{
    uint32_t count = cell + 1 > 2 * bells->count ? cell + 1 : 2 * bells->count;
    struct ring **rings = realloc(bells->rings, count * sizeof *rings);

    if (!rings)
        return ENOMEM;
    memset(rings + bells->count, 0, (count - bells->count) * sizeof *rings);
    bells->rings = rings;
    bells->count = count;
    return 0;
}

int bells_hang(struct bells *bells, uint32_t cell, struct ring *ring)
{
    int error = 0;

    pthread_mutex_lock(&bells->lock);
    if (cell >= bells->count && ring)
        error = grow(bells, cell);
    if (cell < bells->count)
        bells->rings[cell] = ring;
    pthread_mutex_unlock(&bells->lock);
    return error;
}

int bells_ring(struct bells *bells, uint32_t cell, uint32_t value)
{
    struct ring *ring;
    int is_taken = 0;

    pthread_mutex_lock(&bells->lock);
    ring = cell < bells->count ? bells->rings[cell] : NULL;
    if (ring) {
        is_taken = cell & 1 ? ring_set_head(ring, value) : ring_set_tail(ring, value);
        if (is_taken)
            __atomic_fetch_add(&ring->counts.doorbells, 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&bells->lock);
    return is_taken;
}
