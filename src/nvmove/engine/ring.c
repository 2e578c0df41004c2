#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "prp.h"

/* NVM Command Set 1.0, 3.2.4 and 3.2.6: opcodes, and dword 12 */
#define OPCODE_WRITE 0x01
#define OPCODE_READ 0x02
#define NLB_MASK 0xffffu
#define LIMITED_RETRY (1u << 31)

#define SQE_SIZE 64
#define CQE_SIZE 16

/* Completions of quick commands are announced together, but none waits longer for that. */
#define SIGNAL_AFTER_NS 30000

/* After so many busy waits in vain, one of so many is tried. */
#define SPIN_MISSES 4
#define SPIN_SELDOM 8
/* A long busy wait leaves the processor to others, if there are any. */
#define SPIN_ALONE_NS 20000
/* The longest one where somebody else looks for the loop at intervals only. */
#define SPIN_PAGE_NS 300000

#define load(field) __atomic_load_n(&(field), __ATOMIC_ACQUIRE)
#define store(field, value) __atomic_store_n(&(field), (value), __ATOMIC_RELEASE)
#define load_strict(field) __atomic_load_n(&(field), __ATOMIC_SEQ_CST)
#define store_strict(field, value) __atomic_store_n(&(field), (value), __ATOMIC_SEQ_CST)

/* Common command format, Base 2.0 3.3.3.1: what the loop wants to know of it; little endian as this machine. */
struct sqe {
    uint8_t opcode, flags;
    uint16_t cid;
    uint32_t nsid, cdw2, cdw3;
    uint64_t mptr, prp1, prp2;
    uint32_t cdw10, cdw11, cdw12, cdw13, cdw14, cdw15;
};
_Static_assert(sizeof(struct sqe) == SQE_SIZE, "an SQE has 64 bytes");

/* Base 2.0 3.3.3.2 */
struct cqe {
    uint32_t dw0, dw1;
    uint16_t sq_head, sqid;
    uint32_t cid_and_status; /* the phase tag is bit 16 */
};
_Static_assert(sizeof(struct cqe) == CQE_SIZE, "a CQE has 16 bytes");

static int64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static uint32_t distance(uint32_t from, uint32_t to, uint32_t size)
{
    return to >= from ? to - from : to + size - from;
}

int ring_init(struct ring *ring)
{
    memset(ring, 0, sizeof *ring);
    ring->interrupt_fd = -1;
    ring->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ring->wake_fd < 0)
        return errno;
    return pthread_mutex_init(&ring->signalling, NULL);
}

void ring_destroy(struct ring *ring)
{
    if (ring->wake_fd >= 0)
        close(ring->wake_fd);
    ring->wake_fd = -1;
    pthread_mutex_destroy(&ring->signalling);
}

/* --- sleeping and waking ----------------------------------------------------------------------------------------- */

static void write_event(int fd)
{
    uint64_t one = 1;

    /* It fails only when the counter is full, and then the event is there already. */
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static void wake(struct ring *ring)
{
    if (load_strict(ring->dozing) && !__atomic_exchange_n(&ring->woken, 1, __ATOMIC_SEQ_CST))
        write_event(ring->wake_fd);
}

/* Wait for `wake`. The caller has set `dozing`, and looked after that whether there is a reason to sleep. */
static void doze(struct ring *ring)
{
    struct pollfd wanted = {.fd = ring->wake_fd, .events = POLLIN};
    uint64_t count;

    while (poll(&wanted, 1, -1) < 0 && errno == EINTR)
        ;
    if (read(ring->wake_fd, &count, sizeof count) < 0 && errno != EAGAIN && errno != EINTR)
        return;
    store_strict(ring->woken, 0);
}

void ring_kick(struct ring *ring)
{
    store_strict(ring->kicked, 1);
    store_strict(ring->rung, 1);
    wake(ring);
}

void ring_wait(struct ring *ring)
{
    store_strict(ring->dozing, 1);
    while (!__atomic_exchange_n(&ring->kicked, 0, __ATOMIC_SEQ_CST))
        doze(ring);
    store_strict(ring->dozing, 0);
}

void ring_revoke(struct ring *ring)
{
    store_strict(ring->stop, 1);
    wake(ring);
}

/* Take a ring back whose loop sleeps; it is not woken for that. */
int ring_take(struct ring *ring)
{
    uint32_t asleep = RING_ASLEEP;

    return __atomic_compare_exchange_n(&ring->state, &asleep, RING_TAKEN, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* --- doorbells --------------------------------------------------------------------------------------------------- */

/* Take a value over that the control thread was told; 0: it steps over more than `room` entries. Where the cell counts
 * it is a wake-up, and may be older than what the cell has. */
static int tell(struct ring *ring, struct ring_doorbell *bell, uint32_t value, uint32_t size, uint32_t room)
{
    if (value >= size)
        return 0;
    if (!bell->cell || load(bell->late)) {
        if (distance(bell->told, value, size) > room)
            return 0;
        store_strict(bell->told, value);
    }
    store_strict(ring->rung, 1);
    wake(ring);
    return 1;
}

/* Each returns whether the value is possible: the tail passes no entry that was not fetched, the head none posted. */

int ring_set_tail(struct ring *ring, uint32_t tail)
{
    uint32_t size = ring->sq_size, waiting = distance(load(ring->sq_head), ring->tail.told, size);

    return tell(ring, &ring->tail, tail, size, size - 1 - waiting);
}

int ring_set_head(struct ring *ring, uint32_t head)
{
    uint32_t size = ring->cq_size;

    return tell(ring, &ring->head, head, size, distance(ring->head.told, load(ring->cq_tail), size));
}

/* Look at a doorbell; 0: it has a value that steps over more than `room` entries. */
static int look(struct ring_doorbell *bell, uint32_t size, uint32_t room)
{
    uint32_t value;

    if (bell->cell) {
        value = load_strict(*bell->cell);
        if (!bell->late || value != bell->untouched) {
            store(bell->late, 0);
            if (value >= size || distance(bell->seen, value, size) > room)
                return 0;
            bell->seen = value;
            return 1;
        }
    }
    bell->seen = load_strict(bell->told);
    return 1;
}

static int look_at_both(struct ring *ring)
{
    uint32_t waiting = distance(ring->sq_head, ring->tail.seen, ring->sq_size);

    return look(&ring->tail, ring->sq_size, ring->sq_size - 1 - waiting) &&
           look(&ring->head, ring->cq_size, distance(ring->head.seen, ring->cq_tail, ring->cq_size));
}

/* Let the host ring from its next step on; whether it did one before that took effect, a look must show. */
static void arm(struct ring *ring)
{
    uint32_t used = distance(ring->head.seen, ring->cq_tail, ring->cq_size);

    if (ring->tail.event)
        store_strict(*ring->tail.event, ring->tail.seen);
    if (ring->head.event && (ring->head.always || used == ring->cq_size - 1))
        store_strict(*ring->head.event, ring->head.seen);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* --- interrupts -------------------------------------------------------------------------------------------------- */

static void announce(struct ring *ring)
{
    if (!ring->unsignalled)
        return;
    ring->unsignalled = 0;
    if (!ring->interrupt)
        return;
    pthread_mutex_lock(&ring->signalling);
    if (ring->interrupt_fd >= 0)
        write_event(ring->interrupt_fd);
    else
        ring->owed = 1;
    pthread_mutex_unlock(&ring->signalling);
}

/* On return no interrupt is under way and none will be sent: what would have been is owed. */
void ring_mute(struct ring *ring)
{
    pthread_mutex_lock(&ring->signalling);
    ring->interrupt_fd = -1;
    pthread_mutex_unlock(&ring->signalling);
}

/* --- commands ---------------------------------------------------------------------------------------------------- */

/* How many entries can be fetched: those submitted, up to the ring's end, with room for their completions. */
static uint32_t available(struct ring *ring)
{
    uint32_t count = distance(ring->sq_head, ring->tail.seen, ring->sq_size);
    uint32_t free = ring->cq_size - 1 - distance(ring->head.seen, ring->cq_tail, ring->cq_size);

    if (count > ring->sq_size - ring->sq_head)
        count = ring->sq_size - ring->sq_head;
    if (count > free)
        count = free;
    return count > RING_BATCH ? RING_BATCH : count;
}

static ssize_t transfer(const struct ring *ring, const struct ring_disk *disk, int is_read, int count, off_t offset)
{
    const struct iovec *iovecs = ring->iovecs;
    ssize_t done;

    do {
        if (count == 1 && is_read)
            done = pread(disk->fd, iovecs->iov_base, iovecs->iov_len, offset);
        else if (count == 1)
            done = pwrite(disk->fd, iovecs->iov_base, iovecs->iov_len, offset);
        else if (is_read)
            done = preadv(disk->fd, iovecs, count, offset);
        else
            done = pwritev(disk->fd, iovecs, count, offset);
    } while (done < 0 && errno == EINTR);
    return done;
}

/* Run a read or a write to its success; 0: this one is for Python, which may do it all again. */
static int execute(struct ring *ring, const struct sqe *sqe)
{
    int is_read = sqe->opcode == OPCODE_READ, count;
    const struct ring_disk *disk;
    uint64_t lba, blocks, length;

    if ((!is_read && sqe->opcode != OPCODE_WRITE) || sqe->flags || sqe->nsid >= ring->disk_count)
        return 0;
    disk = &ring->disks[sqe->nsid];
    if (!disk->present || sqe->cdw12 & ~(NLB_MASK | LIMITED_RETRY))
        return 0;
    if (!is_read && (!disk->writable || ring->durable))
        return 0;
    lba = (uint64_t)sqe->cdw11 << 32 | sqe->cdw10;
    blocks = (sqe->cdw12 & NLB_MASK) + 1;
    length = blocks << disk->shift;
    if (length > ring->max_transfer || lba > disk->blocks || blocks > disk->blocks - lba)
        return 0;
    count = prp_resolve(ring, sqe->prp1, sqe->prp2, length, is_read);
    if (count <= 0)
        return 0;
    if (disk->fd >= 0) {
        if (transfer(ring, disk, is_read, count, (off_t)(lba << disk->shift)) != (ssize_t)length)
            return 0;
    } else if (is_read && disk->zeroes) {
        for (int i = 0; i < count; i++)
            memset(ring->iovecs[i].iov_base, 0, ring->iovecs[i].iov_len);
    }
    if (is_read) {
        store(ring->counts.bytes_read, ring->counts.bytes_read + length);
        store(ring->counts.reads, ring->counts.reads + 1);
    } else {
        store(ring->counts.bytes_written, ring->counts.bytes_written + length);
        store(ring->counts.writes, ring->counts.writes + 1);
    }
    return 1;
}

/* Post a success. The positions move first: who sees the entry may ring a doorbell that builds on them. */
static void post(struct ring *ring, struct cqe *entry, uint16_t cid)
{
    uint32_t phase = ring->phase, next = ring->cq_tail + 1, head = ring->sq_head + 1;

    if (head == ring->sq_size)
        head = 0;
    store(ring->sq_head, head);
    store(ring->fetched, ring->fetched + 1);
    if (next == ring->cq_size) {
        next = 0;
        store(ring->phase, phase ^ 1);
    }
    store(ring->cq_tail, next);
    entry->dw0 = entry->dw1 = 0;
    entry->sq_head = (uint16_t)head;
    entry->sqid = ring->sqid;
    store(entry->cid_and_status, cid | phase << 16);
}

/* Run `count` commands from the head; 0: the one that is at the head now is for Python. */
static int run_batch(struct ring *ring, uint32_t count)
{
    struct sqe batch[RING_BATCH];
    uint64_t from = ring->sq_address + (uint64_t)ring->sq_head * SQE_SIZE;
    const void *entries = region_at(ring, from, (uint64_t)count * SQE_SIZE, 0);

    if (!entries)
        return 0;
    memcpy(batch, entries, (size_t)count * SQE_SIZE);
    for (uint32_t i = 0; i < count; i++) {
        struct cqe *slot;
        int done;

        if (load(ring->stop))
            return 1;
        slot = region_at(ring, ring->cq_address + (uint64_t)ring->cq_tail * CQE_SIZE, CQE_SIZE, 1);
        if (!slot)
            return 0;
        store(ring->executing, 1);
        done = execute(ring, &batch[i]);
        store(ring->executing, 0);
        if (!done)
            return 0;
        post(ring, slot, batch[i].cid);
        if (ring->interrupt && i + 1 < count) {
            int64_t now = now_ns();

            if (!ring->unsignalled)
                ring->unsignalled_since = now;
            ring->unsignalled++;
            if (now - ring->unsignalled_since > SIGNAL_AFTER_NS)
                announce(ring);
        } else {
            ring->unsignalled++;
        }
    }
    return 1;
}

/* --- the loop ---------------------------------------------------------------------------------------------------- */

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Look for work for a while; return whether there is some. Where that is in vain it is tried seldom: how soon the next
 * command would have come cannot be known from a sleep, which itself takes long to end. */
static int spin(struct ring *ring)
{
    int is_page = ring->tail.cell && ring->head.always; /* nobody wakes the loop soon there: it is always worth it */
    int64_t since, waited = 0;

    if (!ring->spin_ns || (!is_page && ring->misses >= SPIN_MISSES && ++ring->idles % SPIN_SELDOM))
        return 0;
    since = now_ns();
    do {
        if (waited > SPIN_ALONE_NS)
            sched_yield();
        for (int i = 0; i < 64; i++) {
            if (load_strict(ring->stop) || !look_at_both(ring) || available(ring)) {
                ring->misses = 0;
                return 1;
            }
            relax();
        }
        waited = now_ns() - since;
    } while (waited < (is_page ? SPIN_PAGE_NS : ring->spin_ns));
    ring->misses++;
    return 0;
}

/* Sleep until somebody rings or revokes; 0: the ring was taken back meanwhile. Asleep, guest memory is out of bounds. */
static int sleep_well(struct ring *ring)
{
    uint32_t asleep = RING_ASLEEP;

    store_strict(ring->dozing, 1);
    while (load_strict(ring->state) == RING_ASLEEP && !load_strict(ring->rung) && !load_strict(ring->stop))
        doze(ring);
    store_strict(ring->dozing, 0);
    return __atomic_compare_exchange_n(&ring->state, &asleep, RING_RUNNING, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* Run commands until there is a reason to come back. Without `may_wait` having nothing to do is one: the ring is lent
 * still, and asleep. */
enum ring_reason ring_run(struct ring *ring, int may_wait)
{
    uint32_t asleep = RING_ASLEEP;
    int was_busy = 0;

    __atomic_compare_exchange_n(&ring->state, &asleep, RING_RUNNING, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    if (load_strict(ring->state) != RING_RUNNING)
        return RING_GONE;
    for (;;) {
        uint32_t count;
        int go_on;

        store_strict(ring->rung, 0);
        if (load_strict(ring->stop))
            return RING_REVOKED;
        if (!look_at_both(ring))
            return RING_ODD;
        count = available(ring);
        if (count) {
            was_busy = 1;
            go_on = run_batch(ring, count);
            announce(ring);
            if (!go_on)
                return RING_ODD;
            continue;
        }
        if (may_wait && was_busy && spin(ring))
            continue;
        was_busy = 0;
        arm(ring);
        if (!look_at_both(ring) || available(ring))
            continue;
        store_strict(ring->state, RING_ASLEEP);
        if (!may_wait)
            return RING_IDLE;
        if (!sleep_well(ring))
            return RING_GONE;
    }
}
