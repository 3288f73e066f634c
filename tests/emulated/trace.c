/* Records what instrumented code does: a hash over every branch that it takes and every address
 * that it reads or writes. Two runs with the same hash took the same steps.
 *
 * The kernel is compiled with -fsanitize=thread (a call for every access to memory) and
 * -fsanitize-coverage=trace-pc (a call for every basic block), but linked with these functions
 * in the place of the sanitizers' own. This file is compiled without.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static uint64_t hash, events;
static bool recording;

/* While it records, memory comes from here, so that the same steps have the same addresses. */
static _Alignas(64) unsigned char arena[32 << 20];
static size_t used;

void *__real_aligned_alloc(size_t alignment, size_t size);
void __real_free(void *memory);

void *__wrap_aligned_alloc(size_t alignment, size_t size)
{
    if (!recording)
        return __real_aligned_alloc(alignment, size);
    unsigned char *memory = arena + used;
    used += (size + 63) / 64 * 64;
    return used > sizeof arena ? NULL : memory;
}

void __wrap_free(void *memory)
{
    if ((unsigned char *)memory < arena || (unsigned char *)memory >= arena + sizeof arena)
        __real_free(memory);
}

static void record(uint64_t value)
{
    hash = (hash ^ value) * 0x9e3779b97f4a7c15ULL;
    hash ^= hash >> 29;
    events++;
}

void trace_start(void)
{
    hash = 1;
    events = used = 0;
    recording = true;
}

uint64_t trace_stop(void)
{
    recording = false;
    return hash;
}

uint64_t trace_events(void)
{
    return events;
}

void __sanitizer_cov_trace_pc(void)
{
    record((uint64_t)__builtin_return_address(0));
}

#define ACCESS(name)                                                                            \
    void __tsan_##name(void *address)                                                           \
    {                                                                                           \
        record((uint64_t)address);                                                              \
    }
ACCESS(read1) ACCESS(read2) ACCESS(read4) ACCESS(read8) ACCESS(read16)
ACCESS(write1) ACCESS(write2) ACCESS(write4) ACCESS(write8) ACCESS(write16)
ACCESS(unaligned_read2) ACCESS(unaligned_read4) ACCESS(unaligned_read8) ACCESS(unaligned_read16)
ACCESS(unaligned_write2) ACCESS(unaligned_write4) ACCESS(unaligned_write8)
ACCESS(unaligned_write16) ACCESS(vptr_read)

void __tsan_read_range(void *address, size_t size)
{
    record((uint64_t)address);
    record(size);
}

void __tsan_write_range(void *address, size_t size)
{
    record((uint64_t)address);
    record(size);
}

void __tsan_func_entry(void *address)
{
    (void)address;
}

void __tsan_func_exit(void)
{
}

void __tsan_init(void)
{
}

void *__wrap_memcpy(void *to, const void *from, size_t size)
{
    record((uint64_t)to);
    record((uint64_t)from);
    record(size);
    return memmove(to, from, size);
}

void *__wrap_memset(void *to, int value, size_t size)
{
    unsigned char *bytes = to;
    record((uint64_t)to);
    record(size);
    for (size_t i = 0; i < size; i++)
        bytes[i] = (unsigned char)value;
    return to;
}
