#define _GNU_SOURCE
#include "execute.h"

#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "marks.h"
#include "nbd.h"
#include "sgl.h"
#include "slots.h"
#include "space.h"

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

    if (count > SLOT_IOVECS || (disk->nbd && length > disk->nbd->maximum))
        return 0;
    for (int i = 0; i < count; i++)
        bits |= (uintptr_t)ring->iovecs[i].iov_base | ring->iovecs[i].iov_len;
    if (!disk->nbd && bits & (disk->alignment - 1))
        return 0;
    slot = slot_take(ring, sqe, disk);
    if (!slot)
        return 0;
    slot_transfer(ring, slot, (uint32_t)count, sqe_lba(sqe) << disk->shift, length, is_durable);
    return 1;
}

enum outcome execute(struct ring *ring, const struct sqe *sqe)
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
    if (disk->fd >= 0 && (disk->nbd || disk->alignment > 1 || is_durable))
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
