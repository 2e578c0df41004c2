/* Fields that two threads touch. */
#ifndef NVMOVE_ATOMICS_H
#define NVMOVE_ATOMICS_H

#define load(field) __atomic_load_n(&(field), __ATOMIC_ACQUIRE)
#define store(field, value) __atomic_store_n(&(field), (value), __ATOMIC_RELEASE)
#define load_strict(field) __atomic_load_n(&(field), __ATOMIC_SEQ_CST)
#define store_strict(field, value) __atomic_store_n(&(field), (value), __ATOMIC_SEQ_CST)

#endif
