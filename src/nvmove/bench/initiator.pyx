# cython: boundscheck=False, wraparound=False, cdivision=True
"""The hot loop of a host-side NVMe driver: one I/O queue pair in shared memory, polled, without the GIL.

The rings and the data lie in memory that the device has mapped. `driver.py` makes the queues and says where all is;
types and meanings are in initiator.pyi.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int fd, const void *data, size_t length, int flags)
    int MSG_NOSIGNAL

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>
    #if defined(__x86_64__) || defined(__i386__)
    #define cpu_relax() __builtin_ia32_pause()
    #elif defined(__aarch64__)
    #define cpu_relax() __asm__ volatile("yield")
    #else
    #define cpu_relax() ((void)0)
    #endif
    static inline uint16_t load16(const void *at) { return __atomic_load_n((const uint16_t *)at, __ATOMIC_ACQUIRE); }
    static inline uint32_t load32(const void *at) { return __atomic_load_n((const uint32_t *)at, __ATOMIC_ACQUIRE); }
    static inline void store32(void *at, uint32_t value) { __atomic_store_n((uint32_t *)at, value, __ATOMIC_RELEASE); }
    static inline void full_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    static inline uint64_t now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    static inline unsigned top_bit(uint64_t value) { return 63u - (unsigned)__builtin_clzll(value); }
    static inline void sleep_ns(uint64_t ns) {
        struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
        nanosleep(&t, NULL);  /* ended early by a signal it was a shorter sleep */
    }
    """
    void cpu_relax() nogil
    uint16_t load16(const void *at) nogil
    uint32_t load32(const void *at) nogil
    void store32(void *at, uint32_t value) nogil
    void full_fence() nogil
    uint64_t now_ns() nogil
    unsigned top_bit(uint64_t value) nogil
    void sleep_ns(uint64_t ns) nogil

cdef enum:
    PAGE = 4096
    BUCKETS = 64 * 40
    SPINS = 2000            # polls in a row before the core is offered to others
    WRITE_ENTRY = 24        # an entry of REGION_WRITE_MULTI: offset, region, count, 8 bytes of data
    HEADER = 16
    NO_REPLY = 0x10
    REGION_WRITE_MULTI = 15
    DOORBELLS = 0x1000
    OPCODE_WRITE = 1
    OPCODE_READ = 2

OK, STALLED, HUNG_UP = range(3)


cdef class Ring:
    """See initiator.pyi."""

    cdef Py_buffer _view
    cdef uint8_t *_ram
    cdef uint8_t *_sq
    cdef uint8_t *_cq
    cdef uint32_t _entries, _tail, _head, _qid
    cdef uint16_t _phase
    cdef int _fd
    cdef void *_sq_cell
    cdef void *_cq_cell
    cdef void *_sq_event
    cdef void *_cq_event
    cdef Py_buffer _cells
    cdef uint32_t _sq_rung, _cq_rung
    cdef uint8_t _message[80]
    cdef uint64_t _messages
    cdef int _stop
    # the job
    cdef uint32_t _depth, _size
    cdef uint64_t _first, _blocks, _per_io, _position, _random, _issued, _limit, _seed
    cdef uint64_t _data, _lists
    cdef int _sequential, _read_percent, _check
    cdef uint8_t *_templates
    cdef uint64_t *_started
    cdef uint64_t *_where
    # what came of it
    cdef uint64_t _done, _errors, _mismatches, _elapsed, _starved
    cdef uint32_t _last_status
    cdef uint64_t _histogram[BUCKETS]

    def __cinit__(self, ram, uint64_t sq, uint64_t cq, uint32_t entries, uint32_t qid, int fd):
        PyObject_GetBuffer(ram, &self._view, PyBUF_WRITABLE)
        self._ram = <uint8_t *>self._view.buf
        if sq + entries * 64 > <uint64_t>self._view.len or cq + entries * 16 > <uint64_t>self._view.len:
            raise ValueError("the rings lie outside the memory")
        self._sq, self._cq = self._ram + sq, self._ram + cq
        self._entries, self._qid, self._fd = entries, qid, fd
        self._phase = 1

    def __dealloc__(self):
        PyBuffer_Release(&self._view)
        if self._sq_cell != NULL:
            PyBuffer_Release(&self._cells)

    def use_cells(self, cells, uint64_t sq, uint64_t cq, events):
        if self._sq_cell != NULL:
            raise ValueError("the ring has its cells already")
        cdef uint64_t size = memoryview(cells).nbytes
        if max(sq, cq, *(events or ())) + 4 > size:
            raise ValueError("the doorbells lie outside their memory")
        PyObject_GetBuffer(cells, &self._cells, PyBUF_WRITABLE)
        self._sq_cell, self._cq_cell = <uint8_t *>self._cells.buf + sq, <uint8_t *>self._cells.buf + cq
        if events is not None:
            self._sq_event = <uint8_t *>self._cells.buf + <uint64_t>events[0]
            self._cq_event = <uint8_t *>self._cells.buf + <uint64_t>events[1]

    def stop(self):
        self._stop = 1

    def run(
        self, *, uint64_t data, uint64_t lists, uint32_t depth, uint32_t size, uint32_t block, uint64_t first,
        uint64_t blocks, int read_percent, bint sequential, double seconds, uint64_t count=0, uint64_t seed=1,
        bint check=False, double stall=10.0,
    ):
        self._take_job(data, lists, depth, size, block, first, blocks, read_percent, sequential, seed)
        self._check, self._limit = check, count
        cdef int end
        try:
            self._prepare()
            with nogil:
                end = self._loop(<uint64_t>(seconds * 1e9), <uint64_t>(stall * 1e9))
        finally:
            self._free_job()
        return self._outcome(end)

    def run_ahead(
        self, *, uint64_t data, uint64_t lists, uint32_t depth, uint32_t size, uint32_t block, uint64_t first,
        uint64_t blocks, int read_percent, bint sequential, double seconds, double interval, uint64_t seed=1,
        double stall=10.0,
    ):
        self._take_job(data, lists, depth, size, block, first, blocks, read_percent, sequential, seed)
        if not 0 < interval < stall:
            raise ValueError("an interval is a time")
        cdef int end
        try:
            self._prepare()
            with nogil:
                end = self._loop_ahead(<uint64_t>(seconds * 1e9), <uint64_t>(interval * 1e9), <uint64_t>(stall * 1e9))
        finally:
            self._free_job()
        return self._outcome(end)

    def _take_job(
        self, uint64_t data, uint64_t lists, uint32_t depth, uint32_t size, uint32_t block, uint64_t first,
        uint64_t blocks, int read_percent, bint sequential, uint64_t seed
    ):
        """Check a job and make room for it; what it comes to is nothing so far."""
        cdef uint64_t limit = <uint64_t>self._view.len
        cdef uint64_t stride = (size + PAGE - 1) // PAGE * PAGE
        if not 1 <= depth < self._entries:
            raise ValueError("a ring holds one command less than it has entries")
        if not block or size % block or not size or blocks < size // block or not 0 <= read_percent <= 100:
            raise ValueError("this is no job")
        if data % PAGE or lists % PAGE or data + depth * stride > limit or lists + depth * <uint64_t>PAGE > limit:
            raise ValueError("the data lies outside the memory")
        if size > 2 << 20:
            raise ValueError("one page of PRP entries is all a command gets")
        self._data, self._lists, self._depth, self._size = data, lists, depth, size
        self._first, self._per_io = first, size // block
        self._blocks = blocks // self._per_io
        self._read_percent, self._sequential, self._check = read_percent, sequential, False
        self._seed, self._random = seed, seed * 0x9E3779B97F4A7C15u | 1
        self._limit = self._issued = self._position = 0
        self._done = self._errors = self._mismatches = self._messages = self._elapsed = self._starved = 0
        self._last_status = 0
        self._stop = 0
        memset(self._histogram, 0, sizeof(self._histogram))
        self._templates = <uint8_t *>calloc(depth, 64)
        self._started = <uint64_t *>calloc(depth, 8)
        self._where = <uint64_t *>calloc(depth, 16)
        if self._templates == NULL or self._started == NULL or self._where == NULL:
            self._free_job()
            raise MemoryError()

    cdef void _free_job(self) noexcept:
        free(self._templates)
        free(self._started)
        free(self._where)

    def _outcome(self, int end):
        """Return what initiator.pyi says of `run`."""
        histogram = {at: self._histogram[at] for at in range(BUCKETS) if self._histogram[at]}
        return (
            end, self._done, self._errors, self._mismatches, self._elapsed / 1e9, self._messages, self._last_status,
            histogram, self._starved,
        )

    cdef void _prepare(self) noexcept:
        """Make each slot's command but for its opcode and its LBA. Guest addresses are offsets in the memory."""
        cdef uint64_t stride = (self._size + PAGE - 1) // PAGE * PAGE
        cdef uint32_t slot, page, pages
        cdef uint64_t address
        cdef uint64_t *entry
        for slot in range(self._depth):
            address = self._data + slot * stride
            pages = (self._size + PAGE - 1) // PAGE
            (<uint32_t *>(self._templates + slot * 64))[0] = slot << 16
            (<uint32_t *>(self._templates + slot * 64))[1] = 1
            (<uint64_t *>(self._templates + slot * 64))[3] = address
            if pages == 2:
                (<uint64_t *>(self._templates + slot * 64))[4] = address + PAGE
            elif pages > 2:
                (<uint64_t *>(self._templates + slot * 64))[4] = self._lists + slot * <uint64_t>PAGE
                entry = <uint64_t *>(self._ram + self._lists + slot * <uint64_t>PAGE)
                for page in range(1, pages):
                    entry[page - 1] = address + page * <uint64_t>PAGE
            (<uint32_t *>(self._templates + slot * 64))[12] = <uint32_t>self._per_io - 1

    cdef uint64_t _next_random(self) noexcept nogil:
        self._random ^= self._random << 13
        self._random ^= self._random >> 7
        self._random ^= self._random << 17
        return self._random

    cdef void _submit(self, uint32_t slot, uint64_t now) noexcept nogil:
        cdef uint8_t *entry = self._sq + self._tail * <uint64_t>64
        cdef uint64_t number
        cdef bint is_read = self._read_percent == 100 or (
            self._read_percent and self._next_random() % 100 < <uint64_t>self._read_percent
        )
        if self._sequential:
            number = self._position
            self._position += 1
            if self._position == self._blocks:
                self._position = 0
        else:
            number = self._next_random() % self._blocks
        cdef uint64_t lba = self._first + number * self._per_io
        self._where[slot * 2], self._where[slot * 2 + 1] = lba, is_read
        if self._check and not is_read:
            self._fill(slot, lba)
        memcpy(entry, self._templates + slot * <uint64_t>64, 64)
        entry[0] = OPCODE_READ if is_read else OPCODE_WRITE
        (<uint64_t *>entry)[5] = lba
        self._tail += 1
        if self._tail == self._entries:
            self._tail = 0
        self._started[slot] = now
        self._issued += 1

    cdef uint64_t *_buffer(self, uint32_t slot) noexcept nogil:
        return <uint64_t *>(self._ram + (<uint64_t *>(self._templates + slot * <uint64_t>64))[3])

    cdef void _fill(self, uint32_t slot, uint64_t lba) noexcept nogil:
        cdef uint64_t *word = self._buffer(slot)
        cdef uint32_t at
        for at in range(self._size // 8):
            word[at] = (lba * 0x9E3779B97F4A7C15u) ^ (at * 0xC2B2AE3D27D4EB4Fu) ^ self._seed

    cdef bint _differs(self, uint32_t slot, uint64_t lba) noexcept nogil:
        cdef uint64_t *word = self._buffer(slot)
        cdef uint32_t at
        for at in range(self._size // 8):
            if word[at] != ((lba * 0x9E3779B97F4A7C15u) ^ (at * 0xC2B2AE3D27D4EB4Fu) ^ self._seed):
                return True
        return False

    cdef void _count(self, uint64_t ns) noexcept nogil:
        cdef unsigned top = top_bit(ns | 1)
        cdef uint64_t bucket = ns if top < 6 else (top - 5) * 64 + ((ns >> (top - 6)) & 63)
        self._histogram[bucket if bucket < BUCKETS else BUCKETS - 1] += 1

    cdef bint _is_wanted(self, void *event, uint32_t new, uint32_t old) noexcept nogil:
        """Whether a doorbell moved past the value that its other side asked to be woken at (Base 2.0 5.8)."""
        if event == NULL:
            return False
        return <uint16_t>(new - load32(event) - 1) < <uint16_t>(new - old)

    cdef int _ring(self) noexcept nogil:
        """Publish tail and head where they changed; return 0, or -1 when the device has hung up."""
        cdef bint sq = self._tail != self._sq_rung
        cdef bint cq = self._head != self._cq_rung
        cdef uint32_t old_sq = self._sq_rung, old_cq = self._cq_rung
        if not sq and not cq:
            return 0
        self._sq_rung, self._cq_rung = self._tail, self._head
        if self._sq_cell != NULL:
            if cq:
                store32(self._cq_cell, self._head)
            if sq:
                store32(self._sq_cell, self._tail)
            full_fence()  # the new values are seen before the event indexes are looked at
            sq = sq and self._is_wanted(self._sq_event, self._tail, old_sq)
            cq = cq and self._is_wanted(self._cq_event, self._head, old_cq)
            if not sq and not cq:
                return 0
        cdef uint8_t *at = self._message + HEADER + 8
        if cq:
            self._put(at, self._qid * 2 + 1, self._head)
            at += WRITE_ENTRY
        if sq:
            self._put(at, self._qid * 2, self._tail)
            at += WRITE_ENTRY
        cdef uint32_t size = <uint32_t>(at - self._message)
        (<uint16_t *>self._message)[0] = 0
        (<uint16_t *>self._message)[1] = REGION_WRITE_MULTI
        (<uint32_t *>self._message)[1] = size
        (<uint32_t *>self._message)[2] = NO_REPLY
        (<uint32_t *>self._message)[3] = 0
        (<uint64_t *>(self._message + HEADER))[0] = <uint64_t>sq + <uint64_t>cq
        self._messages += 1
        # Below the size of a socket buffer a stream socket takes all of it or waits.
        while send(self._fd, self._message, size, MSG_NOSIGNAL) < 0:
            if errno != EINTR and errno != EAGAIN:
                return -1
        return 0

    cdef void _put(self, uint8_t *at, uint32_t doorbell, uint32_t value) noexcept nogil:
        (<uint64_t *>at)[0] = DOORBELLS + doorbell * 4
        (<uint32_t *>at)[2] = 0
        (<uint32_t *>at)[3] = 4
        (<uint64_t *>at)[2] = value

    cdef bint _may_issue(self, uint64_t now, uint64_t end) noexcept nogil:
        return now < end and not self._stop and (not self._limit or self._issued < self._limit)

    cdef int _loop(self, uint64_t duration, uint64_t stall) noexcept nogil:
        cdef uint64_t begin = now_ns(), now = begin, last = begin
        cdef uint64_t end = begin + duration
        cdef uint32_t slot, in_flight = 0, spins = 0, reaped
        cdef uint16_t status
        cdef uint8_t *entry
        for slot in range(self._depth):
            if not self._may_issue(now, end):
                break
            self._submit(slot, now)
            in_flight += 1
        if self._ring():
            return 2
        while in_flight:
            reaped = 0
            while True:
                entry = self._cq + self._head * <uint64_t>16
                status = load16(entry + 14)
                if (status & 1) != self._phase:
                    break
                if not reaped:
                    now = now_ns()
                reaped += 1
                self._head += 1
                if self._head == self._entries:
                    self._head = 0
                    self._phase ^= 1
                slot = (<uint16_t *>entry)[6]
                if slot >= self._depth:
                    self._errors += 1
                    continue
                in_flight -= 1
                self._done += 1
                self._count(now - self._started[slot])
                if status >> 1:
                    self._errors += 1
                    self._last_status = status >> 1
                elif self._check and self._where[slot * 2 + 1] and self._differs(slot, self._where[slot * 2]):
                    self._mismatches += 1
                if self._may_issue(now, end):
                    self._submit(slot, now)
                    in_flight += 1
            if reaped:
                spins, last = 0, now
                if self._ring():
                    return 2
                continue
            cpu_relax()
            spins += 1
            if spins >= SPINS:
                spins = 0
                sched_yield()
                now = now_ns()
                if now - last > stall:
                    self._elapsed = now - begin
                    return 1
        self._elapsed = now - begin
        return 0

    # --- ahead: the whole queue is filled, and seldom looked at ---------------------------------------------------

    cdef int _loop_ahead(self, uint64_t duration, uint64_t interval, uint64_t stall) noexcept nogil:
        """Every entry is a command before the first is rung, so all that is to do is moving tail and head."""
        cdef uint64_t begin, now, before, last, issued = 0, taken = 0
        cdef uint32_t slot = 0, number, found, room = self._entries - 1
        cdef int end = 0
        for number in range(self._entries):
            self._submit(slot, 0)
            (<uint16_t *>(self._sq + ((self._tail or self._entries) - 1) * <uint64_t>64))[1] = <uint16_t>number
            slot = slot + 1 if slot + 1 < self._depth else 0
        # The tail is where it was, once around.
        begin = last = now = now_ns()
        while True:
            if now - begin < duration and not self._stop:
                number = room - <uint32_t>(issued - taken)
                self._tail = (self._tail + number) % self._entries
                issued += number
            if self._ring():
                return 2
            if issued == taken:
                break
            sleep_ns(interval)
            before, now = now, now_ns()
            found = self._completed()
            taken += found
            self._head += found
            if self._head >= self._entries:
                self._head -= self._entries
                self._phase ^= 1
            if found:
                last = now
            elif now - last > stall:
                end = 1
                break
            if now - begin < duration or not self._done:
                # A time in which the device ran out of commands tells how long this slept.
                self._starved += issued == taken
                if issued != taken or not self._done:
                    self._done += found
                    self._elapsed += now - before
        self._look_at_statuses()
        return end

    cdef bint _is_posted(self, uint32_t number) noexcept nogil:
        """Whether the completion that comes after `number` others from the head is there."""
        cdef uint32_t at = self._head + number
        cdef uint16_t phase = self._phase
        if at >= self._entries:
            at -= self._entries
            phase ^= 1
        return (load16(self._cq + at * <uint64_t>16 + 14) & 1) == phase

    cdef uint32_t _completed(self) noexcept nogil:
        """How many completions are there from the head on: by halving, since the device posts one after the other."""
        cdef uint32_t low = 0, high = self._entries - 1, middle
        while low < high:
            middle = (low + high) // 2
            if self._is_posted(middle):
                low = middle + 1
            else:
                high = middle
        return low

    cdef void _look_at_statuses(self) noexcept nogil:
        """Look at the last completions, which are of the same commands as those before."""
        cdef uint32_t at
        cdef uint16_t status
        for at in range(self._entries):
            status = load16(self._cq + at * <uint64_t>16 + 14) >> 1
            if status:
                self._errors += 1
                self._last_status = status
