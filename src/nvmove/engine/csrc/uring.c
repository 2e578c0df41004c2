#define _GNU_SOURCE
#include "uring.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "atomics.h"

static uint64_t larger(uint64_t one, uint64_t other)
{
    return one > other ? one : other;
}

int uring_open(struct uring *uring, uint32_t entries, int wake_fd)
{
    struct io_uring_params p;
    uint8_t *rings;

    memset(uring, 0, sizeof *uring);
    memset(&p, 0, sizeof p);
    uring->wake_fd = wake_fd;
    uring->fd = (int)syscall(SYS_io_uring_setup, entries + 1, &p); /* one to watch `wake_fd` */
    if (uring->fd < 0)
        return errno;
    if (!(p.features & IORING_FEAT_SINGLE_MMAP) || !(p.features & IORING_FEAT_NODROP)) { /* before Linux 5.5 */
        uring_close(uring);
        return ENOSYS;
    }
    uring->rings_size = larger(p.sq_off.array + p.sq_entries * sizeof(uint32_t),
                               p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe));
    uring->sqes_size = p.sq_entries * sizeof(struct io_uring_sqe);
    uring->rings = mmap(NULL, uring->rings_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, uring->fd,
                        IORING_OFF_SQ_RING);
    uring->sqes = mmap(NULL, uring->sqes_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, uring->fd,
                       IORING_OFF_SQES);
    if (uring->rings == MAP_FAILED || uring->sqes == MAP_FAILED) {
        int error = errno;

        uring_close(uring);
        return error;
    }
    rings = uring->rings;
    uring->sq_head = (uint32_t *)(rings + p.sq_off.head);
    uring->sq_tail = (uint32_t *)(rings + p.sq_off.tail);
    uring->sq_array = (uint32_t *)(rings + p.sq_off.array);
    uring->sq_mask = *(uint32_t *)(rings + p.sq_off.ring_mask);
    uring->sq_entries = p.sq_entries;
    uring->cq_head = (uint32_t *)(rings + p.cq_off.head);
    uring->cq_tail = (uint32_t *)(rings + p.cq_off.tail);
    uring->cq_mask = *(uint32_t *)(rings + p.cq_off.ring_mask);
    uring->cqes = (struct io_uring_cqe *)(rings + p.cq_off.cqes);
    return 0;
}

void uring_close(struct uring *uring)
{
    if (uring->rings && uring->rings != MAP_FAILED)
        munmap(uring->rings, uring->rings_size);
    if (uring->sqes && (void *)uring->sqes != MAP_FAILED)
        munmap(uring->sqes, uring->sqes_size);
    if (uring->fd >= 0)
        close(uring->fd);
    memset(uring, 0, sizeof *uring);
    uring->fd = -1;
}

/* Prepare one of which only this much is known. */
static struct io_uring_sqe *prepare(struct uring *uring, uint8_t opcode, int fd, uint64_t id)
{
    uint32_t tail = *uring->sq_tail, index = tail & uring->sq_mask;
    struct io_uring_sqe *sqe = &uring->sqes[index];

    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = opcode;
    sqe->fd = fd;
    sqe->user_data = id;
    uring->sq_array[index] = index;
    store(*uring->sq_tail, tail + 1); /* the kernel looks only when it is entered */
    uring->pending++;
    return sqe;
}

static struct io_uring_sqe *prepare_iovecs(struct uring *uring, uint8_t opcode, int fd, const struct iovec *iovecs,
                                           uint32_t count, uint64_t offset, uint64_t id)
{
    struct io_uring_sqe *sqe = prepare(uring, opcode, fd, id);

    sqe->addr = (uint64_t)(uintptr_t)iovecs;
    sqe->len = count;
    sqe->off = offset;
    return sqe;
}

void uring_prepare(struct uring *uring, int is_read, int fd, const struct iovec *iovecs, uint32_t count, uint64_t offset,
                   uint64_t id)
{
    prepare_iovecs(uring, is_read ? IORING_OP_READV : IORING_OP_WRITEV, fd, iovecs, count, offset, id);
}

void uring_prepare_durable(struct uring *uring, int is_direct, int fd, const struct iovec *iovecs, uint32_t count,
                           uint64_t offset, uint64_t id)
{
    struct io_uring_sqe *sqe = prepare_iovecs(uring, IORING_OP_WRITEV, fd, iovecs, count, offset, id);

    sqe->rw_flags = RWF_DSYNC;
    if (!is_direct)
        sqe->flags = IOSQE_ASYNC;
}

void uring_prepare_sync(struct uring *uring, int fd, uint64_t id)
{
    prepare(uring, IORING_OP_FSYNC, fd, id)->fsync_flags = IORING_FSYNC_DATASYNC;
}

void uring_prepare_allocate(struct uring *uring, int fd, int mode, uint64_t offset, uint64_t length, uint64_t id)
{
    struct io_uring_sqe *sqe = prepare(uring, IORING_OP_FALLOCATE, fd, id);

    sqe->off = offset;
    sqe->addr = length; /* io_uring's own places for these two */
    sqe->len = (uint32_t)mode;
}

int uring_submit_and_wait(struct uring *uring)
{
    long done;

    if (!uring->is_watching) {
        prepare(uring, IORING_OP_POLL_ADD, uring->wake_fd, URING_WAKE)->poll_events = POLLIN;
        uring->is_watching = 1;
    }
    done = syscall(SYS_io_uring_enter, uring->fd, uring->pending, 1, IORING_ENTER_GETEVENTS, NULL, 0);
    if (done > 0)
        uring->pending -= (uint32_t)done;
    return done < 0 && errno != EINTR ? errno : 0;
}

int uring_submit(struct uring *uring)
{
    while (uring->pending) {
        long done = syscall(SYS_io_uring_enter, uring->fd, uring->pending, 0, 0, NULL, 0);

        if (done > 0)
            uring->pending -= (uint32_t)done;
        else if (done < 0 && errno != EINTR)
            return errno;
    }
    return 0;
}

int uring_drop(struct uring *uring, uint64_t *id)
{
    while (uring->pending) {
        uint32_t tail = *uring->sq_tail - 1;

        *id = uring->sqes[tail & uring->sq_mask].user_data;
        store(*uring->sq_tail, tail);
        uring->pending--;
        if (*id != URING_WAKE)
            return 1;
        uring->is_watching = 0;
    }
    return 0;
}

int uring_has_ended(const struct uring *uring)
{
    return uring->fd >= 0 && *uring->cq_head != load(*uring->cq_tail);
}

int uring_reap(struct uring *uring, uint64_t *id, int32_t *result)
{
    const struct io_uring_cqe *cqe;
    uint32_t head;

    if (!uring_has_ended(uring))
        return 0;
    head = *uring->cq_head;
    cqe = &uring->cqes[head & uring->cq_mask];
    *id = cqe->user_data;
    *result = cqe->res;
    if (*id == URING_WAKE)
        uring->is_watching = 0;
    store(*uring->cq_head, head + 1);
    return 1;
}
