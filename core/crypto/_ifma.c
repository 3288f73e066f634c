/* Batches of numbers modulo N^2, eight at a time, with AVX-512 IFMA.
 *
 * Limbs. A number has L limbs of 52 bits; one vector holds the same limb of eight independent
 * numbers, one a lane. L is the least multiple of 4 with R = 2^(52 L) >= 64 N.
 *
 * Pairs. A number modulo N^2 is a pair (a, b) for a + b N. With
 *     m = -a c / N mod R  and  t = (a c + m N) / R,  that is  a c = R t - m N,
 * the product of two pairs, divided by R, is
 *     (a + b N)(c + d N) / R = t + N (a d + b c - m) / R   (mod N^2),
 * where the division by R in the second half only has to be right modulo N: another Montgomery
 * reduction. The digits of m fall out of the first one. That is three products and two
 * reductions of L limbs, against a product and a reduction of 2L limbs: 5 L^2 against 8 L^2.
 *
 * -m is not formed: R - 1 - m has the digits 2^52 - 1 - m_i, and `complement` = (1 - R) mod N
 * makes up for the rest.
 *
 * Bounds. Operands have a, b, c, d < 3N. Then t < 9 N^2 / R + N <= (1 + 9/64) N, and
 *     (a d + b c + R - 1 - m + complement + m' N) / R < 18 N^2 / R + 1 + N / R + N
 * < (1 + 18/64) N + 2. So results are operands again, and one subtraction of N makes each half
 * canonical. Nothing is compared or reduced in between.
 *
 * Accumulators hold 64 bits with a sign. A column gets at most one low and one high half of
 * less than 2^52 from each row of a product: from two products and a reduction 6 L 2^52 in all.
 * Karatsuba's middle part, of H <= L / 2 + 4 limbs, puts in mid - low - high, with each of them
 * in [0, 4 H 2^52): together with low or high itself that is within +-8 H 2^52, and the
 * reduction adds 2 L 2^52. L <= 160 makes both less than 2^62 in size, with every carry.
 * Only the finished number, which is not negative, is carried into limbs of 52 bits.
 */

#include "_ifma.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

size_t ifma_radix_bits(size_t width)
{
    return (8 * width + 6 + 207) / 208 * 208;
}

static size_t limbs_of(size_t width)
{
    return ifma_radix_bits(width) / 52;
}

size_t ifma_element_bytes(size_t width)
{
    return 2 * limbs_of(width) * 64;
}

#if IFMA_BUILT

#include <immintrin.h>

/* tests/emulated has an immintrin.h for processors without IFMA: it computes the same. */
#ifdef DTL_EMULATED
#define IFMA
#else
#define IFMA __attribute__((target("avx512f,avx512ifma")))
#endif
#define INLINE IFMA __attribute__((always_inline)) static inline
#define UNROLL _Pragma("GCC unroll 4")
#define LO _mm512_madd52lo_epu64
#define HI _mm512_madd52hi_epu64

typedef __m512i vec;

enum { BITS = 52, ROWS = 4 };
static const uint64_t LIMB = (1ULL << BITS) - 1;

struct ifma_modulus {
    size_t width, limbs;
    vec *memory;
    vec *n;          /* N in every lane */
    vec *square;     /* N^2, 2L limbs */
    vec *complement; /* (1 - R) mod N */
    vec *cube;       /* R^3 mod N^2: takes what `enter` gives into Montgomery form */
    vec *one;        /* one in Montgomery form */
    uint64_t inverse; /* -1 / N mod 2^52 */
};

const char *ifma_unavailable(void)
{
#ifndef DTL_EMULATED
    /* Asks the operating system too, whether it saves the registers. */
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512ifma"))
        return "the processor has no AVX-512 IFMA";
#endif
    return NULL;
}

/* --- memory ---------------------------------------------------------------------------------*/

static vec *allocate(size_t vectors)
{
    return vectors > SIZE_MAX / sizeof(vec) ? NULL : aligned_alloc(64, vectors * sizeof(vec));
}

/* What was computed on may be secret. */
static void release(vec *memory, size_t vectors)
{
    if (memory) {
        memset(memory, 0, vectors * sizeof(vec));
        __asm__ volatile("" : : "r"(memory) : "memory");
    }
    free(memory);
}

static size_t at_most(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* --- rows of a product ----------------------------------------------------------------------*/

/* Four rows x[0..3] times y, at four columns in the middle: s[q] += sum of x[r] y[q - r]. */
INLINE void middle(vec s[ROWS], const vec x[ROWS], const vec *y)
{
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int q = 0; q < ROWS; q++)
            s[q] = LO(s[q], x[r], y[q - r]);
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int q = 0; q < ROWS; q++)
            s[q] = HI(s[q], x[r], y[q - r - 1]);
}

/* The first four columns, where the rows begin. */
INLINE void head(vec s[ROWS], const vec x[ROWS], const vec *y)
{
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int q = 0; q < ROWS; q++) {
            if (q >= r)
                s[q] = LO(s[q], x[r], y[q - r]);
            if (q > r)
                s[q] = HI(s[q], x[r], y[q - r - 1]);
        }
}

/* The four columns after the last limb of y, where they end; `end` is one past that limb. */
INLINE void tail(vec s[ROWS], const vec x[ROWS], const vec *end)
{
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int q = 0; q < ROWS; q++) {
            if (q < r)
                s[q] = LO(s[q], x[r], end[q - r]);
            if (q <= r)
                s[q] = HI(s[q], x[r], end[q - r - 1]);
        }
}

INLINE void get(vec s[ROWS], const vec *from)
{
    UNROLL for (int q = 0; q < ROWS; q++)
        s[q] = from[q];
}

INLINE void put(vec *to, const vec s[ROWS])
{
    UNROLL for (int q = 0; q < ROWS; q++)
        to[q] = s[q];
}

/* Four steps of a reduction: the digits m[0..3] that make the four lowest columns divisible by
 * 2^208, and what goes up from there. Columns may be negative, so shifts keep the sign. */
INLINE void digits(const ifma_modulus *mod, vec *acc, vec m[ROWS])
{
    const vec *n = mod->n;
    const vec inverse = _mm512_set1_epi64((long long)mod->inverse);
    vec s[ROWS];

    get(s, acc);
    UNROLL for (int r = 0; r < ROWS; r++) {
        m[r] = LO(_mm512_setzero_si512(), s[r], inverse);
        s[r] = LO(s[r], m[r], n[0]);
        vec up = _mm512_srai_epi64(s[r], BITS);
        if (r + 1 < ROWS)
            s[r + 1] = _mm512_add_epi64(s[r + 1], up);
        else
            acc[ROWS] = _mm512_add_epi64(acc[ROWS], up);
        UNROLL for (int q = r + 1; q < ROWS; q++) {
            s[q] = LO(s[q], m[r], n[q - r]);
            s[q] = HI(s[q], m[r], n[q - r - 1]);
        }
    }
}

/* acc += x[0..3] y but for the four lowest columns. */
INLINE void rows_above(vec *acc, const vec x[ROWS], const vec *y, size_t limbs)
{
    vec s[ROWS];
    for (size_t k = ROWS; k < limbs; k += ROWS) {
        get(s, acc + k);
        middle(s, x, y + k);
        put(acc + k, s);
    }
    get(s, acc + limbs);
    tail(s, x, y + limbs);
    put(acc + limbs, s);
}

/* Accumulators to limbs of 52 bits; the number must fit. */
INLINE void carry(vec *out, const vec *acc, size_t limbs)
{
    const vec mask = _mm512_set1_epi64((long long)LIMB);
    vec up = _mm512_setzero_si512();
    for (size_t i = 0; i < limbs; i++) {
        vec s = _mm512_add_epi64(acc[i], up);
        out[i] = _mm512_and_si512(s, mask);
        up = _mm512_srai_epi64(s, BITS);
    }
}

/* acc += x[0..3] y. */
INLINE void product_rows(vec *acc, const vec x[ROWS], const vec *y, size_t limbs)
{
    vec s[ROWS];
    get(s, acc);
    head(s, x, y);
    put(acc, s);
    rows_above(acc, x, y, limbs);
}

/* acc[0, 2 limbs) += x y. */
INLINE void product_of(vec *acc, const vec *x, const vec *y, size_t limbs)
{
    vec rows[ROWS];
    for (size_t i = 0; i < limbs; i += ROWS) {
        get(rows, x + i);
        product_rows(acc + i, rows, y, limbs);
    }
}

/* out = the low part of x and the high part, added up: `high` limbs. It fits: x <= 6N < R / 8,
 * and the low part is shorter. */
INLINE void add_parts(vec *out, const vec *x, size_t low, size_t high)
{
    const vec mask = _mm512_set1_epi64((long long)LIMB);
    vec up = _mm512_setzero_si512();
    for (size_t i = 0; i < high; i++) {
        vec s = _mm512_add_epi64(x[low + i], up);
        if (i < low)
            s = _mm512_add_epi64(s, x[i]);
        out[i] = _mm512_and_si512(s, mask);
        up = _mm512_srli_epi64(s, BITS);
    }
}

enum { KARATSUBA_LIMBS = 56 }; /* below, three shorter products are not worth it */

static size_t low_part(size_t limbs)
{
    return (limbs - 1) / 2 / ROWS * ROWS;
}

/* acc, 2L columns that are zero, = x[0] y[0] (+ x[1] y[1]), by Karatsuba from 56 limbs on:
 *     (x' + x" B)(y' + y" B) = low + (mid - low - high) B + high B^2,  mid = (x' + x")(y' + y").
 * Takes 4 high parts of scratch. */
INLINE void products_of(vec *acc, int products, const vec *const x[2], const vec *const y[2],
                        size_t limbs, vec *scratch)
{
    const size_t low = low_part(limbs), high = limbs - low;
    vec *sum_x = scratch, *sum_y = sum_x + high, *mid = sum_y + high;

    if (limbs < KARATSUBA_LIMBS) {
        for (int p = 0; p < products; p++)
            product_of(acc, x[p], y[p], limbs);
        return;
    }
    memset(mid, 0, 2 * high * sizeof(vec));
    for (int p = 0; p < products; p++) {
        add_parts(sum_x, x[p], low, high);
        add_parts(sum_y, y[p], low, high);
        product_of(acc, x[p], y[p], low);
        product_of(acc + 2 * low, x[p] + low, y[p] + low, high);
        product_of(mid, sum_x, sum_y, high);
    }
    for (size_t k = 0; k < 2 * high; k++) {
        mid[k] = _mm512_sub_epi64(mid[k], acc[2 * low + k]);
        if (k < 2 * low)
            mid[k] = _mm512_sub_epi64(mid[k], acc[k]);
    }
    for (size_t k = 0; k < 2 * high; k++)
        acc[low + k] = _mm512_add_epi64(acc[low + k], mid[k]);
}

/* --- pairs: two times L limbs, a and then b -------------------------------------------------*/

/* out = (first + second N) / R for accumulators of 2L columns each: both are reduced, and m, the
 * digits of the first reduction, are taken off the second accumulator as R - 1 - m.
 *
 * The digits of one reduction wait for one another; meanwhile the rows of the other are added. */
INLINE void reduce(const ifma_modulus *mod, vec *out, vec *first, vec *second)
{
    const size_t limbs = mod->limbs;
    const vec mask = _mm512_set1_epi64((long long)LIMB);
    vec m[ROWS], k[ROWS] = {_mm512_setzero_si512()};

    for (size_t i = 0; i < limbs; i += ROWS) {
        digits(mod, first + i, m);
        if (i)
            rows_above(second + i - ROWS, k, mod->n, limbs);
        UNROLL for (int r = 0; r < ROWS; r++) {
            vec minus = _mm512_sub_epi64(mask, m[r]);
            minus = _mm512_add_epi64(minus, mod->complement[i + r]);
            second[i + r] = _mm512_add_epi64(second[i + r], minus);
        }
        digits(mod, second + i, k);
        rows_above(first + i, m, mod->n, limbs);
    }
    rows_above(second + limbs - ROWS, k, mod->n, limbs);
    carry(out, first + limbs, limbs);
    carry(out + limbs, second + limbs, limbs);
}

INLINE void clear(const ifma_modulus *mod, vec *first, vec *second)
{
    memset(first, 0, 2 * mod->limbs * sizeof(vec));
    memset(second, 0, 2 * mod->limbs * sizeof(vec));
}

/* out = x y / R; out may be x or y. */
IFMA static void multiply(const ifma_modulus *mod, vec *out, const vec *x, const vec *y,
                          vec *scratch)
{
    const size_t limbs = mod->limbs;
    const vec *a = x, *b = x + limbs, *c = y, *d = y + limbs;
    vec *first = scratch, *second = scratch + 2 * limbs, *rest = scratch + 4 * limbs;

    clear(mod, first, second);
    products_of(first, 1, (const vec *const[2]){a}, (const vec *const[2]){c}, limbs, rest);
    products_of(second, 2, (const vec *const[2]){a, b}, (const vec *const[2]){d, c}, limbs, rest);
    reduce(mod, out, first, second);
}

/* out = 2x in limbs of 52 bits; it must fit. */
INLINE void twice(vec *out, const vec *x, size_t limbs)
{
    const vec mask = _mm512_set1_epi64((long long)LIMB);
    vec up = _mm512_setzero_si512();
    for (size_t i = 0; i < limbs; i++) {
        vec s = _mm512_or_si512(_mm512_slli_epi64(x[i], 1), up);
        out[i] = _mm512_and_si512(s, mask);
        up = _mm512_srli_epi64(s, BITS);
    }
}

/* acc += the square of the four limbs x[0..3]. */
INLINE void square_corner(vec *acc, const vec x[ROWS])
{
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int q = r; q < ROWS; q++) {
            vec low = LO(acc[r + q], x[r], x[q]);
            vec high = HI(acc[r + q + 1], x[r], x[q]);
            acc[r + q] = q == r ? low : LO(low, x[r], x[q]);
            acc[r + q + 1] = q == r ? high : HI(high, x[r], x[q]);
        }
}

/* out = x x / R. Of a a every product of different limbs is computed once, with 2a; 2 a b is
 * a times 2b. */
IFMA static void square(const ifma_modulus *mod, vec *out, const vec *x, vec *scratch)
{
    const size_t limbs = mod->limbs;
    const vec *a = x, *b = x + limbs;
    const vec even = _mm512_set1_epi64((long long)(LIMB - 1));
    vec *first = scratch, *second = scratch + 2 * limbs;
    vec *a2 = scratch + 4 * limbs, *b2 = scratch + 5 * limbs;
    vec rows[ROWS];

    clear(mod, first, second);
    twice(a2, a, limbs);
    twice(b2, b, limbs);
    for (size_t i = 0; i < limbs; i += ROWS) {
        const size_t above = i + ROWS;
        get(rows, a + i);
        square_corner(first + 2 * i, rows);
        if (above < limbs) {
            /* Limbs of 2 (a_above + ...): without the bit that 2 a_(above-1) carried. */
            a2[above] = _mm512_and_si512(a2[above], even);
            product_rows(first + i + above, rows, a2 + above, limbs - above);
        }
    }
    products_of(second, 1, (const vec *const[2]){a}, (const vec *const[2]){b2}, limbs,
                scratch + 6 * limbs);
    reduce(mod, out, first, second);
}

/* x < 2^(16 width) < 4 N^2, 2L limbs, as the pair for x / R: with x + m N = R t,
 * t + N (-m / R). t < 4 N^2 / R + 1 + N. */
IFMA static void enter(const ifma_modulus *mod, vec *out, const vec *x, vec *scratch)
{
    vec *first = scratch, *second = scratch + 2 * mod->limbs;
    clear(mod, first, second);
    memcpy(first, x, 2 * mod->limbs * sizeof(vec));
    reduce(mod, out, first, second);
}

/* x (1 + block N) / R, where block may be NULL: (a + (b + a block) N) / R. */
IFMA static void leave(const ifma_modulus *mod, vec *out, const vec *x, const vec *block,
                       vec *scratch)
{
    const size_t limbs = mod->limbs;
    vec *first = scratch, *second = scratch + 2 * limbs;
    clear(mod, first, second);
    memcpy(first, x, limbs * sizeof(vec));
    memcpy(second, x + limbs, limbs * sizeof(vec));
    if (block)
        product_of(second, x, block, limbs);
    reduce(mod, out, first, second);
}

/* x - y in the lanes where it is not negative, else x; returns those lanes. */
IFMA static __mmask8 subtract_once(vec *x, const vec *y, size_t limbs, vec *scratch)
{
    const vec mask = _mm512_set1_epi64((long long)LIMB);
    vec borrow = _mm512_setzero_si512();
    for (size_t i = 0; i < limbs; i++) {
        vec s = _mm512_add_epi64(_mm512_sub_epi64(x[i], y[i]), borrow);
        scratch[i] = _mm512_and_si512(s, mask);
        borrow = _mm512_srai_epi64(s, BITS);
    }
    __mmask8 subtract = _mm512_cmpeq_epi64_mask(borrow, _mm512_setzero_si512());
    for (size_t i = 0; i < limbs; i++)
        x[i] = _mm512_mask_mov_epi64(x[i], subtract, scratch[i]);
    return subtract;
}

/* Make a result of the functions above canonical: a, b in [0, N), the same a + b N mod N^2. */
IFMA static void canonical(const ifma_modulus *mod, vec *x, vec *scratch)
{
    const size_t limbs = mod->limbs;
    __mmask8 once = subtract_once(x, mod->n, limbs, scratch);
    vec *b = x + limbs;
    b[0] = _mm512_mask_add_epi64(b[0], once, b[0], _mm512_set1_epi64(1));
    carry(b, b, limbs);
    subtract_once(b, mod->n, limbs, scratch);
}

/* a + b N of canonical halves, 2L limbs. */
IFMA static void number(const ifma_modulus *mod, vec *out, const vec *x, vec *acc)
{
    const size_t limbs = mod->limbs;
    const vec *b = x + limbs;

    clear(mod, acc, acc + 2 * limbs);
    memcpy(acc, x, limbs * sizeof(vec));
    product_of(acc, b, mod->n, limbs);
    carry(out, acc, 2 * limbs);
}

/* --- bytes ----------------------------------------------------------------------------------*/

enum { MAX_LIMBS = 2 * 160, MAX_BYTES = MAX_LIMBS * 13 / 2 + 16 };

/* Lane by lane, `count` numbers of `bytes` bytes, `stride` apart, to limbs; the lanes beyond
 * are set to one. */
static void load(vec *out, size_t limbs, const uint8_t *from, size_t bytes, size_t stride,
                 size_t count)
{
    uint64_t *words = (uint64_t *)out;
    uint8_t padded[MAX_BYTES] = {0};
    for (size_t lane = 0; lane < IFMA_LANES; lane++) {
        if (lane < count) {
            memcpy(padded, from + lane * stride, bytes);
        } else {
            memset(padded, 0, bytes);
            padded[0] = 1;
        }
        for (size_t i = 0; i < limbs; i++) {
            uint64_t word;
            memcpy(&word, padded + i * BITS / 8, 8);
            words[IFMA_LANES * i + lane] = word >> (i % 2 * 4) & LIMB;
        }
    }
    memset(padded, 0, sizeof padded);
    __asm__ volatile("" : : "r"(padded) : "memory");
}

/* The opposite, for limbs below 2^52; an even number of limbs. */
static void store(uint8_t *to, size_t bytes, size_t stride, size_t count, const vec *from,
                  size_t limbs)
{
    const uint64_t *words = (const uint64_t *)from;
    uint8_t padded[MAX_BYTES];
    for (size_t lane = 0; lane < count; lane++) {
        for (size_t i = 0; i < limbs; i += 2) {
            uint64_t low = words[IFMA_LANES * i + lane];
            uint64_t high = words[IFMA_LANES * (i + 1) + lane];
            uint64_t first = low | high << BITS, second = high >> (64 - BITS);
            memcpy(padded + i / 2 * 13, &first, 8);
            memcpy(padded + i / 2 * 13 + 8, &second, 8);
        }
        memcpy(to + lane * stride, padded, bytes);
    }
}

static void load_residues(const ifma_modulus *mod, vec *out, const uint8_t *from, size_t stride,
                          size_t count, vec *scratch)
{
    load(scratch + 4 * mod->limbs, 2 * mod->limbs, from, 2 * mod->width, stride, count);
    enter(mod, out, scratch + 4 * mod->limbs, scratch);
}

/* Residues in Montgomery form: x R mod N^2. */
static void load_montgomery(const ifma_modulus *mod, vec *out, const uint8_t *from,
                            size_t stride, size_t count, vec *scratch)
{
    load_residues(mod, out, from, stride, count, scratch);
    multiply(mod, out, out, mod->cube, scratch);
}

/* The lanes of eight numbers, the first of them number `index`, that begin a group of `columns`
 * numbers: none where `columns` is 0. */
static unsigned first_of_groups(size_t index, size_t columns)
{
    unsigned lanes = 0;
    for (size_t lane = 0; columns && lane < IFMA_LANES; lane++)
        if ((index + lane) % columns == 0)
            lanes |= 1u << lane;
    return lanes;
}

/* Write pairs that stand for themselves; makes them canonical. In the lanes `reduced` the number
 * is written modulo N: that is a. */
IFMA static void store_residues(const ifma_modulus *mod, uint8_t *to, size_t stride,
                                size_t count, vec *x, unsigned reduced, vec *scratch)
{
    vec *whole = scratch + 4 * mod->limbs;
    canonical(mod, x, scratch);
    for (size_t i = mod->limbs; i < 2 * mod->limbs; i++)
        x[i] = _mm512_maskz_mov_epi64((__mmask8)~reduced, x[i]);
    number(mod, whole, x, scratch);
    store(to, 2 * mod->width, stride, count, whole, 2 * mod->limbs);
}

/* Vectors of scratch that the functions above take: two accumulators, a number as it is read or
 * written, and what Karatsuba's products need. */
static size_t scratch_size(const ifma_modulus *mod)
{
    return 6 * mod->limbs + 4 * (mod->limbs - low_part(mod->limbs));
}

/* One number in all lanes. */
static void load_same(vec *out, size_t limbs, const uint8_t *from, size_t bytes)
{
    load(out, limbs, from, bytes, 0, IFMA_LANES);
}

/* --- the modulus ----------------------------------------------------------------------------*/

ifma_modulus *ifma_modulus_new(const uint8_t *n, size_t width, const uint8_t *complement,
                               const uint8_t *cube)
{
    ifma_modulus *mod = calloc(1, sizeof *mod);
    if (!mod)
        return NULL;
    const size_t limbs = limbs_of(width);
    mod->width = width;
    mod->limbs = limbs;
    mod->memory = allocate(8 * limbs);
    vec *scratch = allocate(12 * limbs);
    if (!mod->memory || !scratch) {
        free(scratch);
        ifma_modulus_free(mod);
        return NULL;
    }
    mod->n = mod->memory;
    mod->complement = mod->n + limbs;
    mod->square = mod->n + 2 * limbs;
    mod->cube = mod->n + 4 * limbs;
    mod->one = mod->n + 6 * limbs;
    load_same(mod->n, limbs, n, width);
    load_same(mod->complement, limbs, complement, width);
    load_same(mod->cube, limbs, cube, width);
    load_same(mod->cube + limbs, limbs, cube + width, width);
    /* Newton: each step doubles the bits of 1 / n that are right; n itself has 3. */
    uint64_t low = *(uint64_t *)mod->n, inverse = low;
    for (int step = 0; step < 5; step++)
        inverse *= 2 - low * inverse;
    mod->inverse = -inverse & LIMB;
    memset(scratch, 0, 2 * limbs * sizeof(vec));
    memcpy(scratch + limbs, mod->n, limbs * sizeof(vec)); /* 0 + N N */
    number(mod, mod->square, scratch, scratch + 2 * limbs);
    load_montgomery(mod, mod->one, (const uint8_t[2 * IFMA_MAX_WIDTH]){1}, 0, IFMA_LANES,
                    scratch);
    free(scratch);
    return mod;
}

void ifma_modulus_free(ifma_modulus *mod)
{
    if (mod) {
        free(mod->memory);
        free(mod);
    }
}

/* --- batches --------------------------------------------------------------------------------*/

int ifma_product(const ifma_modulus *mod, const uint8_t *const *batches, size_t operands,
                 size_t count, size_t columns, const uint8_t *scale, uint8_t *out)
{
    const size_t pair = 2 * mod->limbs, bytes = 2 * mod->width;
    const size_t size = 3 * pair + scratch_size(mod);
    vec *memory = allocate(size);
    if (!memory)
        return IFMA_MEMORY;
    vec *result = memory, *operand = memory + pair, *factor = operand + pair;
    vec *scratch = factor + pair;
    load_same(factor, mod->limbs, scale, mod->width);
    load_same(factor + mod->limbs, mod->limbs, scale + mod->width, mod->width);
    for (size_t i = 0; i < count; i += IFMA_LANES) {
        const size_t lanes = at_most(IFMA_LANES, count - i);
        /* Every operand enters with 1 / R, every product divides by R: the scale is missing. */
        load_residues(mod, result, batches[0] + i * bytes, bytes, lanes, scratch);
        for (size_t o = 1; o < operands; o++) {
            load_residues(mod, operand, batches[o] + i * bytes, bytes, lanes, scratch);
            multiply(mod, result, result, operand, scratch);
        }
        multiply(mod, result, result, factor, scratch);
        store_residues(mod, out + i * bytes, bytes, lanes, result, first_of_groups(i, columns),
                       scratch);
    }
    release(memory, size);
    return IFMA_OK;
}

int ifma_running(const ifma_modulus *mod, const uint8_t *batch, size_t count, uint8_t *prefixes,
                 uint8_t *totals)
{
    const size_t pair = 2 * mod->limbs, bytes = 2 * mod->width;
    const size_t size = 2 * pair + scratch_size(mod);
    vec *memory = allocate(size);
    if (!memory)
        return IFMA_MEMORY;
    vec *result = memory, *operand = memory + pair, *scratch = operand + pair;
    for (size_t i = 0; i < count; i += IFMA_LANES) {
        vec *into = i ? operand : result;
        load_residues(mod, into, batch + i * bytes, bytes, at_most(IFMA_LANES, count - i),
                      scratch);
        if (i)
            multiply(mod, result, result, operand, scratch);
        memcpy(prefixes + i / IFMA_LANES * pair * sizeof(vec), result, pair * sizeof(vec));
    }
    if (count)
        store_residues(mod, totals, bytes, IFMA_LANES, result, 0, scratch);
    release(memory, size);
    return IFMA_OK;
}

int ifma_unwind(const ifma_modulus *mod, const uint8_t *batch, size_t count,
                const uint8_t *prefixes, const uint8_t *inverses, uint8_t *out)
{
    const size_t pair = 2 * mod->limbs, bytes = 2 * mod->width;
    const size_t size = 3 * pair + scratch_size(mod);
    vec *memory = allocate(size);
    if (!memory)
        return IFMA_MEMORY;
    vec *running = memory, *operand = memory + pair, *result = operand + pair;
    vec *scratch = result + pair;
    /* With P_i the prefixes and X_i = x_i / R the operands, P_i = P_(i-1) X_i / R. `running`
     * is 1 / P_i, so that 1 / P_i times P_(i-1) / R is 1 / X_i: the inverse in Montgomery form. */
    load_residues(mod, running, inverses, bytes, IFMA_LANES, scratch);
    for (size_t step = (count + IFMA_LANES - 1) / IFMA_LANES; step-- > 0;) {
        const size_t i = step * IFMA_LANES, lanes = at_most(IFMA_LANES, count - i);
        if (step) {
            memcpy(operand, prefixes + (step - 1) * pair * sizeof(vec), pair * sizeof(vec));
            multiply(mod, result, running, operand, scratch);
            load_residues(mod, operand, batch + i * bytes, bytes, lanes, scratch);
            multiply(mod, running, running, operand, scratch);
        } else {
            memcpy(result, running, pair * sizeof(vec));
        }
        leave(mod, result, result, NULL, scratch);
        store_residues(mod, out + i * bytes, bytes, lanes, result, 0, scratch);
    }
    release(memory, size);
    return IFMA_OK;
}

int ifma_add_blocks(const ifma_modulus *mod, const uint8_t *batch, const uint8_t *blocks,
                    size_t count, uint8_t *out)
{
    const size_t limbs = mod->limbs, width = mod->width, bytes = 2 * width;
    const size_t size = 3 * limbs + scratch_size(mod);
    vec *memory = allocate(size);
    if (!memory)
        return IFMA_MEMORY;
    vec *x = memory, *block = memory + 2 * limbs, *scratch = block + limbs;
    for (size_t i = 0; i < count; i += IFMA_LANES) {
        const size_t lanes = at_most(IFMA_LANES, count - i);
        load_montgomery(mod, x, batch + i * bytes, bytes, lanes, scratch);
        load(block, limbs, blocks + i * width, width, width, lanes);
        leave(mod, x, x, block, scratch);
        store_residues(mod, out + i * bytes, bytes, lanes, x, 0, scratch);
    }
    release(memory, size);
    return IFMA_OK;
}

/* The lanes where x is zero. */
IFMA static __mmask8 zero_lanes(const vec *x, size_t limbs)
{
    vec any = _mm512_setzero_si512();
    for (size_t i = 0; i < limbs; i++)
        any = _mm512_or_si512(any, x[i]);
    return _mm512_cmpeq_epi64_mask(any, _mm512_setzero_si512());
}

int ifma_check(const ifma_modulus *mod, const uint8_t *batch, size_t count, uint8_t *products)
{
    const size_t limbs = mod->limbs, width = mod->width, bytes = 2 * width;
    const size_t size = 8 * limbs + scratch_size(mod);
    vec *memory = allocate(size);
    if (!memory)
        return IFMA_MEMORY;
    vec *result = memory, *operand = memory + 2 * limbs, *x = operand + 2 * limbs;
    vec *copy = x + 2 * limbs, *scratch = copy + 2 * limbs;
    int status = IFMA_OK;
    load(result, 2 * limbs, (const uint8_t[]){1}, 1, 0, IFMA_LANES);
    for (size_t i = 0; i < count && status == IFMA_OK; i += IFMA_LANES) {
        load(x, 2 * limbs, batch + i * bytes, bytes, bytes, at_most(IFMA_LANES, count - i));
        enter(mod, operand, x, scratch);
        if (zero_lanes(x, 2 * limbs) || subtract_once(x, mod->square, 2 * limbs, copy))
            status = IFMA_REFUSED;
        multiply(mod, result, result, operand, scratch);
    }
    subtract_once(result, mod->n, limbs, scratch);
    store(products, width, width, IFMA_LANES, result, limbs);
    release(memory, size);
    return status;
}

/* For canonical (a, b): b where a = 1, N - 1 - b where a = N - 1, else 0. Returns the lanes in
 * which a is either. */
IFMA static __mmask8 logarithm(const ifma_modulus *mod, vec *x)
{
    const size_t limbs = mod->limbs;
    const vec mask = _mm512_set1_epi64((long long)LIMB), one = _mm512_set1_epi64(1);
    vec *b = x + limbs, borrow = _mm512_setzero_si512();
    __mmask8 plus = 0xff, minus = 0xff;
    for (size_t i = 0; i < limbs; i++) {
        /* N is odd: N - 1 differs from it in the lowest bit alone. */
        vec last = i ? mod->n[i] : _mm512_sub_epi64(mod->n[i], one);
        vec first = i ? _mm512_setzero_si512() : one;
        plus &= _mm512_cmpeq_epi64_mask(x[i], first);
        minus &= _mm512_cmpeq_epi64_mask(x[i], last);
    }
    for (size_t i = 0; i < limbs; i++) {
        vec last = i ? mod->n[i] : _mm512_sub_epi64(mod->n[i], one);
        vec s = _mm512_add_epi64(_mm512_sub_epi64(last, b[i]), borrow);
        b[i] = _mm512_mask_and_epi64(b[i], minus, s, mask);
        b[i] = _mm512_maskz_mov_epi64(plus | minus, b[i]);
        borrow = _mm512_srai_epi64(s, BITS);
    }
    return plus | minus;
}

int ifma_logarithms(const ifma_modulus *mod, const uint8_t *batch, size_t count, uint8_t *out,
                    uint8_t *good)
{
    const size_t limbs = mod->limbs, width = mod->width, bytes = 2 * width;
    const size_t size = 2 * limbs + scratch_size(mod);
    vec *memory = allocate(size);
    if (!memory)
        return IFMA_MEMORY;
    vec *x = memory, *scratch = memory + 2 * limbs;
    for (size_t i = 0; i < count; i += IFMA_LANES) {
        const size_t lanes = at_most(IFMA_LANES, count - i);
        load_montgomery(mod, x, batch + i * bytes, bytes, lanes, scratch);
        leave(mod, x, x, NULL, scratch);
        canonical(mod, x, scratch);
        const __mmask8 opened = logarithm(mod, x);
        for (size_t lane = 0; lane < lanes; lane++)
            good[i + lane] = opened >> lane & 1;
        store(out + i * width, width, width, lanes, x + limbs, limbs);
    }
    release(memory, size);
    return IFMA_OK;
}

/* --- powers ---------------------------------------------------------------------------------*/

/* A bucket takes products; the first is copied. */
static void gather(const ifma_modulus *mod, vec *bucket, bool *used, const vec *x, vec *scratch)
{
    if (*used)
        multiply(mod, bucket, bucket, x, scratch);
    else
        memcpy(bucket, x, 2 * mod->limbs * sizeof(vec));
    *used = true;
}

enum { WINDOW = 4, BUCKETS = 1 << (WINDOW - 1) };

static unsigned bit(const uint8_t *number, size_t width, size_t index)
{
    return index / 8 < width ? number[index / 8] >> index % 8 & 1 : 0;
}

/* digits[i] = d odd below 2^WINDOW where a window begins at bit i, else 0. */
static void slide(uint8_t *digits, const uint8_t *exponent, size_t width)
{
    for (size_t i = 0; i < 8 * width; i++) {
        digits[i] = 0;
        if (!bit(exponent, width, i))
            continue;
        for (size_t j = 0; j < WINDOW; j++)
            digits[i] |= (uint8_t)(bit(exponent, width, i + j) << j);
        for (size_t j = 1; j < WINDOW && i + j < 8 * width; j++)
            digits[i + j] = 0;
        i += WINDOW - 1;
    }
}

/* The product of bucket[j]^(2j + 1): with the running products S_j of the buckets from the
 * last down to j it is S_0 (S_1 ... S_last)^2. False where no bucket is used. */
static bool combine(const ifma_modulus *mod, vec *out, vec *buckets, const bool *used,
                    vec *running, vec *scratch)
{
    const size_t pair = 2 * mod->limbs;
    bool some = false, doubled = false;
    for (size_t j = BUCKETS; j-- > 0;) {
        if (used[j])
            gather(mod, running, &some, buckets + j * pair, scratch);
        if (j && some)
            gather(mod, out, &doubled, running, scratch);
    }
    if (doubled) {
        square(mod, out, out, scratch);
        multiply(mod, out, out, running, scratch);
    } else if (some) {
        memcpy(out, running, pair * sizeof(vec));
    }
    return some;
}

int ifma_shared_powers(const ifma_modulus *mod, const uint8_t *bases, size_t count,
                       const uint8_t *exponents, size_t exponent_count, size_t exponent_width,
                       uint8_t *out)
{
    const size_t pair = 2 * mod->limbs, bytes = 2 * mod->width, bits = 8 * exponent_width;
    const size_t buckets = exponent_count * BUCKETS;
    const size_t size = (buckets + 3) * pair + scratch_size(mod);
    vec *memory = allocate(size);
    const size_t digits_size = (exponent_count * bits + 63) / 64 + 1;
    vec *digit_memory = allocate(digits_size);
    bool *used = malloc(buckets + 1);
    if (!memory || !digit_memory || !used) {
        free(memory);
        free(digit_memory);
        free(used);
        return IFMA_MEMORY;
    }
    vec *power = memory, *running = memory + pair, *result = running + pair;
    vec *bucket = result + pair, *scratch = bucket + buckets * pair;
    uint8_t *digits = (uint8_t *)digit_memory;
    size_t length = 0; /* no more squarings than the longest exponent needs */
    for (size_t e = 0; e < exponent_count; e++) {
        slide(digits + e * bits, exponents + e * exponent_width, exponent_width);
        for (size_t i = 0; i < bits; i++)
            if (digits[e * bits + i] && length < i + 1)
                length = i + 1;
    }
    for (size_t g = 0; g < count; g += IFMA_LANES) {
        const size_t lanes = at_most(IFMA_LANES, count - g);
        memset(used, 0, buckets);
        load_montgomery(mod, power, bases + g * bytes, bytes, lanes, scratch);
        for (size_t i = 0; i < length; i++) {
            if (i)
                square(mod, power, power, scratch);
            for (size_t e = 0; e < exponent_count; e++) {
                const uint8_t digit = digits[e * bits + i];
                const size_t index = e * BUCKETS + digit / 2;
                if (digit)
                    gather(mod, bucket + index * pair, used + index, power, scratch);
            }
        }
        for (size_t e = 0; e < exponent_count; e++) {
            if (combine(mod, result, bucket + e * BUCKETS * pair, used + e * BUCKETS, running,
                        scratch))
                leave(mod, result, result, NULL, scratch);
            else /* the exponent is zero: R (1 / R), for a pair that stands for itself */
                load(result, pair, (const uint8_t[]){1}, 1, 0, IFMA_LANES);
            store_residues(mod, out + (g * exponent_count + e) * bytes, exponent_count * bytes,
                           lanes, result, 0, scratch);
        }
    }
    release(memory, size);
    release(digit_memory, digits_size);
    memset(used, 0, buckets);
    __asm__ volatile("" : : "r"(used) : "memory");
    free(used);
    return IFMA_OK;
}

/* --- powers whose exponent is secret --------------------------------------------------------
 *
 * Every step, and every address that is read or written, depends on sizes only. */

/* All ones where a = b, else zero, without a comparison that a compiler could make a branch of. */
INLINE vec mask_where_equal(size_t a, size_t b)
{
    uint64_t difference = a ^ b, mask = ((difference | (0 - difference)) >> 63) - 1;
    __asm__("" : "+r"(mask));
    return _mm512_set1_epi64((long long)mask);
}

/* out = entries[index] of `many` entries of `size` vectors: reads them all. */
IFMA static void read_masked(vec *out, const vec *entries, size_t many, size_t size, size_t index)
{
    memset(out, 0, size * sizeof(vec));
    for (size_t e = 0; e < many; e++) {
        const vec mask = mask_where_equal(e, index);
        const vec *entry = entries + e * size;
        for (size_t k = 0; k < size; k++)
            out[k] = _mm512_or_si512(out[k], _mm512_and_si512(mask, entry[k]));
    }
}

/* entries[index] = x: reads and writes them all. */
IFMA static void write_masked(vec *entries, size_t many, size_t size, size_t index, const vec *x)
{
    for (size_t e = 0; e < many; e++) {
        const vec mask = mask_where_equal(e, index);
        vec *entry = entries + e * size;
        for (size_t k = 0; k < size; k++) {
            const vec change = _mm512_xor_si512(entry[k], x[k]);
            entry[k] = _mm512_xor_si512(entry[k], _mm512_and_si512(mask, change));
        }
    }
}

enum { SECRET_WINDOW = 4, SECRET_BUCKETS = 1 << SECRET_WINDOW };

static size_t digit_at(const uint8_t *number, size_t width, size_t first, size_t count)
{
    size_t digit = 0;
    for (size_t j = 0; j < count; j++)
        digit |= (size_t)bit(number, width, first + j) << j;
    return digit;
}

/* Yao's method with digits at fixed places. All buckets begin as one; the digit zero has a
 * bucket too, which is left out at the end. */
int ifma_secret_powers(const ifma_modulus *mod, const uint8_t *bases, size_t count,
                       const uint8_t *exponents, size_t exponent_count, size_t exponent_width,
                       size_t bits, uint8_t *out)
{
    const size_t pair = 2 * mod->limbs, bytes = 2 * mod->width;
    const size_t row = SECRET_BUCKETS * pair;
    const size_t size = exponent_count * row + 3 * pair + scratch_size(mod);
    vec *memory = allocate(size);
    if (!memory)
        return IFMA_MEMORY;
    vec *power = memory, *running = power + pair, *result = running + pair;
    vec *buckets = result + pair, *scratch = buckets + exponent_count * row;
    for (size_t g = 0; g < count; g += IFMA_LANES) {
        const size_t lanes = at_most(IFMA_LANES, count - g);
        for (size_t k = 0; k < exponent_count * SECRET_BUCKETS; k++)
            memcpy(buckets + k * pair, mod->one, pair * sizeof(vec));
        load_montgomery(mod, power, bases + g * bytes, bytes, lanes, scratch);
        for (size_t first = 0; first < bits; first += SECRET_WINDOW) {
            for (size_t i = 0; first && i < SECRET_WINDOW; i++)
                square(mod, power, power, scratch);
            for (size_t e = 0; e < exponent_count; e++) {
                const size_t digit = digit_at(exponents + e * exponent_width, exponent_width,
                                              first, SECRET_WINDOW);
                read_masked(running, buckets + e * row, SECRET_BUCKETS, pair, digit);
                multiply(mod, running, running, power, scratch);
                write_masked(buckets + e * row, SECRET_BUCKETS, pair, digit, running);
            }
        }
        for (size_t e = 0; e < exponent_count; e++) {
            const vec *bucket = buckets + e * row + row - pair; /* the last one */
            memcpy(running, bucket, pair * sizeof(vec));
            memcpy(result, bucket, pair * sizeof(vec));
            for (size_t d = SECRET_BUCKETS - 1; --d > 0;) {
                bucket -= pair;
                multiply(mod, running, running, bucket, scratch);
                multiply(mod, result, result, running, scratch);
            }
            leave(mod, result, result, NULL, scratch);
            store_residues(mod, out + (g * exponent_count + e) * bytes, exponent_count * bytes,
                           lanes, result, 0, scratch);
        }
    }
    release(memory, size);
    return IFMA_OK;
}

/* --- products of powers with public weights -------------------------------------------------*/

/* One window of Pippenger's method: out = product over d of bucket[d]^d. */
static bool window_product(const ifma_modulus *mod, vec *out, const vec *bases,
                           const uint8_t *weights, size_t count, size_t weight_width,
                           size_t first, size_t window, vec *buckets, bool *used, vec *scratch)
{
    const size_t pair = 2 * mod->limbs, many = (size_t)1 << window;
    vec *running = buckets; /* bucket 0 takes nothing */
    bool some = false, more = false;
    memset(used, 0, many);
    for (size_t i = 0; i < count; i++) {
        size_t digit = digit_at(weights + i * weight_width, weight_width, first, window);
        if (digit)
            gather(mod, buckets + digit * pair, used + digit, bases + i * pair, scratch);
    }
    for (size_t d = many; --d > 0;) {
        if (used[d])
            gather(mod, running, &some, buckets + d * pair, scratch);
        if (some)
            gather(mod, out, &more, running, scratch);
    }
    return more;
}

/* Straus' method: the odd powers of every base below 2^WINDOW, and sliding windows. */
static int straus(const ifma_modulus *mod, const uint8_t *batch, const uint8_t *weights,
                  size_t count, size_t columns, size_t weight_width, uint8_t *out)
{
    const size_t pair = 2 * mod->limbs, bytes = 2 * mod->width, bits = 8 * weight_width;
    const size_t size = (count * BUCKETS + 2) * pair + scratch_size(mod);
    vec *memory = allocate(size);
    uint8_t *digits = malloc(count * bits + 1);
    if (!memory || !digits) {
        free(memory);
        free(digits);
        return IFMA_MEMORY;
    }
    vec *result = memory, *twofold = memory + pair, *odd = twofold + pair;
    vec *scratch = odd + count * BUCKETS * pair;
    for (size_t i = 0; i < count; i++)
        slide(digits + i * bits, weights + i * weight_width, weight_width);
    for (size_t k = 0; k < columns; k += IFMA_LANES) {
        const size_t lanes = at_most(IFMA_LANES, columns - k);
        for (size_t i = 0; i < count; i++) {
            vec *power = odd + i * BUCKETS * pair;
            load_montgomery(mod, power, batch + (i * columns + k) * bytes, bytes, lanes,
                            scratch);
            square(mod, twofold, power, scratch);
            for (size_t j = 1; j < BUCKETS; j++, power += pair)
                multiply(mod, power + pair, power, twofold, scratch);
        }
        bool some = false;
        for (size_t bit_index = bits; bit_index-- > 0;) {
            if (some)
                square(mod, result, result, scratch);
            for (size_t i = 0; i < count; i++) {
                const uint8_t digit = digits[i * bits + bit_index];
                if (digit)
                    gather(mod, result, &some, odd + (i * BUCKETS + digit / 2) * pair, scratch);
            }
        }
        if (some)
            leave(mod, result, result, NULL, scratch);
        else
            load(result, pair, (const uint8_t[]){1}, 1, 0, IFMA_LANES);
        store_residues(mod, out + k * bytes, bytes, lanes, result, 0, scratch);
    }
    release(memory, size);
    free(digits);
    return IFMA_OK;
}

int ifma_weighted(const ifma_modulus *mod, const uint8_t *batch, const uint8_t *weights,
                  size_t count, size_t columns, size_t weight_width, size_t window,
                  uint8_t *out)
{
    const size_t pair = 2 * mod->limbs, bytes = 2 * mod->width, many = (size_t)1 << window;
    if (!window)
        return straus(mod, batch, weights, count, columns, weight_width, out);
    const size_t size = (count + many + 2) * pair + scratch_size(mod);
    const size_t windows = (8 * weight_width + window - 1) / window;
    vec *memory = allocate(size);
    bool *used = malloc(many);
    if (!memory || !used) {
        free(memory);
        free(used);
        return IFMA_MEMORY;
    }
    vec *result = memory, *part = memory + pair, *bases = part + pair;
    vec *buckets = bases + count * pair, *scratch = buckets + many * pair;
    for (size_t k = 0; k < columns; k += IFMA_LANES) {
        const size_t lanes = at_most(IFMA_LANES, columns - k);
        for (size_t i = 0; i < count; i++)
            load_montgomery(mod, bases + i * pair, batch + (i * columns + k) * bytes, bytes,
                            lanes, scratch);
        bool some = false;
        for (size_t w = windows; w-- > 0;) {
            if (some)
                for (size_t j = 0; j < window; j++)
                    square(mod, result, result, scratch);
            if (window_product(mod, part, bases, weights, count, weight_width, w * window,
                               window, buckets, used, scratch))
                gather(mod, result, &some, part, scratch);
        }
        if (some)
            leave(mod, result, result, NULL, scratch);
        else
            load(result, pair, (const uint8_t[]){1}, 1, 0, IFMA_LANES);
        store_residues(mod, out + k * bytes, bytes, lanes, result, 0, scratch);
    }
    release(memory, size);
    free(used);
    return IFMA_OK;
}

/* --- the comb -------------------------------------------------------------------------------*/

struct ifma_table {
    const ifma_modulus *mod;
    size_t lanes, rows, columns, depth, blocks;
    unsigned reduced; /* lanes whose powers are written modulo N */
    vec *chain;   /* [rows][blocks]: base^(2^(row columns + block depth)) */
    vec *entries; /* [blocks][2^rows]: entry 0 is one */
};

ifma_table *ifma_table_new(const ifma_modulus *mod, const uint8_t *bases, size_t lanes,
                           size_t rows, size_t columns, size_t depth, bool groups)
{
    const size_t pair = 2 * mod->limbs, bytes = 2 * mod->width;
    const size_t size = pair + scratch_size(mod);
    ifma_table *t = calloc(1, sizeof *t);
    vec *memory = allocate(size);
    if (!t || !memory) {
        free(t);
        free(memory);
        return NULL;
    }
    t->mod = mod;
    t->lanes = lanes;
    t->reduced = groups;
    t->rows = rows;
    t->columns = columns;
    t->depth = depth;
    t->blocks = (columns + depth - 1) / depth;
    t->chain = allocate(rows * t->blocks * pair);
    t->entries = allocate((t->blocks << rows) * pair);
    if (!t->chain || !t->entries) {
        free(memory);
        ifma_table_free(t);
        return NULL;
    }
    vec *power = memory, *scratch = memory + pair;
    load_montgomery(mod, power, bases, bytes, lanes, scratch);
    for (size_t row = 0; row < rows; row++)
        for (size_t column = 0; column < columns; column++) {
            if (column % depth == 0)
                memcpy(t->chain + (row * t->blocks + column / depth) * pair, power,
                       pair * sizeof(vec));
            square(mod, power, power, scratch);
        }
    free(memory);
    return t;
}

void ifma_table_free(ifma_table *t)
{
    if (t) {
        free(t->chain);
        free(t->entries);
        free(t);
    }
}

int ifma_table_fill(ifma_table *t, size_t block)
{
    const ifma_modulus *mod = t->mod;
    const size_t pair = 2 * mod->limbs;
    vec *scratch = allocate(scratch_size(mod));
    if (!scratch)
        return IFMA_MEMORY;
    vec *entries = t->entries + (block << t->rows) * pair;
    memcpy(entries, mod->one, pair * sizeof(vec));
    for (size_t row = 0; row < t->rows; row++) {
        const size_t half = (size_t)1 << row;
        const vec *factor = t->chain + (row * t->blocks + block) * pair;
        memcpy(entries + half * pair, factor, pair * sizeof(vec));
        for (size_t i = 1; i < half; i++)
            multiply(mod, entries + (half + i) * pair, entries + i * pair, factor, scratch);
    }
    free(scratch);
    return IFMA_OK;
}

/* The digit of a block at a step: one bit of each row. */
static size_t comb_digit(const ifma_table *t, const uint8_t *exponent, size_t width, size_t block,
                         size_t step)
{
    const size_t column = block * t->depth + step;
    size_t digit = 0;
    if (column < t->columns)
        for (size_t row = 0; row < t->rows; row++)
            digit |= (size_t)bit(exponent, width, row * t->columns + column) << row;
    return digit;
}

/* result = the power, by the entries that the exponent's digits name. */
static void comb_power(const ifma_table *t, vec *result, const uint8_t *exponent, size_t width,
                       vec *scratch)
{
    const ifma_modulus *mod = t->mod;
    const size_t pair = 2 * mod->limbs;
    bool some = false;
    for (size_t step = t->depth; step-- > 0;) {
        if (some)
            square(mod, result, result, scratch);
        for (size_t b = 0; b < t->blocks; b++) {
            size_t digit = comb_digit(t, exponent, width, b, step);
            if (digit)
                gather(mod, result, &some, t->entries + ((b << t->rows) + digit) * pair,
                       scratch);
        }
    }
    if (!some)
        memcpy(result, mod->one, pair * sizeof(vec));
}

/* The same; every entry of a block is read for every digit, and all digits take a product. */
static void masked_comb_power(const ifma_table *t, vec *result, vec *entry,
                              const uint8_t *exponent, size_t width, vec *scratch)
{
    const ifma_modulus *mod = t->mod;
    const size_t pair = 2 * mod->limbs, many = (size_t)1 << t->rows;
    memcpy(result, mod->one, pair * sizeof(vec));
    for (size_t step = t->depth; step-- > 0;) {
        if (step + 1 < t->depth)
            square(mod, result, result, scratch);
        for (size_t b = 0; b < t->blocks; b++) {
            read_masked(entry, t->entries + b * many * pair, many, pair,
                        comb_digit(t, exponent, width, b, step));
            multiply(mod, result, result, entry, scratch);
        }
    }
}

int ifma_table_powers(const ifma_table *t, const uint8_t *exponents, size_t count,
                      size_t exponent_width, const uint8_t *blocks, bool masked, uint8_t *out)
{
    const ifma_modulus *mod = t->mod;
    const size_t limbs = mod->limbs, pair = 2 * limbs, width = mod->width, bytes = 2 * width;
    const size_t size = 2 * pair + limbs + scratch_size(mod);
    vec *memory = allocate(size);
    if (!memory)
        return IFMA_MEMORY;
    vec *result = memory, *entry = memory + pair, *block = entry + pair, *scratch = block + limbs;
    for (size_t i = 0; i < count; i++) {
        const uint8_t *exponent = exponents + i * exponent_width;
        if (masked)
            masked_comb_power(t, result, entry, exponent, exponent_width, scratch);
        else
            comb_power(t, result, exponent, exponent_width, scratch);
        if (blocks)
            load(block, limbs, blocks + i * t->lanes * width, width, width, t->lanes);
        leave(mod, result, result, blocks ? block : NULL, scratch);
        store_residues(mod, out + i * t->lanes * bytes, bytes, t->lanes, result, t->reduced,
                       scratch);
    }
    release(memory, size);
    return IFMA_OK;
}

#else

const char *ifma_unavailable(void)
{
    return "the kernel was built for another processor than x86-64";
}

#endif
