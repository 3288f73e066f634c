/* Batches of numbers modulo N^2, eight at a time, with AVX-512 IFMA. See _ifma.c.
 *
 * Every number is little-endian. `width` is the bytes of N; a residue modulo N^2 has 2 * width.
 * The functions trust their sizes: _kernel.c has checked them. Where a function returns int,
 * IFMA_MEMORY means that memory ran out; what the other values mean stands beside it.
 */
#ifndef DTL_IFMA_H
#define DTL_IFMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Elsewhere only ifma_unavailable and the two sizes are there. */
#if defined(DTL_EMULATED) || (defined(__x86_64__) && defined(__GNUC__))
#define IFMA_BUILT 1
#else
#define IFMA_BUILT 0
#endif

enum { IFMA_OK = 0, IFMA_REFUSED = 1, IFMA_MEMORY = -1 };
enum { IFMA_LANES = 8, IFMA_MIN_WIDTH = 32, IFMA_MAX_WIDTH = 1024, IFMA_MAX_WINDOW = 16 };

typedef struct ifma_modulus ifma_modulus;
typedef struct ifma_table ifma_table;

/* Why this machine cannot run the kernel, or NULL where it can. */
const char *ifma_unavailable(void);

/* 2^ifma_radix_bits(width) is the Montgomery radix R. */
size_t ifma_radix_bits(size_t width);

/* N odd with its top byte not zero; complement = (1 - R) mod N, `width` bytes;
 * cube = R^3 mod N^2 as the pair (a, b), each `width` bytes. NULL: no memory. */
ifma_modulus *ifma_modulus_new(const uint8_t *n, size_t width, const uint8_t *complement,
                               const uint8_t *cube);
void ifma_modulus_free(ifma_modulus *m);

/* Bytes of eight numbers in the kernel's own form: a prefix of ifma_running. */
size_t ifma_element_bytes(size_t width);

/* out[i] = product over o of batches[o][i]; scale = R^(2 operands) mod N^2 as a pair. With
 * `columns` not 0, numbers 0, columns, 2 columns, ... are taken modulo N. */
int ifma_product(const ifma_modulus *m, const uint8_t *const *batches, size_t operands,
                 size_t count, size_t columns, const uint8_t *scale, uint8_t *out);

/* Montgomery's trick, first half: running products of every eighth number. `prefixes` takes
 * an element for every eight numbers, `totals` the 8 last ones as residues. */
int ifma_running(const ifma_modulus *m, const uint8_t *batch, size_t count, uint8_t *prefixes,
                 uint8_t *totals);
/* Second half: `inverses` are R / total. */
int ifma_unwind(const ifma_modulus *m, const uint8_t *batch, size_t count,
                const uint8_t *prefixes, const uint8_t *inverses, uint8_t *out);

/* out[i] = batch[i] (1 + blocks[i] N). */
int ifma_add_blocks(const ifma_modulus *m, const uint8_t *batch, const uint8_t *blocks,
                    size_t count, uint8_t *out);

/* IFMA_REFUSED unless all are in (0, N^2). `products`, 8 x width: eight numbers whose product
 * is that of the batch modulo N but for a power of R. */
int ifma_check(const ifma_modulus *m, const uint8_t *batch, size_t count, uint8_t *products);

/* good[i] = 1 and out[i] = L(u) or L(-u) where u is 1 or -1 modulo N, else both are zero. */
int ifma_logarithms(const ifma_modulus *m, const uint8_t *batch, size_t count, uint8_t *out,
                    uint8_t *good);

/* out[i][e] = bases[i]^exponents[e], for exponents that may be known to everybody. */
int ifma_shared_powers(const ifma_modulus *m, const uint8_t *bases, size_t count,
                       const uint8_t *exponents, size_t exponent_count, size_t exponent_width,
                       uint8_t *out);

/* The same for secret exponents, of which the low `bits` bits are taken: steps and addresses
 * depend on sizes only. */
int ifma_secret_powers(const ifma_modulus *m, const uint8_t *bases, size_t count,
                       const uint8_t *exponents, size_t exponent_count, size_t exponent_width,
                       size_t bits, uint8_t *out);

/* out[k] = product over i of batch[i][k]^weights[i], by Pippenger's buckets for windows of
 * `window` bits; by Straus' method where `window` is 0. */
int ifma_weighted(const ifma_modulus *m, const uint8_t *batch, const uint8_t *weights,
                  size_t count, size_t columns, size_t weight_width, size_t window,
                  uint8_t *out);

/* A comb of rows x columns bits cut into ceil(columns / depth) blocks, for up to 8 bases;
 * ifma_table_fill must have been called for every block before ifma_table_powers is. With
 * `groups` the powers of the first base are taken modulo N. */
ifma_table *ifma_table_new(const ifma_modulus *m, const uint8_t *bases, size_t lanes,
                           size_t rows, size_t columns, size_t depth, bool groups);
void ifma_table_free(ifma_table *t);
int ifma_table_fill(ifma_table *t, size_t block);
/* out[i][lane] = bases[lane]^exponents[i] (1 + blocks[i][lane] N); `blocks` may be NULL. With
 * `masked`, steps and addresses depend on sizes only. */
int ifma_table_powers(const ifma_table *t, const uint8_t *exponents, size_t count,
                      size_t exponent_width, const uint8_t *blocks, bool masked, uint8_t *out);

#endif
