/* The lattice body in C: what the files of this folder share.
 *
 * _lattice.c is the Python side. _body.c goes over polynomials and blocks of coefficients and
 * calls the steps below, of which there are variants: _generic.c for any processor, _avx2.c and
 * _ifma512.c for those of x86-64 that have more. _generic.c and _avx2.c compile one text,
 * _steps.h.
 */
#ifndef DTL_LATTICE_H
#define DTL_LATTICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are read and written as they lie in memory: little-endian"
#endif

/* Coefficients are worked on in blocks whose words stay in the innermost cache. */
enum { PRIMES = 4, BLOCK = 512, WORD_BITS = 50, NOISE_BITS = 28, VALUE_BITS = 171 };
enum { KEY_BYTES = 32, KEY_WORDS = 8, COEFFICIENT_BYTES = 25, LOW_BYTES = 6 };
enum { MAX_SLOTS = VALUE_BITS / 3, MAX_TERMS = 1 << 13, MIN_N = 64, MAX_N = 1 << 15 };
/* Keystreams are written eight ChaCha20 blocks at a time. */
enum { STREAM_BLOCKS = 8, STREAM_WORDS = 64 };

/* Lanes of a and b by constant numbers; `integers` is the type of integer vectors of that kind. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(integers, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(integers, a, b, ...) __builtin_shuffle(a, b, (integers){__VA_ARGS__})
#endif

#define WORD_MASK ((1ULL << WORD_BITS) - 1)

/* One prime p < 2^50. A factor w has beside it floor(w 2^64 / p), Shoup's trick: the quotient of
 * a w by p is the upper half of a times that, or one less. */
typedef struct {
    uint64_t p;
    uint64_t barrett;        /* floor(2^101 / p) */
    uint64_t lazy;           /* floor(2^81 / p) */
    uint64_t by_n, by_n_quotient;
    uint64_t *powers, *powers_quotient;     /* psi^brv(k) */
    uint64_t *inverses, *inverses_quotient; /* psi^-brv(k) */
    double *inverses_real;                  /* the same as float64 */
} Prime;

typedef struct {
    size_t n;
    Prime prime[PRIMES];
    uint64_t cofactor[PRIMES], cofactor_quotient[PRIMES]; /* (q / p_j)^-1 mod p_j */
    uint64_t share[PRIMES][4];                            /* q / p_j, words of 64 bits */
    uint64_t fraction[PRIMES];                            /* floor(2^113 / p_j) */
    uint64_t q[4];
} Ring;

typedef struct {
    double scale, one, limit;
    const uint32_t *noise; /* NULL: nearest, ties to even */
} Rounding;

/* Factors that bring limbs of 50 bits modulo p: limb l counts 2^(50 l). `bias` is taken off. */
typedef struct {
    uint64_t factor[4], quotient[4];
    uint64_t bias;
} Limbs;

typedef struct {
    /* ChaCha20: `blocks` (a multiple of 8) blocks from `counter` on. */
    void (*keystream)(const uint32_t key[KEY_WORDS], const uint32_t nonce[3], uint32_t counter,
                      size_t blocks, uint32_t *out);
    /* words := the coefficients of the product of `words` (below p) and `secret`, both in NTT
     * order, each result below 4 p. `secret` carries the factor 1 / n. */
    void (*pad)(const Prime *prime, size_t n, uint64_t *words, const uint64_t *secret);
    /* The number of ones of 128 bits each, 0 to 128. */
    void (*popcounts)(const uint64_t *bits, size_t count, uint64_t *out);
    /* Round and clamp; out gets e + bias. Returns whether all values are finite. */
    bool (*quantize_float)(const float *values, size_t count, const Rounding *rounding,
                           uint64_t bias, uint64_t *out, size_t *clamped);
    bool (*quantize_double)(const double *values, size_t count, const Rounding *rounding,
                            uint64_t bias, uint64_t *out, size_t *clamped);
    /* Put slots of `bits` bits at bit `place` of numbers in limbs of 50 bits. */
    void (*place)(const uint64_t *slots, size_t count, unsigned place, unsigned bits,
                  uint64_t (*limbs)[BLOCK]);
    /* sum += the numbers in limbs, brought modulo p to less than 8 p. Works on whole vectors: at
     * most seven words beyond `count` may change, here and in `shares`. */
    void (*gather)(const Prime *prime, const Limbs *factors, const uint64_t (*limbs)[BLOCK],
                   size_t count, uint64_t *sum);
    /* sum += or -= words modulo 2^50; returns whether one of them is not below p. */
    bool (*add)(const Prime *prime, bool minus, const uint64_t *words, size_t count,
                uint64_t *sum);
    /* Words modulo 2^50 into place; returns whether one of them is not below p. */
    bool (*take)(const Prime *prime, uint64_t *words, size_t count);
    /* Any 64-bit words to canonical ones. */
    void (*canonical)(const Prime *prime, uint64_t *words, size_t count);
    /* out := (words - pads + bias) cofactor, canonical; words below p, pads below 4 p. */
    void (*shares)(const Prime *prime, const uint64_t *words, const uint64_t *pads, size_t count,
                   uint64_t bias, uint64_t cofactor, uint64_t quotient, uint64_t *out);
    /* The Chinese remainder theorem: numbers in [0, q), in words of 64 bits, from their shares
     * y_j: the sum of y_j (q / p_j) less a multiple of q. */
    void (*assemble)(const Ring *ring, const uint64_t (*shares)[BLOCK], size_t count,
                     uint64_t (*numbers)[BLOCK]);
    /* `bits` bits from bit `place` on of numbers in words of 64 bits, minus bias. */
    void (*slots)(const uint64_t (*numbers)[BLOCK], size_t count, unsigned place, unsigned bits,
                  uint64_t bias, int64_t *out);
} Steps;

extern const Steps lattice_generic;
const Steps *lattice_avx2(void); /* NULL where it cannot run */
const Steps *lattice_ifma(void); /* NULL where it cannot run */

void lattice_assemble(const Ring *ring, const uint64_t (*shares)[BLOCK], size_t count,
                      uint64_t (*numbers)[BLOCK]); /* for any processor */

/* --- arithmetic of one number ---------------------------------------------------------------*/

__extension__ typedef unsigned __int128 uint128;

static inline uint64_t high(uint64_t a, uint64_t b)
{
    return (uint64_t)((uint128)a * b >> 64);
}

/* x - p where x >= p, without a branch; x < 2^63. */
static inline uint64_t subtract_once(uint64_t x, uint64_t p)
{
    const uint64_t less = x - p;
    return less + (p & (0 - (less >> 63)));
}

/* a w modulo p for any a, below 2 p. */
static inline uint64_t shoup(uint64_t a, uint64_t w, uint64_t quotient, uint64_t p)
{
    return a * w - high(a, quotient) * p;
}

/* a b modulo p for a, b < p; below 3 p. The quotient is at most two too small. */
static inline uint64_t barrett(uint64_t a, uint64_t b, const Prime *prime)
{
    const uint128 product = (uint128)a * b;
    const uint64_t quotient = (uint64_t)((uint128)(uint64_t)(product >> 49) * prime->barrett >> 52);
    return (uint64_t)product - quotient * prime->p;
}

/* --- _body.c --------------------------------------------------------------------------------*/

typedef struct {
    const uint8_t *key; /* 32 bytes */
    bool minus;
} Mask;

/* What is encoded: reals or integers, one of the three. */
typedef struct {
    const float *floats;
    const double *doubles;
    const int64_t *integers;
} Values;

typedef struct {
    unsigned slot_bits, slots;
    uint64_t first;        /* number of the first polynomial */
    size_t values;         /* values of all polynomials that are given */
} Part;

enum { LATTICE_OK, LATTICE_MEMORY, LATTICE_RANGE, LATTICE_NOT_FINITE };

int lattice_ring_set_up(Ring *ring, size_t n, const uint64_t primes[PRIMES],
                        const uint64_t roots[PRIMES]);
void lattice_ring_free(Ring *ring);

size_t lattice_coefficients(const Ring *ring, const Part *part);

void lattice_sample(const Ring *ring, const Steps *steps, const uint8_t key[KEY_BYTES],
                    uint64_t polynomial, int64_t *out);
void lattice_transform(const Ring *ring, const int64_t *small, uint64_t *out);

/* seed: NULL for nearest; first_value: place of values[0] in the vector. NULL for secret gives
 * the public body. */
int lattice_pad(const Ring *ring, const Steps *steps, const uint8_t k_a[KEY_BYTES],
                const uint64_t *secret, const uint8_t k_e[KEY_BYTES], const Mask *masks,
                size_t mask_count, const Part *part, const Values *values, double scale,
                double one, double limit, const uint8_t *seed, uint64_t first_value, uint8_t *body,
                size_t *clamped);

int lattice_open(const Ring *ring, const Steps *steps, const uint8_t k_a[KEY_BYTES],
                 const uint64_t *secret, uint64_t bound, const Part *part, const uint8_t *body,
                 int64_t *out, bool *good);

/* Sums: words of polynomial after polynomial, in each the four primes. */
enum { SUM_ADD, SUM_SUBTRACT, SUM_SUBTRACT_FROM };
int lattice_sum_body(const Ring *ring, const Steps *steps, uint64_t *sum, size_t coefficients,
                     const uint8_t *body, int how);
void lattice_sum_mask(const Ring *ring, const Steps *steps, uint64_t *sum, size_t coefficients,
                      uint64_t first, const Mask *mask);
void lattice_sum_reduce(const Ring *ring, const Steps *steps, uint64_t *sum, size_t coefficients);
void lattice_sum_write(const Ring *ring, const Steps *steps, uint64_t *sum, size_t coefficients,
                       uint8_t *body);

void lattice_overwrite(void *memory, size_t bytes);

#endif
