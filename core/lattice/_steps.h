/* The steps of _lattice.h for one kind of processor. The file that includes this defines
 *   NAME(x)            the name of a function of this variant
 *   CHACHA_LANES       see _chacha.h
 *   VALUE_LANES        4 or 2: float64 in a vector, and reals, that vector
 *   LEAST(a, b), MOST(a, b) of two such vectors, lane by lane
 *   REAL_LANES         the same number where there is a fused multiply-add, and then
 *                      FMA(a, b, c) = a b + c, FNMA(a, b, c) = c - a b, ROUND(a) to an integer;
 *                      else 0
 */

#include <float.h>
#include <string.h>

#include "_lattice.h"

#if defined(__FAST_MATH__) || FLT_EVAL_METHOD != 0
#error "float64 must be rounded after every step, and only then"
#endif

#include "_chacha.h"
#include "_loops.h"

/* --- vectors of float64 ---------------------------------------------------------------------*/

typedef uint64_t NAME(words) __attribute__((vector_size(8 * VALUE_LANES)));
typedef uint64_t NAME(loose) __attribute__((vector_size(8 * VALUE_LANES), aligned(8), may_alias));
typedef double NAME(loose_reals)
    __attribute__((vector_size(8 * VALUE_LANES), aligned(8), may_alias));

#define LOAD(from) ((reals)*(const NAME(loose_reals) *)(from))
#define STORE(to, x) (*(NAME(loose_reals) *)(to) = (x))
#define LOAD_WORDS(from) ((NAME(words))*(const NAME(loose) *)(from))
#define STORE_WORDS(to, x) (*(NAME(loose) *)(to) = (x))
#define TWO_52 4503599627370496.0
#define TWO_52_BITS 0x4330000000000000ULL
/* Integers below 2^52, both ways. */
#define REALS(x) ((reals)((x) | TWO_52_BITS) - TWO_52)
#define INTEGERS(x) ((NAME(words))((x) + TWO_52) ^ TWO_52_BITS)

/* --- values ---------------------------------------------------------------------------------*/

typedef float NAME(floats) __attribute__((vector_size(4 * VALUE_LANES), aligned(4), may_alias));
typedef uint32_t NAME(halves) __attribute__((vector_size(4 * VALUE_LANES), aligned(4), may_alias));

/* Adding 1.5 2^52 leaves an integer of at most 2^51 in size in the low bits, rounded to nearest,
 * ties to even. */
#define MAGIC 6755399441055744.0
#define MAGIC_BITS 0x4338000000000000ULL

typedef struct {
    NAME(words) clamped, finite; /* a count, and all ones or zero, in every lane */
} NAME(seen);

/* Comparisons give all ones or zero in a lane: nothing branches on a value. */
static inline __attribute__((always_inline)) void
NAME(quantize)(reals value, const uint32_t *noise, const Rounding *rounding, uint64_t bias,
               uint64_t *out, NAME(seen) *seen)
{
    const reals zero = {0}, limit = zero + rounding->limit;
    const reals far = zero + 2251799813685248.0; /* 2^51, beyond every limit */
    const NAME(words) size = (NAME(words)){0} + 0x7fffffffffffffffULL;
    reals x = value * rounding->scale;
    x *= rounding->one;
    x = MOST(LEAST(x, far), -far);
    reals r = x + MAGIC;
    r -= MAGIC;
    if (noise) {
        const reals one = zero + 1.0;
        r -= (reals)((NAME(words))(r > x) & (NAME(words))one);
        const reals fraction = (x - r) * 4294967296.0;
        const NAME(halves) given = *(const NAME(halves) *)noise;
        const reals uniform = REALS(__builtin_convertvector(given, NAME(words)));
        r += (reals)((NAME(words))(uniform < fraction) & (NAME(words))one);
    }
    seen->clamped -= (NAME(words))((reals)((NAME(words))r & size) > limit);
    r = MOST(LEAST(r, limit), -limit);
    STORE_WORDS(out, (NAME(words))(r + MAGIC) - MAGIC_BITS + bias);
    seen->finite &= (NAME(words))((reals)((NAME(words))value & size) <= 1.7976931348623157e308);
}

#define LOAD_FLOATS(from) __builtin_convertvector(*(const NAME(floats) *)(from), reals)

#define QUANTIZE(function, type, load)                                                             \
    static bool function(const type *values, size_t count, const Rounding *rounding,               \
                         uint64_t bias, uint64_t *out, size_t *clamped)                            \
    {                                                                                              \
        enum { L = VALUE_LANES };                                                                  \
        const uint32_t *noise = rounding->noise;                                                   \
        NAME(seen) seen = {{0}, ~(NAME(words)){0}};                                                \
        size_t c = 0;                                                                              \
        if (noise)                                                                                 \
            for (; c + L <= count; c += L)                                                         \
                NAME(quantize)(load(values + c), noise + c, rounding, bias, out + c, &seen);       \
        else                                                                                       \
            for (; c + L <= count; c += L)                                                         \
                NAME(quantize)(load(values + c), NULL, rounding, bias, out + c, &seen);            \
        if (c < count) {                                                                           \
            const size_t left = count - c;                                                         \
            type rest[L] = {0};                                                                    \
            uint32_t given[L] = {0};                                                               \
            uint64_t found[L];                                                                     \
            memcpy(rest, values + c, left * sizeof *rest);                                         \
            if (noise)                                                                             \
                memcpy(given, noise + c, left * sizeof *given);                                    \
            NAME(quantize)(load(rest), noise ? given : NULL, rounding, bias, found, &seen);        \
            memcpy(out + c, found, left * sizeof *found);                                          \
        }                                                                                          \
        bool all = true;                                                                           \
        for (int lane = 0; lane < L; lane++) {                                                     \
            all &= seen.finite[lane] != 0;                                                         \
            *clamped += (size_t)seen.clamped[lane];                                                \
        }                                                                                          \
        return all;                                                                                \
    }

QUANTIZE(NAME(quantize_float), float, LOAD_FLOATS)
QUANTIZE(NAME(quantize_double), double, LOAD)

/* --- words ----------------------------------------------------------------------------------*/

/* The quotient is below 2^15, and at most one too small. */
static inline __attribute__((always_inline)) uint64_t
NAME(canonical_one)(uint64_t word, uint64_t p, uint64_t lazy)
{
    const uint64_t quotient = (word >> 32) * lazy >> 49;
    const uint64_t times = (quotient * (p >> 32) << 32) + quotient * (uint32_t)p;
    return subtract_once(word - times, p);
}

static void NAME(canonical)(const Prime *prime, uint64_t *words, size_t count)
{
    const uint64_t p = prime->p, lazy = prime->lazy;
    size_t c = 0;
#if REAL_LANES
    /* The upper 38 bits as float64, exactly; what is left of them lies between -p / 2 and p / 2,
     * and the lower 26 bits add 2^26. */
    const reals zero = {0}, real = zero + (double)p, inverse = zero + 1.0 / (double)p;
    for (; c + REAL_LANES <= count; c += REAL_LANES) {
        const NAME(words) word = LOAD_WORDS(words + c);
        const reals upper = REALS(word >> 26) * 67108864.0;
        const reals x = FNMA(ROUND(upper * inverse), real, upper) + REALS(word & 67108863);
        const NAME(words) less = INTEGERS(x + real) - p;
        STORE_WORDS(words + c, less + (p & (0 - (less >> 63))));
    }
#endif
    for (; c < count; c++)
        words[c] = NAME(canonical_one)(words[c], p, lazy);
}

/* --- products modulo p ----------------------------------------------------------------------*/

#if REAL_LANES

/* With float64. For |x|, w integers, |x| <= 8 p and 0 <= w < p, let h = x w rounded, and
 * l = x w - h, which a fused multiply-add gives exactly. q = round(h / p) differs from x w / p
 * by less than 1/2 + 3 K / 8 for |x| <= K p: three roundings, each a 2^-53 of K 2^50. h - q p is
 * an integer (the unit of h is 1 or more, or h is exact) that is below 2^53 in size, so the
 * second fused multiply-add is exact too, and so is the last sum: it is x w - q p, at most
 * (1/2 + 3 K / 8) p. */
#define PRODUCT(x, w, p, inverse)                                                                  \
    __extension__({                                                                                \
        const reals h_ = (x) * (w), l_ = FMA(x, w, -h_);                                           \
        FNMA(ROUND(h_ * (inverse)), p, h_) + l_;                                                   \
    })
/* x modulo p, at most p / 2 (and a 2^-50 of it) in size. */
#define REDUCED(x, p, inverse) FNMA(ROUND((x) * (inverse)), p, x)

/* Gentleman and Sande's butterfly. With |u|, |v| <= 2 p the sum is reduced to p / 2, and the
 * product is of |u - v| <= 4 p: at most 2 p again. */
#define BUTTERFLY(u, v, w)                                                                         \
    do {                                                                                           \
        const reals sum_ = (u) + (v), difference_ = (u) - (v);                                     \
        u = REDUCED(sum_, p, inverse);                                                             \
        v = PRODUCT(difference_, w, p, inverse);                                                   \
    } while (0)

static void NAME(pad)(const Prime *prime, size_t n, uint64_t *words, const uint64_t *secret)
{
    enum { L = REAL_LANES };
    const reals zero = {0}, p = zero + (double)prime->p, inverse = zero + 1.0 / (double)prime->p;
    const double *factors = prime->inverses_real;
    double *a = (double *)words; /* the vectors that read and write it may alias anything */
    /* The product, and the stages whose butterflies lie within vectors. */
    for (size_t k = 0; k < n; k += 2 * L) {
        reals x = REALS(LOAD_WORDS(words + k)), y = REALS(LOAD_WORDS(words + k + L));
        const reals s = REALS(LOAD_WORDS(secret + k)), t = REALS(LOAD_WORDS(secret + k + L));
        x = PRODUCT(x, s, p, inverse);
        y = PRODUCT(y, t, p, inverse);
        const reals w = LOAD(factors + n / 2 + k / 2);
#if REAL_LANES == 4
        reals u = SHUFFLE(NAME(words), x, y, 0, 2, 4, 6);
        reals v = SHUFFLE(NAME(words), x, y, 1, 3, 5, 7);
        BUTTERFLY(u, v, w);
        const double *next = factors + n / 4 + k / 4;
        const reals w2 = {next[0], next[0], next[1], next[1]};
        x = SHUFFLE(NAME(words), u, v, 0, 4, 2, 6);
        y = SHUFFLE(NAME(words), u, v, 1, 5, 3, 7);
        BUTTERFLY(x, y, w2);
        u = SHUFFLE(NAME(words), x, y, 0, 1, 4, 5);
        v = SHUFFLE(NAME(words), x, y, 2, 3, 6, 7);
#else
        reals c = SHUFFLE(NAME(words), x, y, 0, 2), d = SHUFFLE(NAME(words), x, y, 1, 3);
        BUTTERFLY(c, d, w);
        const reals u = SHUFFLE(NAME(words), c, d, 0, 2);
        const reals v = SHUFFLE(NAME(words), c, d, 1, 3);
#endif
        STORE(a + k, u);
        STORE(a + k + L, v);
    }
    size_t step = L, blocks = n / (2 * L);
    /* An odd number of stages is left: one by itself. */
    size_t left = 0;
    for (size_t b = blocks; b; b /= 2)
        left++;
    if (left % 2) {
        for (size_t i = 0; i < blocks; i++) {
            const reals w = zero + factors[blocks + i];
            double *from = a + 2 * step * i;
            for (size_t k = 0; k < step; k += L) {
                reals u = LOAD(from + k), v = LOAD(from + step + k);
                BUTTERFLY(u, v, w);
                STORE(from + k, u);
                STORE(from + step + k, v);
            }
        }
        step *= 2, blocks /= 2;
    }
    /* Two stages at a time; the last of them gives words. */
    for (; blocks; step *= 4, blocks /= 4)
        for (size_t i = 0; i < blocks / 2; i++) {
            const reals w0 = zero + factors[blocks + 2 * i];
            const reals w1 = zero + factors[blocks + 2 * i + 1];
            const reals w2 = zero + factors[blocks / 2 + i];
            double *from = a + 4 * step * i;
            const bool last = blocks == 2;
            for (size_t k = 0; k < step; k += L) {
                reals x0 = LOAD(from + k), x1 = LOAD(from + step + k);
                reals x2 = LOAD(from + 2 * step + k), x3 = LOAD(from + 3 * step + k);
                BUTTERFLY(x0, x1, w0);
                BUTTERFLY(x2, x3, w1);
                BUTTERFLY(x0, x2, w2);
                BUTTERFLY(x1, x3, w2);
                if (last) {
                    STORE_WORDS(from + k, INTEGERS(x0 + 2 * p));
                    STORE_WORDS(from + step + k, INTEGERS(x1 + 2 * p));
                    STORE_WORDS(from + 2 * step + k, INTEGERS(x2 + 2 * p));
                    STORE_WORDS(from + 3 * step + k, INTEGERS(x3 + 2 * p));
                } else {
                    STORE(from + k, x0);
                    STORE(from + step + k, x1);
                    STORE(from + 2 * step + k, x2);
                    STORE(from + 3 * step + k, x3);
                }
            }
        }
}

static void NAME(gather)(const Prime *prime, const Limbs *factors, const uint64_t (*limbs)[BLOCK],
                         size_t count, uint64_t *sum)
{
    const reals zero = {0}, p = zero + (double)prime->p, inverse = zero + 1.0 / (double)prime->p;
    const reals w1 = zero + (double)factors->factor[1], w2 = zero + (double)factors->factor[2];
    const reals w3 = zero + (double)factors->factor[3];
    const double bias = (double)factors->bias;
    /* BLOCK is a multiple of the vectors, so the last may go beyond `count`. */
    for (size_t c = 0; c < count; c += REAL_LANES) {
        reals x = REALS(LOAD_WORDS(limbs[0] + c)) - bias;
        x += PRODUCT(REALS(LOAD_WORDS(limbs[1] + c)), w1, p, inverse);
        x += PRODUCT(REALS(LOAD_WORDS(limbs[2] + c)), w2, p, inverse);
        x += PRODUCT(REALS(LOAD_WORDS(limbs[3] + c)), w3, p, inverse);
        x = REDUCED(x, p, inverse) + p;
        STORE_WORDS(sum + c, LOAD_WORDS(sum + c) + INTEGERS(x));
    }
}

static void NAME(shares)(const Prime *prime, const uint64_t *words, const uint64_t *pads,
                         size_t count, uint64_t bias, uint64_t cofactor, uint64_t quotient,
                         uint64_t *out)
{
    (void)quotient;
    const reals zero = {0}, p = zero + (double)prime->p, inverse = zero + 1.0 / (double)prime->p;
    const reals w = zero + (double)cofactor;
    const double offset = (double)bias + (double)prime->p;
    for (size_t c = 0; c < count; c += REAL_LANES) {
        reals x = REALS(LOAD_WORDS(words + c)) - REALS(LOAD_WORDS(pads + c)) + offset;
        x = PRODUCT(x, w, p, inverse); /* of |x| <= 3 p */
        x = REDUCED(x, p, inverse);
        NAME(words) r = INTEGERS(x + 2 * p) - prime->p; /* from p / 2 to 3 p / 2 */
        const NAME(words) less = r - prime->p;
        r = less + (prime->p & (0 - (less >> 63)));
        STORE_WORDS(out + c, r);
    }
}

#else

static void NAME(pad)(const Prime *prime, size_t n, uint64_t *words, const uint64_t *secret)
{
    const uint64_t p = prime->p, twice = 2 * p;
    for (size_t k = 0; k < n; k++)
        words[k] = subtract_once(barrett(words[k], secret[k], prime), p);
    /* Harvey's butterflies: words stay below 2 p. */
    for (size_t step = 1, blocks = n / 2; blocks; step *= 2, blocks /= 2)
        for (size_t i = 0; i < blocks; i++) {
            const uint64_t w = prime->inverses[blocks + i];
            const uint64_t quotient = prime->inverses_quotient[blocks + i];
            uint64_t *from = words + 2 * step * i;
            for (size_t k = 0; k < step; k++) {
                const uint64_t u = from[k], v = from[step + k];
                from[k] = subtract_once(u + v, twice);
                from[step + k] = shoup(u - v + twice, w, quotient, p);
            }
        }
}

static void NAME(gather)(const Prime *prime, const Limbs *factors, const uint64_t (*limbs)[BLOCK],
                         size_t count, uint64_t *sum)
{
    const uint64_t p = prime->p;
    for (size_t c = 0; c < count; c++) {
        uint64_t x = limbs[0][c] + p - factors->bias;
        for (int l = 1; l < 4; l++)
            x += shoup(limbs[l][c], factors->factor[l], factors->quotient[l], p);
        sum[c] += x;
    }
}

static void NAME(shares)(const Prime *prime, const uint64_t *words, const uint64_t *pads,
                         size_t count, uint64_t bias, uint64_t cofactor, uint64_t quotient,
                         uint64_t *out)
{
    const uint64_t p = prime->p;
    for (size_t c = 0; c < count; c++) {
        const uint64_t x = words[c] + 4 * p + bias - pads[c];
        out[c] = subtract_once(shoup(x, cofactor, quotient, p), p);
    }
}

#endif

#define STEPS_OF_THIS_VARIANT                                                                      \
    {                                                                                              \
        .keystream = NAME(keystream), .pad = NAME(pad), .popcounts = NAME(popcounts),              \
        .quantize_float = NAME(quantize_float), .quantize_double = NAME(quantize_double),          \
        .place = NAME(place), .gather = NAME(gather), .add = NAME(add), .take = NAME(take),        \
        .canonical = NAME(canonical), .shares = NAME(shares),                                      \
        .assemble = lattice_assemble, .slots = NAME(slots),                                        \
    }
