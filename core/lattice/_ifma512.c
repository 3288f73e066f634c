/* The steps for x86-64 with AVX-512 IFMA, eight words of 52 bits at a time. Rounding of values is
 * that of AVX2.
 *
 * A product modulo p by Shoup's trick: with w' = floor(w 2^52 / p) and a < 2^52,
 * q = floor(a w' / 2^52) is floor(a w / p) or one less, and a w - q p, from the low 52 bits of
 * both, is below 2 p. As p < 2^50, sums of two such words are operands again.
 */

#include "_lattice.h"

#if (defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))) || defined(DTL_EMULATED)

#include <immintrin.h>
#include <string.h>

#if defined(DTL_EMULATED)
/* The intrinsics are plain C. */
#elif defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512ifma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,prefer-vector-width=512")
#endif

#define NAME(x) ifma_##x
#include "_loops.h"

#define CHACHA_LANES 8
#undef NAME
#define NAME(x) ifma_eight_##x
#include "_chacha.h"
#undef CHACHA_LANES
#undef NAME
#define CHACHA_LANES 16
#define NAME(x) ifma_sixteen_##x
#include "_chacha.h"
#undef NAME
#define NAME(x) ifma_##x

static void NAME(keystream)(const uint32_t key[KEY_WORDS], const uint32_t nonce[3],
                            uint32_t counter, size_t blocks, uint32_t *out)
{
    const size_t sixteens = blocks / 16 * 16;
    ifma_sixteen_keystream(key, nonce, counter, sixteens, out);
    ifma_eight_keystream(key, nonce, counter + (uint32_t)sixteens, blocks - sixteens,
                         out + 16 * sixteens);
}

/* --- products modulo p ----------------------------------------------------------------------*/

enum { LANES = 8 };
#define LOW_52 ((1ULL << 52) - 1)

typedef uint64_t vec __attribute__((vector_size(64)));
typedef int64_t signed_vec __attribute__((vector_size(64)));
typedef uint64_t loose __attribute__((vector_size(64), aligned(8), may_alias));

#define LOAD(from) ((vec)*(const loose *)(from))
#define STORE(to, x) (*(loose *)(to) = (x))
#define HI(a, b) ((vec)_mm512_madd52hi_epu64(_mm512_setzero_si512(), (__m512i)(a), (__m512i)(b)))
#define LO(sum, a, b)                                                                              \
    ((vec)_mm512_madd52lo_epu64((__m512i)(sum), (__m512i)(a), (__m512i)(b)))
#define SMALLER(a, b) ((vec)_mm512_min_epu64((__m512i)(a), (__m512i)(b)))
#define ZERO ((vec){0})
#define SPLAT(x) ((vec){0} + (uint64_t)(x))

/* A factor w below p, and floor(w 2^52 / p), out of floor(w 2^64 / p). */
typedef struct {
    vec w, quotient;
} Factor;

#define INLINE static inline __attribute__((always_inline))

INLINE Factor splat_factor(uint64_t w, uint64_t quotient)
{
    return (Factor){SPLAT(w), SPLAT(quotient >> 12)};
}

/* Any a < 2^52; the result is below 2 p. `minus` is 2^52 - p. */
INLINE vec times(vec a, Factor f, vec minus)
{
    return LO(LO(ZERO, a, f.w), HI(a, f.quotient), minus) & LOW_52;
}

/* Gentleman and Sande's butterfly on words below 2 p. */
INLINE void butterfly(vec *u, vec *v, Factor f, vec twice, vec minus)
{
    const vec sum = *u + *v, difference = *u - *v + twice;
    *u = SMALLER(sum, sum - twice); /* a negative one is large */
    *v = times(difference, f, minus);
}

/* Both tables at `at`, the lanes in the order of a shuffle. */
#define FACTORS(at, ...)                                                                           \
    ((Factor){SHUFFLE(vec, LOAD(prime->inverses + (at)), SPLAT(0), __VA_ARGS__),                   \
              SHUFFLE(vec, LOAD(prime->inverses_quotient + (at)), SPLAT(0),                        \
                                      __VA_ARGS__) >> 12})

/* a s modulo p for a, s < p, below 2 p. The quotient is at most two too small. */
INLINE vec product(vec a, vec s, vec twice, vec minus, vec barrett)
{
    const vec low = LO(ZERO, a, s), quotient = HI((HI(a, s) << 3) + (low >> 49), barrett);
    const vec r = LO(low, quotient, minus) & LOW_52;
    return SMALLER(r, r - twice);
}

static void NAME(pad)(const Prime *prime, size_t n, uint64_t *words, const uint64_t *secret)
{
    const vec twice = SPLAT(2 * prime->p), minus = SPLAT((1ULL << 52) - prime->p);
    const vec barrett = SPLAT(prime->barrett);
    /* The product, and the stages whose butterflies lie within vectors. Comments say which of 16
     * words the lanes hold. */
    for (size_t k = 0; k < n; k += 2 * LANES) {
        vec x = product(LOAD(words + k), LOAD(secret + k), twice, minus, barrett);
        vec y = product(LOAD(words + k + LANES), LOAD(secret + k + LANES), twice, minus, barrett);
        vec u = SHUFFLE(vec, x, y, 0, 2, 4, 6, 8, 10, 12, 14);
        vec v = SHUFFLE(vec, x, y, 1, 3, 5, 7, 9, 11, 13, 15);
        butterfly(&u, &v, FACTORS(n / 2 + k / 2, 0, 1, 2, 3, 4, 5, 6, 7), twice, minus);
        x = SHUFFLE(vec, u, v, 0, 8, 2, 10, 4, 12, 6, 14); /* 0 1 4 5 8 9 12 13 */
        y = SHUFFLE(vec, u, v, 1, 9, 3, 11, 5, 13, 7, 15); /* 2 3 6 7 10 11 14 15 */
        butterfly(&x, &y, FACTORS(n / 4 + k / 4, 0, 0, 1, 1, 2, 2, 3, 3), twice, minus);
        u = SHUFFLE(vec, x, y, 0, 1, 8, 9, 4, 5, 12, 13); /* 0 1 2 3 8 9 10 11 */
        v = SHUFFLE(vec, x, y, 2, 3, 10, 11, 6, 7, 14, 15); /* 4 5 6 7 12 13 14 15 */
        butterfly(&u, &v, FACTORS(n / 8 + k / 8, 0, 0, 0, 0, 1, 1, 1, 1), twice, minus);
        STORE(words + k, SHUFFLE(vec, u, v, 0, 1, 2, 3, 8, 9, 10, 11));
        STORE(words + k + LANES, SHUFFLE(vec, u, v, 4, 5, 6, 7, 12, 13, 14, 15));
    }
    size_t step = LANES, blocks = n / (2 * LANES), left = 0;
    for (size_t b = blocks; b; b /= 2)
        left++;
    /* An odd number of stages is left: one by itself. */
    if (left % 2) {
        for (size_t i = 0; i < blocks; i++) {
            const Factor f =
                splat_factor(prime->inverses[blocks + i], prime->inverses_quotient[blocks + i]);
            uint64_t *from = words + 2 * step * i;
            for (size_t k = 0; k < step; k += LANES) {
                vec u = LOAD(from + k), v = LOAD(from + step + k);
                butterfly(&u, &v, f, twice, minus);
                STORE(from + k, u);
                STORE(from + step + k, v);
            }
        }
        step *= 2, blocks /= 2;
    }
    /* Two stages at a time. */
    for (; blocks; step *= 4, blocks /= 4)
        for (size_t i = 0; i < blocks / 2; i++) {
            const uint64_t *w = prime->inverses, *quotient = prime->inverses_quotient;
            const size_t first = blocks + 2 * i, second = blocks / 2 + i;
            const Factor f0 = splat_factor(w[first], quotient[first]);
            const Factor f1 = splat_factor(w[first + 1], quotient[first + 1]);
            const Factor f2 = splat_factor(w[second], quotient[second]);
            uint64_t *from = words + 4 * step * i;
            for (size_t k = 0; k < step; k += LANES) {
                vec x0 = LOAD(from + k), x1 = LOAD(from + step + k);
                vec x2 = LOAD(from + 2 * step + k), x3 = LOAD(from + 3 * step + k);
                butterfly(&x0, &x1, f0, twice, minus);
                butterfly(&x2, &x3, f1, twice, minus);
                butterfly(&x0, &x2, f2, twice, minus);
                butterfly(&x1, &x3, f2, twice, minus);
                STORE(from + k, x0);
                STORE(from + step + k, x1);
                STORE(from + 2 * step + k, x2);
                STORE(from + 3 * step + k, x3);
            }
        }
}

static void NAME(gather)(const Prime *prime, const Limbs *factors, const uint64_t (*limbs)[BLOCK],
                         size_t count, uint64_t *sum)
{
    const vec minus = SPLAT((1ULL << 52) - prime->p), bias = SPLAT(prime->p - factors->bias);
    Factor f[4];
    for (int l = 1; l < 4; l++)
        f[l] = splat_factor(factors->factor[l], factors->quotient[l]);
    for (size_t c = 0; c < count; c += LANES) {
        vec x = LOAD(sum + c) + LOAD(limbs[0] + c) + bias;
        for (int l = 1; l < 4; l++)
            x += times(LOAD(limbs[l] + c), f[l], minus);
        STORE(sum + c, x);
    }
}

static void NAME(shares)(const Prime *prime, const uint64_t *words, const uint64_t *pads,
                         size_t count, uint64_t bias, uint64_t cofactor, uint64_t quotient,
                         uint64_t *out)
{
    const vec p = SPLAT(prime->p), minus = SPLAT((1ULL << 52) - prime->p);
    const vec offset = SPLAT(2 * prime->p + bias);
    const Factor f = splat_factor(cofactor, quotient);
    for (size_t c = 0; c < count; c += LANES) {
        /* The pads of this variant are below 2 p, so that this is below 4 p. */
        const vec r = times(LOAD(words + c) + offset - LOAD(pads + c), f, minus);
        STORE(out + c, SMALLER(r, r - p));
    }
}

/* Limb l of 52 bits of a number in words of 64 bits. */
INLINE vec limb_of(const uint64_t words[4], int l)
{
    const int word = 52 * l / 64, shift = 52 * l % 64;
    uint64_t limb = words[word] >> shift;
    if (shift > 12 && word < 3)
        limb |= words[word + 1] << (64 - shift);
    return SPLAT(limb & LOW_52);
}

/* Carries, with their sign, into the next limb. */
INLINE void carry(vec limbs[4])
{
    for (int l = 0; l < 3; l++) {
        limbs[l + 1] += (vec)((signed_vec)limbs[l] >> 52);
        limbs[l] &= LOW_52;
    }
}

static void NAME(assemble)(const Ring *ring, const uint64_t (*shares)[BLOCK], size_t count,
                           uint64_t (*numbers)[BLOCK])
{
    vec share[PRIMES][3], fraction[PRIMES], q[4];
    for (int j = 0; j < PRIMES; j++) {
        fraction[j] = SPLAT(ring->fraction[j] >> 12); /* floor(2^101 / p_j) */
        for (int l = 0; l < 3; l++)
            share[j][l] = limb_of(ring->share[j], l);
    }
    for (int l = 0; l < 4; l++)
        q[l] = limb_of(ring->q, l);
    for (size_t c = 0; c < count; c += LANES) {
        /* Terms of y_j / p_j in units of 2^-51, each less than three units too small, so that the
         * multiple of q is right or one too small. Limbs gather less than 2^56. */
        vec parts = ZERO, number[4] = {ZERO, ZERO, ZERO, ZERO}, less[4];
        for (int j = 0; j < PRIMES; j++) {
            const vec y = LOAD(shares[j] + c);
            parts += HI(y << 2, fraction[j]);
            for (int l = 0; l < 3; l++) {
                number[l] = LO(number[l], y, share[j][l]);
                number[l + 1] += HI(y, share[j][l]);
            }
        }
        const vec times = parts >> 51;
        for (int l = 0; l < 4; l++) {
            number[l] -= LO(ZERO, times, q[l]);
            if (l < 3)
                number[l + 1] -= HI(times, q[l]);
        }
        carry(number);
        for (int l = 0; l < 4; l++)
            less[l] = number[l] - q[l];
        carry(less);
        const vec keep = (vec)((signed_vec)less[3] >> 63);
        for (int l = 0; l < 4; l++)
            number[l] = (number[l] & keep) | (less[l] & ~keep);
        STORE(numbers[0] + c, number[0] | number[1] << 52);
        STORE(numbers[1] + c, number[1] >> 12 | number[2] << 40);
        STORE(numbers[2] + c, number[2] >> 24 | number[3] << 28);
        STORE(numbers[3] + c, number[3] >> 36);
    }
}

static void NAME(canonical)(const Prime *prime, uint64_t *words, size_t count)
{
    const vec p = SPLAT(prime->p), minus = SPLAT((1ULL << 52) - prime->p);
    const vec lazy = SPLAT(prime->lazy);
    size_t c = 0;
    for (; c + LANES <= count; c += LANES) {
        /* The quotient is at most one too small, so the low 52 bits say what is left. */
        const vec word = LOAD(words + c), quotient = HI(word >> 32 << 3, lazy);
        const vec r = LO(word, quotient, minus) & LOW_52;
        STORE(words + c, SMALLER(r, r - p));
    }
    if (c < count) {
        uint64_t rest[LANES] = {0};
        memcpy(rest, words + c, (count - c) * sizeof *words);
        NAME(canonical)(prime, rest, LANES);
        memcpy(words + c, rest, (count - c) * sizeof *words);
    }
}

#if defined(DTL_EMULATED)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Steps *lattice_ifma(void)
{
    static Steps steps;
#if defined(DTL_EMULATED)
    steps = lattice_avx2() ? *lattice_avx2() : lattice_generic;
#else
    __builtin_cpu_init();
    if (!lattice_avx2() || !__builtin_cpu_supports("avx512f") ||
        !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512ifma"))
        return NULL;
    steps = *lattice_avx2();
#endif
    steps.keystream = NAME(keystream);
    steps.pad = NAME(pad);
    steps.popcounts = NAME(popcounts);
    steps.place = NAME(place);
    steps.gather = NAME(gather);
    steps.add = NAME(add);
    steps.take = NAME(take);
    steps.canonical = NAME(canonical);
    steps.shares = NAME(shares);
    steps.assemble = NAME(assemble);
    steps.slots = NAME(slots);
    return &steps;
}

#else

const Steps *lattice_ifma(void)
{
    return NULL;
}

#endif
