#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "receive.h"
#include "sgl.h"
#include "slots.h"

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
    ring->uring.fd = -1;
    ring->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ring->wake_fd < 0)
        return errno;
    return pthread_mutex_init(&ring->signalling, NULL);
}

void ring_destroy(struct ring *ring)
{
    uring_close(&ring->uring);
    free(ring->slots);
    if (ring->wake_fd >= 0)
        close(ring->wake_fd);
    ring->wake_fd = -1;
    pthread_mutex_destroy(&ring->signalling);
}

/* Make what commands need that a disk takes its time for; return 0 or an errno. */
int ring_open_disks(struct ring *ring)
{
    int error = ring_make_slots(ring);

    if (error || ring->uring.fd >= 0)
        return error;
    return uring_open(&ring->uring, RING_SLOTS, ring->wake_fd);
}

/* Make what commands want that are not done at once; return 0 or an errno. */
int ring_make_slots(struct ring *ring)
{
    if (!ring->slots)
        ring->slots = calloc(RING_SLOTS, sizeof *ring->slots);
    return ring->slots ? 0 : ENOMEM;
}

/* Set the loop's own fields up for a lease; 0: the completion queue is not in guest memory. */
int ring_begin(struct ring *ring)
{
    ring->last_region = ring->fetched = ring->executing = ring->unsignalled = ring->owed = 0;
    ring->in_flight = ring->failed = ring->unmarked_count = ring->marking_count = ring->marked = 0;
    for (uint32_t i = 0; i < RING_SLOTS; i++) {
        ring->free_slots[i] = i;
        if (ring->slots)
            ring->slots[i].failed = 0;
    }
    ring->free_count = RING_SLOTS;
    ring->completions = region_at(ring, ring->cq_address, (uint64_t)ring->cq_size * CQE_SIZE, 1);
    ring->completions_written = written_at(ring, ring->cq_address);
    return ring->completions != NULL;
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

/* What `wake` has written is read; whatever it was for is still to be looked at. */
static void clear_wake(struct ring *ring)
{
    uint64_t count;

    if (read(ring->wake_fd, &count, sizeof count) < 0 && errno != EAGAIN && errno != EINTR)
        return;
    store_strict(ring->woken, 0);
}

/* --- the client's messages ---------------------------------------------------------------------------------------- */

/* Be the one who reads them, if that can be; whether so. */
static int is_reader(struct ring *ring)
{
    if (!ring->reads && ring->attends)
        ring->reads = (uint32_t)bells_take(ring->bells);
    return (int)ring->reads;
}

static void read_doorbells(struct ring *ring)
{
    ring->reads = (uint32_t)receive_doorbells(ring->bells, &ring->rung);
}

/* There is something to do that does not take long. */
static void leave_messages(struct ring *ring)
{
    if (ring->reads)
        bells_leave(ring->bells);
    ring->reads = 0;
}

/* There is something that may. */
static void give_messages(struct ring *ring)
{
    if (!ring->attends && !ring->reads)
        return;
    store(ring->attends, 0);
    if (ring->reads)
        bells_return(ring->bells, -EAGAIN);
    else
        bells_give(ring->bells);
    ring->reads = 0;
}

/* Wait for `wake`, or if the client's messages are this loop's, for one. The caller has set `dozing`, and looked after
 * that whether there is a reason to sleep. */
static void doze(struct ring *ring)
{
    struct pollfd wanted[] = {{.fd = ring->wake_fd, .events = POLLIN},
                              {.fd = is_reader(ring) ? ring->bells->inbox.socket : -1, .events = POLLIN}};

    while (poll(wanted, 2, -1) < 0 && errno == EINTR)
        ;
    if (wanted[0].revents)
        clear_wake(ring);
    if (wanted[1].revents) {
        store_strict(ring->dozing, 0); /* who tells this ring something is this thread */
        read_doorbells(ring);
        store_strict(ring->dozing, 1);
    }
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

/* What `ring_take_marks` took is marked. */
void ring_marked(struct ring *ring)
{
    store_strict(ring->marked, 1);
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

static void say(struct ring_doorbell *bell, uint32_t seen)
{
    store_strict(*bell->event, seen);
    if (bell->written)
        store(*bell->written, 1);
}

/* Let the host ring from its next step on; whether it did one before that took effect, a look must show. */
static void arm(struct ring *ring)
{
    uint32_t used = distance(ring->head.seen, ring->cq_tail, ring->cq_size);

    if (ring->tail.event)
        say(&ring->tail, ring->tail.seen);
    if (ring->head.event && (ring->head.always || used == ring->cq_size - 1))
        say(&ring->head, ring->head.seen);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Doorbells are in memory that the host has mapped, and a poller compares what is there with the loop's `event`. */
static int is_page(const struct ring *ring)
{
    return ring->tail.cell && ring->head.always;
}

/* Let the host not ring at its next step: the loop looks by itself, and arms before it sleeps. */
static void disarm(struct ring *ring)
{
    if (ring->tail.event && !is_page(ring))
        say(&ring->tail, ring->tail.seen ? ring->tail.seen - 1 : ring->sq_size - 1);
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
    uint32_t free = ring->cq_size - 1 - distance(ring->head.seen, ring->cq_tail, ring->cq_size) - ring->in_flight;

    if (ring->slots && free > ring->free_count)
        free = ring->free_count;
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

    /* libc's pread and pwrite are cancellation points, which costs 4 % of a read of 4 KiB. */
    do {
        if (count == 1)
            done = syscall(is_read ? SYS_pread64 : SYS_pwrite64, disk->fd, iovecs->iov_base, iovecs->iov_len, offset);
        else if (is_read)
            done = preadv(disk->fd, iovecs, count, offset);
        else
            done = pwritev(disk->fd, iovecs, count, offset);
    } while (done < 0 && errno == EINTR);
    return done;
}

/* Give a command to a disk that takes its time; 0: it is not as such a disk wants it. */
static int start(struct ring *ring, const struct sqe *sqe, const struct ring_disk *disk, int count, uint64_t length,
                 int is_durable)
{
    struct ring_slot *slot;
    uint64_t bits = 0;

    if (count > SLOT_IOVECS)
        return 0;
    for (int i = 0; i < count; i++)
        bits |= (uintptr_t)ring->iovecs[i].iov_base | ring->iovecs[i].iov_len;
    if (bits & (disk->alignment - 1))
        return 0;
    slot = slot_take(ring, sqe, disk);
    if (!slot)
        return 0;
    slot_transfer(ring, slot, (uint32_t)count, sqe_lba(sqe) << disk->shift, length, is_durable);
    return 1;
}

static void note_all(struct ring *ring, const uint64_t *addresses, const struct iovec *iovecs, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        note_written(ring, addresses[i], iovecs[i].iov_len);
}

/* Run a command to its success, or start it. */
static enum outcome execute(struct ring *ring, const struct sqe *sqe)
{
    int is_read = sqe->opcode == OPCODE_READ, is_durable, count;
    struct ring_disk *disk;
    uint64_t lba, blocks, length;

    if (sqe->flags & FUSE || sqe->nsid >= ring->disk_count)
        return FOR_PYTHON;
    disk = &ring->disks[sqe->nsid];
    if (!disk->present)
        return FOR_PYTHON;
    if (!is_read && sqe->opcode != OPCODE_WRITE)
        return space_execute(ring, sqe, disk);
    if (sqe->cdw12 & ~(NLB_MASK | FORCE_UNIT_ACCESS | LIMITED_RETRY) || (!is_read && !disk->writable))
        return FOR_PYTHON;
    lba = sqe_lba(sqe);
    blocks = (sqe->cdw12 & NLB_MASK) + 1;
    length = blocks << disk->shift;
    if (length > ring->max_transfer || lba > disk->blocks || blocks > disk->blocks - lba)
        return FOR_PYTHON;
    count = data_resolve(ring, sqe, length, is_read);
    if (count <= 0 || (is_read && ring->marks && count > MARK_RUNS))
        return FOR_PYTHON;
    is_durable = !is_read && must_be_durable(ring, sqe, disk);
    if (disk->fd >= 0 && (disk->alignment > 1 || is_durable))
        return start(ring, sqe, disk, count, length, is_durable) ? STARTED : FOR_PYTHON;
    if (disk->fd >= 0) {
        if (transfer(ring, disk, is_read, count, (off_t)(lba << disk->shift)) != (ssize_t)length) {
            if (is_read && ring->tracks) /* some of it may be there */
                note_all(ring, ring->addresses, ring->iovecs, (uint32_t)count);
            return FOR_PYTHON;
        }
    } else if (is_read && disk->zeroes) {
        for (int i = 0; i < count; i++)
            memset(ring->iovecs[i].iov_base, 0, ring->iovecs[i].iov_len);
    }
    ring_count(disk, is_read ? KIND_READ : KIND_WRITE, 1, length);
    if (is_read && ring->marks) {
        struct ring_slot *slot = slot_keep(ring, sqe, disk);

        slot_data(ring, slot, (uint32_t)count, length);
        ring->unmarked[ring->unmarked_count++] = (uint32_t)(slot - ring->slots);
        return STARTED;
    }
    if (is_read && ring->tracks)
        note_all(ring, ring->addresses, ring->iovecs, (uint32_t)count);
    return DONE;
}

/* The entry at the head is fetched. */
static void advance(struct ring *ring)
{
    uint32_t head = ring->sq_head + 1;

    store(ring->sq_head, head == ring->sq_size ? 0 : head);
    store(ring->fetched, ring->fetched + 1);
}

/* Post a success. The tail moves first: who sees the entry may ring a doorbell that builds on it. */
static void post(struct ring *ring, uint16_t cid)
{
    struct cqe *entry = (struct cqe *)(ring->completions + (uint64_t)ring->cq_tail * CQE_SIZE);
    uint32_t phase = ring->phase, at = ring->cq_tail, next = at + 1;

    if (next == ring->cq_size) {
        next = 0;
        store(ring->phase, phase ^ 1);
    }
    store(ring->cq_tail, next);
    entry->dw0 = entry->dw1 = 0;
    entry->sq_head = (uint16_t)ring->sq_head;
    entry->sqid = ring->sqid;
    store(entry->cid_and_status, cid | phase << 16);
    if (ring->completions_written) /* no completion waits for this one: it is found when the loop has stopped */
        store(ring->completions_written[(ring->cq_address % DIRTY_PAGE + (uint64_t)at * CQE_SIZE) / DIRTY_PAGE], 1);
    ring->unsignalled++;
}

static void post_slot(struct ring *ring, uint32_t index)
{
    struct sqe sqe;

    memcpy(&sqe, ring->slots[index].sqe, sizeof sqe);
    ring->free_slots[ring->free_count++] = index;
    store(ring->in_flight, ring->in_flight - 1);
    post(ring, sqe.cid);
}

/* --- reads that wait to be marked dirty -------------------------------------------------------------------------- */

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

/* Whether it is time to mark: one batch at a time, as large as it gets, since its answer takes long. */
static int has_marks(const struct ring *ring, int is_idle)
{
    int is_full = ring->unmarked_count >= MARK_READS;

    return ring->unmarked_count && !ring->marking_count && (is_idle || is_full || ring->failed);
}

static void post_marked(struct ring *ring)
{
    if (!ring->marking_count || !load_strict(ring->marked))
        return;
    for (uint32_t i = 0; i < ring->marking_count; i++)
        post_slot(ring, ring->marking[i]);
    ring->marking_count = 0;
}

/* The pair is wanted back: what nobody has begun to mark is noted instead, and complete. */
static void give_up_marks(struct ring *ring)
{
    for (uint32_t i = 0; i < ring->unmarked_count; i++) {
        const struct ring_slot *slot = &ring->slots[ring->unmarked[i]];

        note_all(ring, slot->addresses, slot->iovecs, slot->count);
        post_slot(ring, ring->unmarked[i]);
    }
    ring->unmarked_count = 0;
}

/* Take what has ended at disks that take their time, and go on where there is more to do: successes are posted, the rest is
 * for Python. Return whether there was any. */
static int collect(struct ring *ring)
{
    uint64_t index;
    int32_t result;
    int was_any = 0;

    while (uring_reap(&ring->uring, &index, &result)) {
        struct ring_slot *slot;
        int is_read, is_done;

        if (index == URING_WAKE) {
            clear_wake(ring);
            continue;
        }
        was_any = 1;
        slot = &ring->slots[index];
        is_read = slot->sqe[0] == OPCODE_READ;
        is_done = result >= 0 && (uint64_t)result == slot->length;
        if (is_done && slot_next(ring, slot))
            continue;
        if (is_done)
            slot_count(ring, slot);
        if (is_done && is_read && ring->marks) {
            ring->unmarked[ring->unmarked_count++] = (uint32_t)index;
            continue;
        }
        if (is_read && ring->tracks) /* of one that failed some may be there */
            note_all(ring, slot->addresses, slot->iovecs, slot->count);
        if (is_done) {
            post_slot(ring, (uint32_t)index);
        } else {
            store(ring->in_flight, ring->in_flight - 1);
            slot_fail(ring, slot, result);
        }
    }
    return was_any;
}

/* Start what is prepared, and wait for something to end; what cannot be started is for Python. */
static void submit(struct ring *ring, int and_wait)
{
    uint64_t index;

    if (!(and_wait ? uring_submit_and_wait(&ring->uring) : uring_submit(&ring->uring)))
        return;
    while (uring_drop(&ring->uring, &index)) {
        store(ring->in_flight, ring->in_flight - 1);
        slot_fail(ring, &ring->slots[index], 0);
    }
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
        enum outcome outcome;

        if (load(ring->stop))
            return 1;
        store(ring->executing, 1);
        outcome = execute(ring, &batch[i]);
        store(ring->executing, 0);
        if (outcome == FOR_PYTHON)
            return 0;
        advance(ring);
        if (outcome == STARTED)
            continue;
        if (ring->interrupt && i + 1 < count) {
            int64_t now = now_ns();

            if (!ring->unsignalled)
                ring->unsignalled_since = now;
            post(ring, batch[i].cid);
            if (now - ring->unsignalled_since > SIGNAL_AFTER_NS)
                announce(ring);
        } else {
            post(ring, batch[i].cid);
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

static uint32_t at_disks(const struct ring *ring)
{
    return ring->in_flight - ring->unmarked_count - ring->marking_count;
}

/* Look for work for a while; return whether there is some. Where that is in vain it is tried seldom: how soon the next
 * command would have come cannot be known from a sleep, which itself takes long to end. */
static int spin(struct ring *ring)
{
    int64_t since, waited = 0, longest = is_page(ring) ? SPIN_PAGE_NS : ring->spin_ns;

    /* With a page nobody wakes the loop soon: it is always worth it. */
    if (!ring->spin_ns || (!is_page(ring) && ring->misses >= SPIN_MISSES && ++ring->idles % SPIN_SELDOM))
        return 0;
    submit(ring, 0);
    since = now_ns();
    do {
        if (waited > SPIN_ALONE_NS) {
            if (is_reader(ring))
                read_doorbells(ring);
            sched_yield();
        }
        for (int i = 0; i < 64; i++) {
            if (load_strict(ring->stop) || !look_at_both(ring) || available(ring) ||
                (at_disks(ring) && uring_has_ended(&ring->uring))) {
                ring->misses = 0;
                return 1;
            }
            relax();
        }
        waited = now_ns() - since;
    } while (waited < longest);
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

/* Start what is prepared, and wait for a command at a disk to end, for what is being marked, or, unless `is_ending`, for the host. The pair cannot
 * be taken meanwhile. */
static void wait_for_flight(struct ring *ring, int is_ending)
{
    int is_stopped, has_news, waits;

    give_messages(ring);
    store_strict(ring->dozing, 1);
    is_stopped = (int)load_strict(ring->stop);
    has_news = (at_disks(ring) && uring_has_ended(&ring->uring)) || (ring->marking_count && load_strict(ring->marked));
    waits = !has_news && (is_ending ? !is_stopped || at_disks(ring) : !is_stopped && !load_strict(ring->rung));
    if (at_disks(ring))
        submit(ring, waits);
    else if (waits)
        doze(ring);
    store_strict(ring->dozing, 0);
    disarm(ring);
}

/* Run commands until there is a reason to come back. Without `may_wait` having nothing to do is one: the ring is lent
 * still, and asleep. */
static enum ring_reason run(struct ring *ring, int may_wait, int may_attend)
{
    uint32_t asleep = RING_ASLEEP;
    int was_busy = 0, is_odd = 0;

    __atomic_compare_exchange_n(&ring->state, &asleep, RING_RUNNING, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    if (load_strict(ring->state) != RING_RUNNING)
        return RING_GONE;
    for (;;) {
        uint32_t count = 0, prepared = ring->uring.pending;

        store_strict(ring->rung, 0);
        if (at_disks(ring) && collect(ring))
            was_busy = 1;
        post_marked(ring);
        if (!is_odd && !ring->failed && !load_strict(ring->stop)) {
            is_odd = !look_at_both(ring);
            count = is_odd ? 0 : available(ring);
            if (count)
                leave_messages(ring);
            if (count)
                is_odd = !run_batch(ring, count);
        }
        if (prepared) /* what is prepared now starts with the next wait, or after one more batch */
            submit(ring, 0);
        if (load_strict(ring->stop))
            give_up_marks(ring);
        announce(ring);
        if (has_marks(ring, !count || is_odd)) {
            submit(ring, 0);
            return RING_MARK;
        }
        if (is_odd || ring->failed || load_strict(ring->stop)) {
            /* Whoever wants the pair back does not wait for what is being marked: Python completes that. */
            if (!ring->in_flight || (load_strict(ring->stop) && ring->in_flight == ring->marking_count))
                return is_odd || ring->failed ? RING_ODD : RING_REVOKED;
            wait_for_flight(ring, 1);
            continue;
        }
        if (count) {
            was_busy = 1;
            continue;
        }
        if (!ring->in_flight)
            store(ring->attends, may_attend);
        if (may_wait && was_busy && !ring->marking_count && spin(ring))
            continue;
        was_busy = 0;
        arm(ring);
        if (!look_at_both(ring) || available(ring))
            continue;
        if (ring->in_flight) {
            if (!may_wait && !at_disks(ring))
                return RING_IDLE;
            wait_for_flight(ring, 0);
            continue;
        }
        store_strict(ring->state, RING_ASLEEP);
        if (!may_wait)
            return RING_IDLE;
        if (!sleep_well(ring))
            return RING_GONE;
    }
}

/* Whether all that is done without a slot is done soon. */
static int is_quick(const struct ring *ring)
{
    for (uint32_t i = 0; i < ring->disk_count; i++)
        if (ring->disks[i].alignment > 1)
            return 0;
    return 1;
}

enum ring_reason ring_run(struct ring *ring, int may_wait)
{
    enum ring_reason reason = run(ring, may_wait, ring->bells && may_wait && is_quick(ring));

    give_messages(ring);
    return reason;
}
