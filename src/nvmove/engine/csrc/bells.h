/* Which ring a doorbell register belongs to while its queue pair is lent, for whoever reads the client's messages: the
 * ring is told without Python.
 *
 * Who reads them: the control thread, in whose time they come; but while all that comes is doorbells, the loop that
 * was rung last. It reads them when it has nothing else to do, so that a command wakes one thread, not two.
 *
 *     CONTROL  --a doorbell, of a ring whose loop attends-->  NOBODY    that loop is awake now
 *     NOBODY   --a loop that attends goes to sleep-->         LOOP
 *     LOOP     --it has a command, or is wanted back-->       NOBODY
 *     LOOP     --a message that is for Python-->              CONTROL
 *     NOBODY   --a loop that attends was at commands for a while-->  LOOP, which looks, and goes on
 *     NOBODY, LOOP  --a loop is about to wait for something else, or to go to Python-->  CONTROL
 *     NOBODY   --the control thread looks, after a tick: something has come-->      CONTROL
 *
 * So no message waits longer than a tick for I/O. A tick is short where loops were found held up, and gets longer while
 * they look themselves.
 */
#ifndef NVMOVE_BELLS_H
#define NVMOVE_BELLS_H

#include <pthread.h>
#include <stdint.h>

#include "inbox.h"

struct ring;

enum reader { READER_CONTROL, READER_NOBODY, READER_LOOP };

struct bells {
    pthread_mutex_t lock; /* for all but what the reader alone touches */
    uint32_t count;
    struct ring **rings; /* by doorbell cell: 2y is submission queue y's tail, 2y + 1 completion queue y's head */

    enum reader reader;
    uint32_t turns;        /* how often a loop has left the socket */
    uint32_t rests;        /* the control thread does not look */
    int64_t tick_ns;       /* how long it does not */
    pthread_cond_t called; /* wakes it */

    /* the reader's */
    struct inbox inbox;
    int32_t result; /* of `inbox_fill`, where a loop has found what is for Python */
};

int bells_init(struct bells *bells);
void bells_destroy(struct bells *bells);

/* A cell is `ring`'s from now on, or with NULL nobody's: on return it is told nothing more. 0, or ENOMEM. */
int bells_hang(struct bells *bells, uint32_t cell, struct ring *ring);

/* The reader: a doorbell was written. 0: no ring has taken the value, it is for the controller. With `may_leave` the
 * control thread may be the reader no more; then the inbox is no longer its own. */
int bells_ring(struct bells *bells, uint32_t cell, uint32_t value, int may_leave);

/* A loop that goes to sleep: read from now on, unless somebody else does; whether so. */
int bells_take(struct bells *bells);
/* The loop that reads: it has something else to do, for a short time. */
void bells_leave(struct bells *bells);
/* Any loop: the control thread is to read, if no other loop does. */
void bells_give(struct bells *bells);
/* The loop that reads: the control thread is to go on, with `result` of its `inbox_fill`. */
void bells_return(struct bells *bells, int result);
/* The control thread: wait while it is not the reader, and return `result`; -EAGAIN: it is to read on. */
int bells_stand_by(struct bells *bells);

#endif
