/* Which ring a doorbell register belongs to while its queue pair is lent, for the thread that receives the client's
 * messages: it tells the ring itself, without Python.
 */
#ifndef NVMOVE_BELLS_H
#define NVMOVE_BELLS_H

#include <pthread.h>
#include <stdint.h>

#include "ring.h"

struct bells {
    pthread_mutex_t lock;
    uint32_t count;
    struct ring **rings; /* by doorbell cell: 2y is submission queue y's tail, 2y + 1 completion queue y's head */
};

int bells_init(struct bells *bells);
void bells_destroy(struct bells *bells);

/* A cell is `ring`'s from now on, or with NULL nobody's: on return it is told nothing more. 0, or ENOMEM. */
int bells_hang(struct bells *bells, uint32_t cell, struct ring *ring);

/* A doorbell was written. 0: no ring has taken the value, it is for the controller. */
int bells_ring(struct bells *bells, uint32_t cell, uint32_t value);

#endif
