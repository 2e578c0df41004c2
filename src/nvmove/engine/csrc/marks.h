/* While dirty pages are tracked: which memory was written, and reads that wait to be marked dirty. */
#ifndef NVMOVE_MARKS_H
#define NVMOVE_MARKS_H

#include "ring.h"

/* Note that all of these runs of guest memory were written. */
void note_all(struct ring *ring, const uint64_t *addresses, const struct iovec *iovecs, uint32_t count);

/* Whether it is time to mark: one batch at a time, as large as it gets, since its answer takes long. */
int has_marks(const struct ring *ring, int is_idle);
/* Take what is to be marked into `marking`, which was empty. */
void ring_take_marks(struct ring *ring);
/* Complete what is marked. */
void post_marked(struct ring *ring);
/* The pair is wanted back: what nobody has begun to mark is noted instead, and complete. */
void give_up_marks(struct ring *ring);

#endif
