/* Commands as the loop of run.c knows them. */
#ifndef NVMOVE_SQE_H
#define NVMOVE_SQE_H

#include <stdint.h>

/* NVM Command Set 1.0, 3.2 and Base 2.0 7.1: opcodes */
#define OPCODE_FLUSH 0x00
#define OPCODE_WRITE 0x01
#define OPCODE_READ 0x02
#define OPCODE_WRITE_ZEROES 0x08
#define OPCODE_DATASET_MANAGEMENT 0x09

/* Dword 12 of Read, Write and Write Zeroes; the last one has DEAC */
#define NLB_MASK 0xffffu
#define DEALLOCATE (1u << 25)
#define FORCE_UNIT_ACCESS (1u << 30)
#define LIMITED_RETRY (1u << 31)

/* Of the flags: a fused operation */
#define FUSE 0x03

#define SQE_SIZE 64

/* Common command format, Base 2.0 3.3.3.1: what the loop wants to know of it; little endian as this machine. */
struct sqe {
    uint8_t opcode, flags;
    uint16_t cid;
    uint32_t nsid, cdw2, cdw3;
    uint64_t mptr, prp1, prp2; /* the last two: or an SGL descriptor */
    uint32_t cdw10, cdw11, cdw12, cdw13, cdw14, cdw15;
};
_Static_assert(sizeof(struct sqe) == SQE_SIZE, "an SQE has 64 bytes");

/* What became of a command. FOR_PYTHON: nothing was done that may not be done again. STARTED: it has a slot. */
enum outcome { FOR_PYTHON, DONE, STARTED };

static inline uint64_t sqe_lba(const struct sqe *sqe)
{
    return (uint64_t)sqe->cdw11 << 32 | sqe->cdw10;
}

#endif
