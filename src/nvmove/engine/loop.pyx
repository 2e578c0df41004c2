# cython: language_level=3, embedsignature=False
"""The compiled loop as an object: a `Ring` is lent a queue pair, runs it without the GIL, and gives it back.

The loop is in csrc/run.c, its rules in csrc/ring.h; `nvmove.nvme.seams.Borrower` is the contract. `Bells` receives a client's messages
(receive.c, `nvmove.vfio.receive.Receiver`) and tells the rings their doorbells by itself.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from os import strerror
from nvmove.nvme.seams import FailedCommand
from nvmove.vfio.receive import close_all

cdef extern from "bells.h" nogil:
    cdef enum reader:
        READER_CONTROL
        READER_NOBODY
        READER_LOOP

    cdef struct c_bells "bells":
        reader reader
        int64_t tick_ns

cdef extern from "ring.h" nogil:
    cdef struct ring_region:
        uint64_t start
        uint64_t end
        uint8_t *base
        uint32_t readable
        uint32_t writable
        uint8_t *written

    cdef struct iovec:
        void *iov_base
        size_t iov_len

    int RING_KINDS
    int RING_NBDS

    cdef struct c_nbd "nbd"

    cdef struct c_ring_count "ring_count":
        uint64_t requests
        uint64_t bytes

    cdef struct ring_disk:
        uint64_t blocks
        int32_t fd
        c_nbd *nbd
        uint8_t present
        uint8_t shift
        uint8_t writable
        uint8_t zeroes
        uint32_t alignment
        uint8_t syncs
        uint8_t durable
        int32_t zeroes_mode
        int32_t unmapped_mode
        int32_t discard_mode
        c_ring_count counts[5]

    cdef struct ring_slot:
        uint8_t sqe[64]
        uint32_t order
        uint32_t failed
        int32_t error
        uint32_t count
        iovec *iovecs
        uint64_t *addresses

    cdef struct ring_doorbell:
        uint32_t seen
        uint32_t told
        uint32_t late
        uint32_t untouched
        uint32_t *cell
        uint32_t *event
        uint32_t always
        uint8_t *written

    cdef enum ring_state:
        RING_AWAY
        RING_RUNNING
        RING_ASLEEP
        RING_TAKEN

    cdef enum ring_reason:
        RING_IDLE
        RING_REVOKED
        RING_GONE
        RING_ODD
        RING_MARK

    cdef struct c_ring "ring":
        uint64_t sq_address
        uint64_t cq_address
        uint64_t max_transfer
        uint32_t sq_size
        uint32_t cq_size
        uint32_t page_shift
        uint16_t sqid
        uint8_t durable
        uint8_t interrupt
        uint8_t tracks
        uint8_t marks
        ring_region *regions
        uint32_t region_count
        ring_disk *disks
        uint32_t disk_count
        c_nbd *nbds
        uint32_t nbd_count
        int64_t spin_ns
        c_bells *bells
        ring_doorbell tail
        ring_doorbell head
        uint32_t sq_head
        uint32_t cq_tail
        uint32_t phase
        uint32_t fetched
        uint32_t executing
        ring_slot *slots
        uint32_t in_flight
        uint32_t *marking
        uint32_t marking_count
        uint64_t doorbells
        uint32_t state
        uint32_t stop
        uint32_t rung
        int32_t interrupt_fd
        uint32_t owed

    int RING_SLOTS

cdef extern from "run.h" nogil:
    int ring_init(c_ring *ring)
    void ring_destroy(c_ring *ring)
    int ring_begin(c_ring *ring)
    ring_reason ring_run(c_ring *ring, int may_wait)

cdef extern from "slots.h" nogil:
    int ring_make_slots(c_ring *ring)
    int ring_open_disks(c_ring *ring)

cdef extern from "doorbells.h" nogil:
    int ring_set_tail(c_ring *ring, uint32_t tail)
    int ring_set_head(c_ring *ring, uint32_t head)

cdef extern from "wake.h" nogil:
    void ring_kick(c_ring *ring)
    void ring_marked(c_ring *ring)

cdef extern from "attend.h" nogil:
    void ring_wait(c_ring *ring)

cdef extern from "completions.h" nogil:
    void ring_mute(c_ring *ring)

cdef extern from "marks.h" nogil:
    void ring_take_marks(c_ring *ring)

cdef extern from "park.h" nogil:
    void ring_revoke(c_ring *ring)
    int ring_take(c_ring *ring)
    void ring_halt(c_ring *ring)
    void ring_await(c_ring *ring, int64_t ns)
    void ring_end(c_ring *ring)

cdef extern from "nbd.h" nogil:
    cdef struct c_nbd "nbd":
        int32_t fd
        uint8_t can_fua
        uint32_t maximum

cdef extern from "bells.h" nogil:
    int bells_init(c_bells *bells)
    void bells_destroy(c_bells *bells)
    int bells_hang(c_bells *bells, uint32_t cell, c_ring *ring)

cdef extern from "inbox.h" nogil:
    enum:
        INBOX_MAX_FDS

cdef extern from "receive.h" nogil:
    int receive(c_bells *bells, int fd, uint8_t *buffer, size_t size, int *fds, uint32_t *fd_count)

IDLE = RING_IDLE
REVOKED = RING_REVOKED
GONE = RING_GONE
ODD = RING_ODD
MARK = RING_MARK

CONTROL = READER_CONTROL
NOBODY = READER_NOBODY
LOOP = READER_LOOP


cdef void *address(view) except NULL:
    """Where a view's memory is; who keeps the view keeps it there."""
    cdef Py_buffer buffer
    PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE)
    PyBuffer_Release(&buffer)
    return buffer.buf


cdef int set_up(ring_doorbell *bell, uint32_t position, lent) except -1:
    bell.seen = bell.told = position
    bell.late = bell.untouched = 0
    bell.cell = bell.event = NULL
    bell.written = NULL
    if lent is None:
        return 0
    bell.cell = <uint32_t *>address(lent.cell)
    bell.event = <uint32_t *>address(lent.event)
    bell.always = lent.always
    if lent.written is not None:
        bell.written = <uint8_t *>address(lent.written)
    if lent.untouched is not None:
        bell.late, bell.untouched = 1, lent.untouched
    return 0


cdef uint32_t position(ring_doorbell *bell):
    """What the loop goes by, or would if it looked."""
    return bell.told if bell.cell == NULL or bell.late else bell.seen


cdef class Bells:
    """The doorbells of one device's rings, and who receives them."""

    cdef c_bells bells

    def __cinit__(self):
        cdef int error = bells_init(&self.bells)
        if error:
            raise OSError(error, "no lock")

    def __dealloc__(self):
        bells_destroy(&self.bells)

    @property
    def reader(self):
        """Who reads the client's messages: `CONTROL`, `NOBODY` or `LOOP` (bells.h)."""
        return self.bells.reader

    @property
    def tick_ns(self):
        """After how long the control thread looks for messages while a loop that should is at work."""
        return self.bells.tick_ns

    def receive(self, sock, buffer):
        """As `nvmove.vfio.receive.Receiver`."""
        cdef int fd = sock.fileno()
        cdef int fds[INBOX_MAX_FDS + 1]
        cdef uint32_t fd_count = 0
        cdef uint8_t *memory = <uint8_t *>address(buffer)
        cdef size_t size = len(buffer)
        cdef int result
        with nogil:
            result = receive(&self.bells, fd, memory, size, fds, &fd_count)
        found = [fds[index] for index in range(fd_count)]
        if result > 0:
            return found
        close_all(found)
        if result < 0:
            raise OSError(-result, strerror(-result))
        return None


cdef class Ring:
    """A place for one queue pair, and the loop's thread that runs it."""

    cdef c_ring ring
    cdef object terms  # keeps the views of all that the loop touches
    cdef Bells bells

    def __cinit__(self, spin_us=0, Bells bells=None):
        cdef int error = ring_init(&self.ring)
        if error:
            raise OSError(error, "no eventfd")
        self.ring.spin_ns = <int64_t>spin_us * 1000
        self.bells = bells
        if bells is not None:
            self.ring.bells = &bells.bells

    def __dealloc__(self):
        ring_destroy(&self.ring)
        PyMem_Free(self.ring.regions)
        PyMem_Free(self.ring.disks)
        PyMem_Free(self.ring.nbds)

    # --- with the controller's lock --------------------------------------------------------------------------------

    def prepare(self):
        """A lease begins: revoking it counts from now on."""
        self.ring.stop = 0

    def lend(self, terms):
        """Take the queue pair over as `terms` say; False where that cannot be."""
        exports = [disk for disk in terms.disks.values() if disk.export is not None]
        if len(exports) > RING_NBDS:
            return False
        is_direct = any(disk.alignment > 1 and disk.export is None for disk in terms.disks.values())
        if is_direct and ring_open_disks(&self.ring):
            return False
        if terms.marks and ring_make_slots(&self.ring):
            return False
        self._take_memory(terms.memory)
        self._take_disks(terms.disks, len(exports))
        self.terms = terms
        ring = &self.ring
        ring.sqid = terms.sqid
        ring.sq_address, ring.sq_size = terms.sq_address, terms.sq_size
        ring.cq_address, ring.cq_size = terms.cq_address, terms.cq_size
        ring.page_shift = terms.page_size.bit_length() - 1
        ring.max_transfer = terms.max_transfer
        ring.durable, ring.marks = terms.durable, terms.marks
        ring.sq_head, ring.cq_tail, ring.phase = terms.sq_head, terms.cq_tail, terms.cq_phase
        set_up(&ring.tail, terms.sq_tail, terms.tail)
        set_up(&ring.head, terms.cq_head, terms.head)
        if not ring_begin(ring):
            self.terms = None
            return False
        ring.interrupt = terms.interrupt is not None
        ring.interrupt_fd = -1 if terms.interrupt is None else terms.interrupt
        ring.state = RING_RUNNING
        if not self._hang(ring):
            self.end()
            return False
        return True

    cdef bint _hang(self, c_ring *ring):
        """Have the doorbells told to `ring`, or with NULL no more; return whether that could be."""
        if self.bells is None or self.terms is None:
            return True
        cdef uint32_t tail = 2 * <uint32_t>self.terms.sqid, head = 2 * <uint32_t>self.terms.cqid + 1
        return not bells_hang(&self.bells.bells, tail, ring) and not bells_hang(&self.bells.bells, head, ring)

    cdef _take_memory(self, memory):
        cdef ring_region *regions = <ring_region *>PyMem_Calloc(max(len(memory), 1), sizeof(ring_region))
        if regions == NULL:
            raise MemoryError
        PyMem_Free(self.ring.regions)
        self.ring.regions, self.ring.region_count, self.ring.tracks = regions, 0, 0
        for region in memory:
            regions.start, regions.end = region.start, region.start + len(region.view)
            regions.base = <uint8_t *>address(region.view)
            regions.readable, regions.writable = region.readable, region.writable
            if region.written is not None:
                regions.written = <uint8_t *>address(region.written)
                self.ring.tracks = 1
            regions += 1
            self.ring.region_count += 1

    cdef _take_disks(self, disks, size_t exports):
        cdef uint32_t count = max(disks, default=0) + 1
        cdef ring_disk *table = <ring_disk *>PyMem_Calloc(count, sizeof(ring_disk))
        cdef c_nbd *nbd = <c_nbd *>PyMem_Calloc(max(exports, 1), sizeof(c_nbd))
        if table == NULL or nbd == NULL:
            PyMem_Free(table)
            PyMem_Free(nbd)
            raise MemoryError
        PyMem_Free(self.ring.disks)
        PyMem_Free(self.ring.nbds)
        self.ring.disks, self.ring.disk_count = table, count
        self.ring.nbds, self.ring.nbd_count = nbd, exports
        for nsid, disk in disks.items():
            entry = &table[<uint32_t>nsid]
            entry.present = 1
            entry.blocks, entry.shift = disk.blocks, disk.block_shift
            entry.writable, entry.fd, entry.zeroes = disk.writable, disk.fd, disk.zeroes
            entry.alignment = disk.alignment
            entry.syncs, entry.durable = disk.syncs, disk.durable
            entry.zeroes_mode, entry.unmapped_mode, entry.discard_mode = disk.space
            if disk.export is not None:
                nbd.fd, nbd.can_fua, nbd.maximum = disk.fd, disk.export.can_fua, disk.export.maximum
                entry.nbd = nbd
                nbd += 1

    def take(self):
        """Take the queue pair back at once if the loop sleeps; return whether it did."""
        return bool(ring_take(&self.ring))

    def end(self):
        """The queue pair was given back; from here on the positions stay as they are."""
        self._hang(NULL)
        ring_end(&self.ring)
        self.terms = None

    def set_tail(self, uint32_t tail):
        """As `SubmissionQueue.set_tail`."""
        return bool(ring_set_tail(&self.ring, tail))

    def set_head(self, uint32_t head):
        """As `CompletionQueue.set_head`."""
        return bool(ring_set_head(&self.ring, head))

    def positions(self):
        """Return the submission queue's head and tail, the completion queue's head, tail and phase, and the fetched."""
        ring = &self.ring
        return ring.sq_head, position(&ring.tail), position(&ring.head), ring.cq_tail, ring.phase, ring.fetched

    def counts(self):
        """As `Borrower.counts`."""
        found = {}
        for nsid in range(self.ring.disk_count):
            disk = &self.ring.disks[nsid]
            if disk.present:
                found[nsid] = tuple([(disk.counts[kind].requests, disk.counts[kind].bytes) for kind in range(RING_KINDS)])
        return found

    @property
    def doorbells(self):
        """Doorbells told past the controller since `lend`."""
        return self.ring.doorbells

    @property
    def late(self):
        """Whether the host has not used the tail's and the head's cell in memory yet."""
        return bool(self.ring.tail.late), bool(self.ring.head.late)

    @property
    def executing(self):
        """Commands under way."""
        return self.ring.executing + self.ring.in_flight

    def failed(self):
        """Return the commands that the disk failed."""
        if self.ring.slots == NULL:
            return []
        found = []
        for index in range(RING_SLOTS):
            slot = &self.ring.slots[index]
            if slot.failed:
                found.append(FailedCommand(slot.order, <bytes>(<char *>slot.sqe)[:64], slot.error))
        return found

    def marking(self):
        """Return the reads that are being marked, which are not completed: which since `lend`, and their SQEs."""
        found = []
        for index in range(self.ring.marking_count):
            slot = &self.ring.slots[self.ring.marking[index]]
            found.append((slot.order, <bytes>(<char *>slot.sqe)[:64]))
        return found

    @property
    def owed(self):
        """Whether an interrupt was to be sent and could not be."""
        return bool(self.ring.owed)

    # --- any thread ------------------------------------------------------------------------------------------------

    def revoke(self):
        """Ask the loop to come back."""
        ring_revoke(&self.ring)

    def halt(self):
        """As `revoke`, for who calls `wait_halted` next and then takes the queue pair."""
        ring_halt(&self.ring)

    def wait_halted(self, double timeout):
        """Wait until the queue pair can be taken, at most `timeout` seconds."""
        cdef int64_t ns = <int64_t>(timeout * 1e9)
        with nogil:
            ring_await(&self.ring, ns)

    def mute(self):
        """No interrupt is sent any more, from this call's return on."""
        with nogil:
            ring_mute(&self.ring)

    def marked(self):
        """What `take_marks` returned is marked."""
        ring_marked(&self.ring)

    def kick(self):
        """End a `wait`, this one or the next."""
        ring_kick(&self.ring)

    # --- the ring's thread -----------------------------------------------------------------------------------------

    def run(self, bint may_wait=True):
        """Run the queue pair; return why it came back."""
        cdef ring_reason reason
        with nogil:
            reason = ring_run(&self.ring, may_wait)
        return reason

    def take_marks(self):
        """Return what is to be marked before its reads complete, as (guest address, length in bytes)."""
        ring_take_marks(&self.ring)
        runs = []
        for index in range(self.ring.marking_count):
            slot = &self.ring.slots[self.ring.marking[index]]
            for run in range(slot.count):
                runs.append((slot.addresses[run], slot.iovecs[run].iov_len))
        return runs

    def wait(self):
        """Wait for a kick."""
        with nogil:
            ring_wait(&self.ring)
