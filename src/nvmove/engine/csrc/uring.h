/* A small io_uring (io_uring(7)), for what a disk takes its time for. */
#ifndef NVMOVE_URING_H
#define NVMOVE_URING_H

#include <linux/io_uring.h>
#include <stdint.h>
#include <sys/uio.h>

#define URING_WAKE UINT64_MAX /* the id of an end that says: `wake_fd` could be read */

struct uring {
    int fd; /* < 0: not open */
    int wake_fd, is_watching;
    uint32_t pending; /* prepared and not submitted */
    uint32_t *sq_head, *sq_tail, *sq_array, sq_mask, sq_entries;
    uint32_t *cq_head, *cq_tail, cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *rings;
    uint64_t rings_size, sqes_size;
};

/* Open one for `entries` requests, whose waits end when `wake_fd` can be read, too; return 0 or an errno. */
int uring_open(struct uring *uring, uint32_t entries, int wake_fd);
void uring_close(struct uring *uring);

/* Prepare a request; the caller never has more than `entries` under way.
 * A read or a write, whose `iovecs` stay until it ends; */
void uring_prepare(struct uring *uring, int is_read, int fd, const struct iovec *iovecs, uint32_t count, uint64_t offset,
                   uint64_t id);
/* a write that ends when it is on stable storage, and never in the caller's time unless `is_direct`; */
void uring_prepare_durable(struct uring *uring, int is_direct, int fd, const struct iovec *iovecs, uint32_t count,
                           uint64_t offset, uint64_t id);
/* fdatasync; */
void uring_prepare_sync(struct uring *uring, int fd, uint64_t id);
/* fallocate. */
void uring_prepare_allocate(struct uring *uring, int fd, int mode, uint64_t offset, uint64_t length, uint64_t id);
/* Start what is prepared; return 0 or an errno, and then nothing of it was started that was not before. */
int uring_submit(struct uring *uring);
/* The same, and wait in the same system call until something has ended or `wake_fd` can be read; may return early. */
int uring_submit_and_wait(struct uring *uring);
/* Forget one that is prepared and not submitted; return whether there was one. */
int uring_drop(struct uring *uring, uint64_t *id);
/* Take one that ended; return whether there was one. `result` is a count of bytes, or -errno. With the id URING_WAKE
 * it is for the caller to read `wake_fd`. */
int uring_reap(struct uring *uring, uint64_t *id, int32_t *result);
int uring_has_ended(const struct uring *uring);

#endif
