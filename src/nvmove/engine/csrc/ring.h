/* One I/O queue pair as the compiled loop runs it.
 *
 * Python lends a queue pair to a ring (Controller.leases); from then on the ring owns its positions. The loop runs
 * what is common: reads and writes of raw files, of exports or of no file at all, flushes, zeroes and deallocations. Before
 * anything else it stops, with nothing of it done, and Python runs that command. Nothing here takes the GIL or waits for
 * anybody who holds it.
 *
 * Who touches what: the fields under "terms" change only while the ring is not lent. Those under "loop" are written by
 * the loop alone; others may read those that are atomic. Doorbells, `stop` and `state` are atomic.
 */
#ifndef NVMOVE_RING_H
#define NVMOVE_RING_H

#include <pthread.h>
#include <stdint.h>
#include <sys/uio.h>

#include "uring.h"

struct bells;

#define RING_BATCH 16    /* entries fetched at a time */
#define RING_IOVECS 1024 /* of one command; Linux takes no more (IOV_MAX) */
#define RING_SLOTS 128   /* commands at the disk at a time */
#define SLOT_IOVECS 264  /* of one of those: 1 MiB in pages, and some */
#define SLOT_RANGES 256  /* or ranges: what a Deallocate has */
#define RING_NBDS 16     /* disks that are connections to NBD servers */
#define NBD_REQUEST_SIZE 28
#define MARK_RUNS 48     /* runs of memory marked dirty at a time: each may be a message */
#define MARK_READS 32    /* so many reads wait for no more */
#define DIRTY_PAGE 4096  /* the granularity of what was written */

/* A run of guest memory [start, end), here at `base`. */
struct ring_region {
    uint64_t start, end;
    uint8_t *base;
    uint32_t readable, writable;
    uint8_t *written; /* a byte for each page that it touches, 1: written; NULL: nobody wants to know */
};

/* What is counted, in the order of nvmove.block.backend.Operation. */
enum ring_kind { KIND_READ, KIND_WRITE, KIND_FLUSH, KIND_ZEROES, KIND_DISCARD, RING_KINDS };

/* How much of one kind was done on one namespace since the ring was lent. */
struct ring_count {
    uint64_t requests, bytes;
};

/* A namespace, at the index of its id. */
struct ring_disk {
    uint64_t blocks;
    int32_t fd;      /* < 0: none */
    struct nbd *nbd; /* `fd` is its connection; NULL: it is a file */
    uint8_t present; /* this namespace is here and active */
    uint8_t shift;   /* log2 of a block's bytes */
    uint8_t writable;
    uint8_t zeroes; /* no fd: reads give zeroes; otherwise they leave memory as it is */
    uint32_t alignment; /* > 1: O_DIRECT, to be read and written through io_uring, memory and lengths in multiples; or NBD */
    uint8_t syncs;      /* a flush does something; otherwise no write has to wait for stable storage either */
    uint8_t durable;    /* every write must be on stable storage when it completes */
    int32_t zeroes_mode, unmapped_mode, discard_mode; /* nvmove.block.lend.LentSpace; 0: nothing to do, < 0: Python's */
    struct ring_count counts[RING_KINDS]; /* atomic */
};

/* In bytes, of a file. */
struct ring_range {
    uint64_t offset, length;
};

/* A command at the disk, one that came back from there with an error, or a read whose pages are to be marked dirty. */
struct ring_slot {
    uint8_t sqe[64];
    uint32_t order; /* which since the ring was lent */
    uint32_t failed;
    int32_t error; /* of one that failed: an errno that the disk tells only once; 0: it can be asked again */
    int32_t fd;
    uint64_t length; /* of the data */
    uint32_t count;  /* of its iovecs */
    uint32_t range, range_count; /* those begun, and all, to be done one after the other in this `mode`, fallocate's or NBD's */
    int32_t mode;
    uint8_t is_direct;
    uint8_t flushes;   /* then the file is to be flushed */
    uint8_t told_once; /* what is under way may meet such an error */
    struct nbd *nbd;   /* where it is; NULL: at a file. Then also (nbd.c): */
    uint64_t cookie;
    uint8_t request[NBD_REQUEST_SIZE];
    uint8_t sends, receives; /* the data of the iovecs */
    uint8_t awaits;          /* the request was sent and has not ended */
    union {
        struct iovec iovecs[SLOT_IOVECS];
        struct ring_range ranges[SLOT_RANGES];
    };
    uint64_t addresses[SLOT_IOVECS]; /* the guest's, of reads that are tracked */
};

/* Where the values of a doorbell come from: `told`, by the control thread, or a cell in memory that the host writes. */
struct ring_doorbell {
    uint32_t seen;     /* the value that the loop goes by */
    uint32_t told;     /* atomic */
    uint32_t late;     /* atomic: the host has not used the cell yet, `told` counts */
    uint32_t untouched; /* what is in the cell until then */
    uint32_t *cell;    /* or NULL */
    uint32_t *event;   /* with a cell: where the loop says how far it has looked before it sleeps */
    uint32_t always;   /* at every sleep; otherwise only when the loop waits for this doorbell */
    uint8_t *written;  /* as of a region, for the page of `event` */
};

enum ring_state {
    RING_AWAY,    /* not lent, or about to be given back */
    RING_RUNNING, /* the loop runs commands, or looks for some */
    RING_ASLEEP,  /* lent, the loop waits or is parked: it touches nothing but `state` */
    RING_TAKEN,   /* was taken back while asleep */
};

/* Why the loop came back. */
enum ring_reason {
    RING_IDLE,    /* nothing to do, and the caller did not want to wait */
    RING_REVOKED, /* it was asked to: to be given back */
    RING_GONE,    /* it was taken back while asleep */
    RING_ODD,     /* the command at the head, or one that failed, is for Python; or a doorbell in memory cannot be */
    RING_MARK,    /* reads are to be marked dirty: `ring_take_marks`, and then come back here at once */
};

struct ring {
    /* terms */
    uint64_t sq_address, cq_address, max_transfer;
    uint32_t sq_size, cq_size, page_shift;
    uint16_t sqid;
    uint8_t durable;   /* writes must be on stable storage when they complete */
    uint8_t interrupt; /* whether the completion queue has one */
    uint8_t tracks;    /* what is written must be known: `written` of the regions */
    uint8_t marks;     /* what is read must be marked dirty by Python before the read's completion */
    struct ring_region *regions;
    uint32_t region_count;
    struct ring_disk *disks;
    uint32_t disk_count;
    struct nbd *nbds; /* those of the disks */
    uint32_t nbd_count;
    int64_t spin_ns; /* the longest busy wait */
    struct bells *bells; /* whom the client's messages are told; or NULL */

    struct ring_doorbell tail, head;

    /* loop; atomic */
    uint32_t sq_head, cq_tail, phase, fetched, executing;
    uint32_t last_region;
    struct ring_slot *slots; /* NULL: nothing needed one so far */
    struct uring uring;
    uint32_t free_slots[RING_SLOTS];
    uint32_t free_count; /* RING_SLOTS less those in flight or failed */
    uint32_t in_flight, failed; /* in flight are those at the disk, unmarked and marking */
    uint32_t unmarked[RING_SLOTS], unmarked_count; /* slots of reads whose data is in place */
    uint32_t marking[RING_SLOTS], marking_count;   /* those that Python marks now */
    uint8_t *completions; /* the completion queue, here */
    uint8_t *completions_written;
    uint32_t unsignalled; /* completions that the host was not told of */
    int64_t unsignalled_since;
    uint32_t announced; /* how far the completion queue was filled when it was told something last */
    int64_t announced_at;
    uint32_t misses; /* busy waits in a row that met no command */
    uint32_t idles;
    uint32_t reads; /* the client's messages */
    int64_t left_at; /* when it ceased to; 0: it has not, or somebody else may read by now */

    /* between threads */
    uint64_t doorbells; /* told past the controller (bells.c) */
    uint32_t state, stop /* enum stop */, rung, kicked, dozing, woken, marked;
    uint32_t attends; /* the loop reads the client's messages when it has nothing to do */
    int32_t wake_fd; /* an eventfd */
    pthread_mutex_t signalling;
    int32_t interrupt_fd; /* with `signalling`; < 0: the message is owed instead */
    uint32_t owed;

    struct iovec iovecs[RING_IOVECS];
    uint64_t addresses[RING_IOVECS]; /* each one's in the guest's memory, where it is one run too */
};

static inline void ring_count(struct ring_disk *disk, enum ring_kind kind, uint64_t requests, uint64_t bytes)
{
    struct ring_count *count = &disk->counts[kind];

    __atomic_store_n(&count->bytes, count->bytes + bytes, __ATOMIC_RELEASE);
    __atomic_store_n(&count->requests, count->requests + requests, __ATOMIC_RELEASE);
}

#endif
