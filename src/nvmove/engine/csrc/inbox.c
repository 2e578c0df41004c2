#define _GNU_SOURCE
#include "inbox.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* Take over the descriptors of a message. */
static void keep_fds(struct inbox *inbox, struct msghdr *message)
{
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof *inbox->fds;

        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        memcpy(inbox->fds + inbox->fd_count, CMSG_DATA(part), count * sizeof *inbox->fds);
        inbox->fd_count += (uint32_t)count;
    }
    if (message->msg_flags & MSG_CTRUNC)
        inbox->fds[inbox->fd_count++] = INBOX_LOST;
}

/* Read until `until` bytes are there; as `inbox_fill`. The kernel closes descriptors that come with a payload. */
static int read_until(struct inbox *inbox, size_t until, int flags)
{
    while (inbox->got < until) {
        union {
            struct cmsghdr alignment;
            char bytes[CMSG_SPACE(INBOX_MAX_FDS * sizeof(int))];
        } control;
        struct iovec iovec = {.iov_base = inbox->buffer + inbox->got, .iov_len = until - inbox->got};
        struct msghdr message = {.msg_iov = &iovec, .msg_iovlen = 1};
        ssize_t count;

        /* A header comes in one piece from every client that means well. */
        if (inbox->got < sizeof(struct header) && !inbox->fd_count) {
            message.msg_control = control.bytes;
            message.msg_controllen = sizeof control.bytes;
        }
        count = recvmsg(inbox->socket, &message, MSG_CMSG_CLOEXEC | flags);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return count ? -errno : 0;
        if (message.msg_control)
            keep_fds(inbox, &message);
        inbox->got += (size_t)count;
    }
    return 1;
}

int inbox_fill(struct inbox *inbox, int flags)
{
    struct header header;
    int got = read_until(inbox, sizeof header, flags);

    if (got <= 0)
        return got;
    memcpy(&header, inbox->buffer, sizeof header);
    if (header.size < sizeof header || header.size > inbox->size)
        return 1;
    return read_until(inbox, header.size, flags);
}
