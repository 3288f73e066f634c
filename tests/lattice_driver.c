/* The lattice kernel without Python, for tests of other processors and of memory.
 *
 * Reads one case from standard input (tests/test_lattice.py writes it), pads, takes the masks off
 * again, opens, and writes all results to standard output. Built with -Dmalloc=probe_malloc,
 * -Dcalloc=probe_calloc and -Dfree=probe_free for the kernel's own files, it also checks that
 * what pad and open give back was overwritten.
 */
#include "_lattice.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef malloc
#undef calloc
#undef free

enum { MAX_BLOCKS = 64 };
static struct {
    uint8_t *memory;
    size_t bytes;
} blocks[MAX_BLOCKS];
static bool probing;

void *probe_malloc(size_t bytes);
void *probe_calloc(size_t count, size_t bytes);
void probe_free(void *memory);

static void fail(const char *why)
{
    fprintf(stderr, "%s\n", why);
    exit(1);
}

void *probe_malloc(size_t bytes)
{
    void *memory = malloc(bytes);
    for (int i = 0; i < MAX_BLOCKS; i++)
        if (!blocks[i].memory) {
            blocks[i].memory = memory;
            blocks[i].bytes = bytes;
            return memory;
        }
    fail("too many blocks");
    return NULL;
}

void *probe_calloc(size_t count, size_t bytes)
{
    void *memory = probe_malloc(count * bytes);
    return memory ? memset(memory, 0, count * bytes) : NULL;
}

void probe_free(void *memory)
{
    for (int i = 0; memory && i < MAX_BLOCKS; i++)
        if (blocks[i].memory == memory) {
            for (size_t at = 0; probing && at < blocks[i].bytes; at++)
                if (blocks[i].memory[at])
                    fail("not overwritten");
            blocks[i].memory = NULL;
        }
    free(memory);
}

static void get(void *to, size_t bytes)
{
    if (bytes && fread(to, bytes, 1, stdin) != 1)
        fail("the case is too short");
}

static void put(const void *from, size_t bytes)
{
    if (bytes && fwrite(from, bytes, 1, stdout) != 1)
        fail("cannot write");
}

int main(int count, char **arguments)
{
    struct {
        uint64_t n, primes[PRIMES], roots[PRIMES], slot_bits, values, first, first_value, kind;
        uint64_t seeded, masks;
        double scale, one, limit;
        uint8_t k_a[KEY_BYTES], k_s[KEY_BYTES], k_e[KEY_BYTES], seed[KEY_BYTES];
    } given;
    const char *name = count > 1 ? arguments[1] : "generic";
    const Steps *steps = !strcmp(name, "avx2")   ? lattice_avx2()
                         : !strcmp(name, "ifma") ? lattice_ifma()
                                                 : &lattice_generic;
    if (!steps)
        fail("this variant cannot run here");
    get(&given, sizeof given);
    const size_t n = (size_t)given.n, values = (size_t)given.values;
    Ring ring;
    lattice_ring_set_up(&ring, n, given.primes, given.roots);
    const Part part = {(unsigned)given.slot_bits, VALUE_BITS / (unsigned)given.slot_bits,
                       given.first, values};
    const size_t coefficients = lattice_coefficients(&ring, &part);
    Mask *masks = calloc((size_t)given.masks + 1, sizeof *masks);
    for (size_t i = 0; i < given.masks; i++) {
        uint8_t sign, *key = malloc(KEY_BYTES);
        get(&sign, 1);
        get(key, KEY_BYTES);
        masks[i] = (Mask){key, sign != 0};
    }
    void *data = malloc(8 * values);
    get(data, (given.kind ? 8 : 4) * values);
    const Values of = {given.kind == 0 ? data : NULL, given.kind == 1 ? data : NULL,
                       given.kind == 2 ? data : NULL};

    int64_t *small = malloc(8 * n), *opened = calloc(values, 8);
    uint64_t *secret = malloc(8 * PRIMES * n), *sum = calloc(PRIMES * coefficients, 8);
    uint8_t *body = malloc(COEFFICIENT_BYTES * coefficients);
    size_t clamped = 0;
    bool good = false;
    lattice_sample(&ring, steps, given.k_s, 0, small);
    lattice_transform(&ring, small, secret);
    probing = true;
    const int padded = lattice_pad(
        &ring, steps, given.k_a, secret, given.k_e, masks, (size_t)given.masks, &part, &of,
        given.scale, given.one, given.limit, given.seeded ? given.seed : NULL, given.first_value,
        body, &clamped);
    probing = false;
    put(body, COEFFICIENT_BYTES * coefficients);
    lattice_sum_body(&ring, steps, sum, coefficients, body, SUM_ADD);
    for (size_t i = 0; i < given.masks; i++) {
        masks[i].minus = !masks[i].minus;
        lattice_sum_mask(&ring, steps, sum, coefficients, given.first, &masks[i]);
    }
    lattice_sum_write(&ring, steps, sum, coefficients, body);
    probing = true;
    const int found = lattice_open(&ring, steps, given.k_a, secret, 64, &part, body, opened, &good);
    probing = false;
    put(body, COEFFICIENT_BYTES * coefficients);
    put(opened, 8 * values);
    const uint64_t last[3] = {clamped, padded == LATTICE_OK && found == LATTICE_OK, good};
    put(last, sizeof last);
    lattice_ring_free(&ring);
    return 0;
}
