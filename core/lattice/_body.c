/* Bodies, polynomial by polynomial and block by block, out of the steps of one variant.
 *
 * Nothing branches on a secret or takes it as an index but the rejection of mask words that are
 * not below their prime. What was secret is overwritten before memory is given back.
 */

#include "_lattice.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void lattice_overwrite(void *memory, size_t bytes)
{
    memset(memory, 0, bytes);
    __asm__ volatile("" : : "r"(memory) : "memory");
}

static size_t at_most(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* --- rings ----------------------------------------------------------------------------------*/

static uint64_t product(uint64_t a, uint64_t b, uint64_t p)
{
    return (uint64_t)((uint128)a * b % p);
}

static uint64_t quotient_of(uint64_t w, uint64_t p)
{
    return (uint64_t)(((uint128)w << 64) / p);
}

static uint64_t power(uint64_t base, uint64_t exponent, uint64_t p)
{
    uint64_t result = 1;
    for (; exponent; exponent >>= 1, base = product(base, base, p))
        if (exponent & 1)
            result = product(result, base, p);
    return result;
}

static bool prime_set_up(Prime *prime, size_t n, uint64_t p, uint64_t root)
{
    prime->p = p;
    prime->barrett = (uint64_t)(((uint128)1 << 101) / p);
    prime->lazy = (uint64_t)(((uint128)1 << 81) / p);
    prime->by_n = power(n, p - 2, p);
    prime->by_n_quotient = quotient_of(prime->by_n, p);
    uint64_t *tables = malloc(4 * n * sizeof *tables);
    prime->powers = tables;
    prime->inverses_real = malloc(n * sizeof(double));
    if (!tables || !prime->inverses_real)
        return false;
    prime->powers_quotient = tables + n;
    prime->inverses = tables + 2 * n;
    prime->inverses_quotient = tables + 3 * n;
    const uint64_t inverse = power(root, p - 2, p);
    uint64_t forth = 1, back = 1;
    for (size_t k = 0; k < n; k++) {
        size_t reversed = 0;
        for (size_t bit = 1; bit < n; bit *= 2)
            reversed = 2 * reversed + (k / bit & 1);
        prime->powers[reversed] = forth;
        prime->inverses[reversed] = back;
        forth = product(forth, root, p);
        back = product(back, inverse, p);
    }
    for (size_t k = 0; k < n; k++) {
        prime->powers_quotient[k] = quotient_of(prime->powers[k], p);
        prime->inverses_quotient[k] = quotient_of(prime->inverses[k], p);
        prime->inverses_real[k] = (double)prime->inverses[k];
    }
    return true;
}

/* number := number times factor; what goes beyond 256 bits is zero. */
static void multiply(uint64_t number[4], uint64_t factor)
{
    uint128 carry = 0;
    for (int i = 0; i < 4; i++) {
        carry += (uint128)number[i] * factor;
        number[i] = (uint64_t)carry;
        carry >>= 64;
    }
}

int lattice_ring_set_up(Ring *ring, size_t n, const uint64_t primes[PRIMES],
                        const uint64_t roots[PRIMES])
{
    memset(ring, 0, sizeof *ring);
    ring->n = n;
    for (int j = 0; j < PRIMES; j++)
        if (!prime_set_up(&ring->prime[j], n, primes[j], roots[j]))
            return LATTICE_MEMORY;
    ring->q[0] = 1;
    for (int j = 0; j < PRIMES; j++) {
        const uint64_t p = primes[j];
        uint64_t cofactor = 1;
        multiply(ring->q, p);
        ring->share[j][0] = 1;
        for (int i = 0; i < PRIMES; i++)
            if (i != j) {
                multiply(ring->share[j], primes[i]);
                cofactor = product(cofactor, primes[i] % p, p);
            }
        ring->cofactor[j] = power(cofactor, p - 2, p);
        ring->cofactor_quotient[j] = quotient_of(ring->cofactor[j], p);
        ring->fraction[j] = (uint64_t)(((uint128)1 << 113) / p);
    }
    return LATTICE_OK;
}

void lattice_ring_free(Ring *ring)
{
    for (int j = 0; j < PRIMES; j++) {
        free(ring->prime[j].powers);
        free(ring->prime[j].inverses_real);
    }
}

size_t lattice_coefficients(const Ring *ring, const Part *part)
{
    const size_t capacity = ring->n * part->slots;
    const size_t full = part->values / capacity, rest = part->values % capacity;
    return full * ring->n + (rest + part->slots - 1) / part->slots;
}

/* --- keystreams -----------------------------------------------------------------------------*/

static void load_key(const uint8_t *key, uint32_t words[KEY_WORDS])
{
    for (int i = 0; i < KEY_WORDS; i++)
        words[i] = (uint32_t)key[4 * i] | (uint32_t)key[4 * i + 1] << 8 |
                   (uint32_t)key[4 * i + 2] << 16 | (uint32_t)key[4 * i + 3] << 24;
}

static void nonce_of(uint32_t t, uint64_t number, uint32_t nonce[3])
{
    nonce[0] = t;
    nonce[1] = (uint32_t)number;
    nonce[2] = (uint32_t)(number >> 32);
}

static size_t whole_streams(size_t blocks)
{
    return (blocks + STREAM_BLOCKS - 1) / STREAM_BLOCKS * STREAM_BLOCKS;
}

/* The right word k for one that was rejected at t = 0. */
static uint64_t accepted(const Steps *steps, const uint32_t key[KEY_WORDS], uint64_t number,
                         size_t k, uint64_t p)
{
    uint64_t words[STREAM_WORDS], found;
    uint32_t nonce[3], t = 0;
    do {
        nonce_of(++t, number, nonce);
        steps->keystream(key, nonce, (uint32_t)(k / 8), STREAM_BLOCKS, (uint32_t *)words);
        found = words[k % 8] & WORD_MASK;
    } while (found >= p);
    lattice_overwrite(words, sizeof words);
    return found;
}

/* The words of polynomial i and prime j under a public key; out has room for whole streams. */
static void public_words(const Ring *ring, const Steps *steps, const uint32_t key[KEY_WORDS],
                         uint64_t i, int j, uint64_t *out)
{
    const Prime *prime = &ring->prime[j];
    const uint64_t number = PRIMES * i + (uint64_t)j;
    uint32_t nonce[3];
    nonce_of(0, number, nonce);
    steps->keystream(key, nonce, 0, ring->n / 8, (uint32_t *)out);
    if (steps->take(prime, out, ring->n))
        for (size_t k = 0; k < ring->n; k++)
            if (out[k] >= prime->p)
                out[k] = accepted(steps, key, number, k, prime->p);
}

/* sum += or -= the words [start, start + count) of a mask, start a multiple of STREAM_WORDS. */
static void add_mask(const Ring *ring, const Steps *steps, const uint32_t key[KEY_WORDS],
                     bool minus, uint64_t i, int j, size_t start, size_t count, uint64_t *scratch,
                     uint64_t *sum)
{
    const Prime *prime = &ring->prime[j];
    const uint64_t number = PRIMES * i + (uint64_t)j;
    uint32_t nonce[3];
    nonce_of(0, number, nonce);
    steps->keystream(key, nonce, (uint32_t)(start / 8), whole_streams((count + 7) / 8),
                     (uint32_t *)scratch);
    if (steps->add(prime, minus, scratch, count, sum))
        for (size_t c = 0; c < count; c++) {
            const uint64_t word = scratch[c] & WORD_MASK;
            if (word >= prime->p) {
                const uint64_t right = accepted(steps, key, number, start + c, prime->p);
                sum[c] += minus ? word - right : right - word;
            }
        }
}

/* Popcounts of the errors [start, start + count) of polynomial i: e + 64. */
static void errors(const Steps *steps, const uint32_t key[KEY_WORDS], uint64_t i, size_t start,
                   size_t count, uint64_t *scratch, uint64_t *out)
{
    uint32_t nonce[3];
    nonce_of(0, i, nonce);
    steps->keystream(key, nonce, (uint32_t)(start / 4), whole_streams((count + 3) / 4),
                     (uint32_t *)scratch);
    steps->popcounts(scratch, count, out);
}

void lattice_sample(const Ring *ring, const Steps *steps, const uint8_t key[KEY_BYTES],
                    uint64_t polynomial, int64_t *out)
{
    uint32_t words[KEY_WORDS];
    uint64_t scratch[2 * BLOCK], counts[BLOCK];
    load_key(key, words);
    for (size_t start = 0; start < ring->n; start += BLOCK) {
        const size_t count = at_most(BLOCK, ring->n - start);
        errors(steps, words, polynomial, start, count, scratch, counts);
        for (size_t c = 0; c < count; c++)
            out[start + c] = (int64_t)counts[c] - 64;
    }
    lattice_overwrite(words, sizeof words);
    lattice_overwrite(scratch, sizeof scratch);
    lattice_overwrite(counts, sizeof counts);
}

void lattice_transform(const Ring *ring, const int64_t *small, uint64_t *out)
{
    const size_t n = ring->n;
    for (int j = 0; j < PRIMES; j++, out += n) {
        const Prime *prime = &ring->prime[j];
        const uint64_t p = prime->p, twice = 2 * p;
        for (size_t k = 0; k < n; k++)
            out[k] = (uint64_t)small[k] + (p & (uint64_t)(small[k] >> 63));
        /* Harvey's butterflies: words stay below 4 p. */
        for (size_t step = n / 2, blocks = 1; step; step /= 2, blocks *= 2)
            for (size_t i = 0; i < blocks; i++) {
                const uint64_t w = prime->powers[blocks + i];
                const uint64_t quotient = prime->powers_quotient[blocks + i];
                uint64_t *from = out + 2 * step * i;
                for (size_t k = 0; k < step; k++) {
                    const uint64_t u = subtract_once(from[k], twice);
                    const uint64_t v = shoup(from[step + k], w, quotient, p);
                    from[k] = u + v;
                    from[step + k] = u - v + twice;
                }
            }
        for (size_t k = 0; k < n; k++)
            out[k] = subtract_once(subtract_once(out[k], twice), p);
    }
}

/* --- bytes ----------------------------------------------------------------------------------*/

/* Four rows of canonical words, `count` of them from coefficient `start` on, into the 25 m bytes
 * of a polynomial of m coefficients. */
static void write_block(uint64_t *const words[PRIMES], size_t start, size_t count, size_t m,
                        uint8_t *body)
{
    uint8_t *tops = body + LOW_BYTES * PRIMES * m + start;
    for (int j = 0; j < PRIMES; j++) {
        uint8_t *out = body + LOW_BYTES * (m * (size_t)j + start);
        const uint64_t *from = words[j];
        /* Eight bytes at a time: the next six write over the last two. */
        for (size_t c = 0; c + 1 < count; c++)
            memcpy(out + LOW_BYTES * c, &from[c], 8);
        memcpy(out + LOW_BYTES * (count - 1), &from[count - 1], LOW_BYTES);
    }
    for (size_t c = 0; c < count; c++)
        tops[c] = (uint8_t)(words[0][c] >> 48 | words[1][c] >> 48 << 2 | words[2][c] >> 48 << 4 |
                            words[3][c] >> 48 << 6);
}

/* The words of prime number j; returns whether all are below p. */
static bool read_block(const Prime *prime, int j, size_t start, size_t count, size_t m,
                       const uint8_t *body, uint64_t *out)
{
    const uint8_t *tops = body + LOW_BYTES * PRIMES * m + start;
    const uint8_t *from = body + LOW_BYTES * (m * (size_t)j + start);
    const uint64_t p = prime->p, low = (1ULL << 48) - 1;
    uint64_t beyond = 0;
    /* Two bytes beyond the low ones are read: there are tops behind them, at least m of them. */
    for (size_t c = 0; c < count; c++) {
        uint64_t word;
        if (m == 1)
            memcpy(&word, from, LOW_BYTES), word &= low;
        else
            memcpy(&word, from + LOW_BYTES * c, 8);
        out[c] = (word & low) | (uint64_t)(tops[c] >> 2 * j & 3) << 48;
        beyond |= p - 1 - out[c];
    }
    return !(beyond >> 63);
}

/* --- pad ------------------------------------------------------------------------------------*/

/* Everything that a block is worked on with. */
typedef struct {
    uint64_t limbs[PRIMES][BLOCK];
    uint64_t slots[BLOCK];
    uint64_t scratch[2 * BLOCK];
    uint32_t noise[BLOCK + 2 * 16 * STREAM_BLOCKS];
} Scratch;

/* a modulo p is multiplied by 1 / n, which the inverse transform leaves to it. */
static void scale_secret(const Ring *ring, const uint64_t *secret, uint64_t *out)
{
    for (int j = 0; j < PRIMES; j++) {
        const Prime *prime = &ring->prime[j];
        for (size_t k = 0; k < ring->n; k++, out++, secret++)
            *out = subtract_once(shoup(*secret, prime->by_n, prime->by_n_quotient, prime->p),
                                 prime->p);
    }
}

/* Factors of the limbs, and the sum of the biases of the error and of all slots. */
static void set_up_limbs(const Prime *prime, const Part *part, uint64_t error_bias, Limbs *limbs)
{
    const uint64_t p = prime->p, base = (1ULL << WORD_BITS) % p;
    limbs->factor[0] = 1;
    for (int l = 0; l < 4; l++) {
        if (l)
            limbs->factor[l] = product(limbs->factor[l - 1], base, p);
        limbs->quotient[l] = quotient_of(limbs->factor[l], p);
    }
    uint64_t bias = error_bias;
    for (unsigned slot = 0; slot < part->slots; slot++)
        bias += power(2, NOISE_BITS + part->slot_bits * slot + part->slot_bits - 1, p);
    limbs->bias = bias % p; /* at most 58 terms below 2^50 */
}

/* The keystream words of values [place, place + count) of the vector. */
static const uint32_t *noise_of(const Steps *steps, const uint32_t seed[KEY_WORDS], uint64_t place,
                                size_t count, uint32_t *out)
{
    const uint64_t first = place / 16, last = (place + count - 1) / 16; /* blocks */
    uint32_t nonce[3] = {0, 0, 0};
    /* The nonce, a number of 64 bits, goes up when the 32 bits of the counter are used up. */
    const uint64_t turn = (first >> 32) + 1;
    if (last >> 32 == first >> 32) {
        nonce[0] = (uint32_t)(first >> 32);
        steps->keystream(seed, nonce, (uint32_t)first, whole_streams((size_t)(last - first + 1)),
                         out);
    } else {
        const size_t before = (size_t)((turn << 32) - first);
        nonce[0] = (uint32_t)(first >> 32);
        steps->keystream(seed, nonce, (uint32_t)first, whole_streams(before), out);
        nonce[0] = (uint32_t)turn;
        steps->keystream(seed, nonce, 0, whole_streams((size_t)(last - first + 1) - before),
                         out + 16 * before);
    }
    return out + place % 16;
}

typedef struct {
    const Ring *ring;
    const Steps *steps;
    const Part *part;
    const Values *values;
    Rounding rounding;
    const uint32_t *seed;
    uint64_t first_value;
    size_t clamped;
    bool finite;
} Encoder;

/* Slots of the coefficients [start, start + count) of a polynomial of m, whose `held` values
 * begin at values[at]. Everything gets the bias 2^(B-1). */
static void encode_block(Encoder *encoder, size_t at, size_t held, size_t m, size_t start,
                         size_t count, Scratch *scratch)
{
    const Steps *steps = encoder->steps;
    const unsigned bits = encoder->part->slot_bits;
    const uint64_t bias = 1ULL << (bits - 1);
    uint64_t *slots = scratch->slots;
    for (unsigned slot = 0; slot < encoder->part->slots; slot++) {
        const size_t first = slot * m + start;
        const size_t here = first >= held ? 0 : at_most(count, held - first);
        if (here) {
            if (encoder->seed)
                encoder->rounding.noise = noise_of(
                    steps, encoder->seed, encoder->first_value + at + first, here, scratch->noise);
            if (encoder->values->floats)
                encoder->finite &=
                    steps->quantize_float(encoder->values->floats + at + first, here,
                                          &encoder->rounding, bias, slots, &encoder->clamped);
            else if (encoder->values->doubles)
                encoder->finite &=
                    steps->quantize_double(encoder->values->doubles + at + first, here,
                                           &encoder->rounding, bias, slots, &encoder->clamped);
            else
                for (size_t c = 0; c < here; c++)
                    slots[c] = (uint64_t)encoder->values->integers[at + first + c] + bias;
        }
        for (size_t c = here; c < count; c++)
            slots[c] = bias;
        steps->place(slots, count, NOISE_BITS + bits * slot, bits, scratch->limbs);
    }
}

/* What one call of pad works with; all of it is overwritten at its end. */
typedef struct {
    Scratch scratch;
    uint32_t k_a[KEY_WORDS], k_e[KEY_WORDS], seed[KEY_WORDS];
    Limbs limbs[PRIMES];
} PadState;

static void pad_polynomial(Encoder *encoder, PadState *state, const uint64_t *secret,
                           const Mask *masks, const uint32_t (*keys)[KEY_WORDS],
                           size_t mask_count, uint64_t i, size_t at, size_t held, size_t m,
                           uint64_t *rows, uint8_t *body)
{
    const Ring *ring = encoder->ring;
    const Steps *steps = encoder->steps;
    const size_t n = ring->n;
    if (secret)
        for (int j = 0; j < PRIMES; j++) {
            public_words(ring, steps, state->k_a, i, j, rows + n * (size_t)j);
            steps->pad(&ring->prime[j], n, rows + n * (size_t)j, secret + n * (size_t)j);
        }
    else
        memset(rows, 0, PRIMES * n * sizeof *rows);
    for (size_t start = 0; start < m; start += BLOCK) {
        const size_t count = at_most(BLOCK, m - start);
        Scratch *scratch = &state->scratch;
        memset(scratch->limbs, 0, sizeof scratch->limbs);
        if (secret)
            errors(steps, state->k_e, i, start, count, scratch->scratch, scratch->limbs[0]);
        encode_block(encoder, at, held, m, start, count, scratch);
        uint64_t *sums[PRIMES];
        for (int j = 0; j < PRIMES; j++) {
            const Prime *prime = &ring->prime[j];
            sums[j] = rows + n * (size_t)j + start;
            steps->gather(prime, &state->limbs[j], (const uint64_t (*)[BLOCK])scratch->limbs,
                          count, sums[j]);
            for (size_t b = 0; b < mask_count; b++) {
                add_mask(ring, steps, keys[b], masks[b].minus, i, j, start, count,
                         scratch->scratch, sums[j]);
                if (b % MAX_TERMS == MAX_TERMS - 1)
                    steps->canonical(prime, sums[j], count);
            }
            steps->canonical(prime, sums[j], count);
        }
        write_block(sums, start, count, m, body);
    }
}

int lattice_pad(const Ring *ring, const Steps *steps, const uint8_t k_a[KEY_BYTES],
                const uint64_t *secret, const uint8_t k_e[KEY_BYTES], const Mask *masks,
                size_t mask_count, const Part *part, const Values *values, double scale,
                double one, double limit, const uint8_t *seed, uint64_t first_value, uint8_t *body,
                size_t *clamped)
{
    const size_t n = ring->n, capacity = n * part->slots;
    const size_t table = PRIMES * n * sizeof(uint64_t);
    PadState *state = calloc(1, sizeof *state);
    uint64_t *rows = malloc(table), *scaled = malloc(table);
    uint32_t(*keys)[KEY_WORDS] = calloc(mask_count + 1, sizeof *keys);
    int status = LATTICE_MEMORY;
    if (state && rows && scaled && keys) {
        Encoder encoder = {.ring = ring, .steps = steps, .part = part, .values = values,
                           .rounding = {.scale = scale, .one = one, .limit = limit},
                           .seed = seed ? state->seed : NULL, .first_value = first_value,
                           .finite = true};
        if (secret) {
            load_key(k_a, state->k_a);
            load_key(k_e, state->k_e);
            scale_secret(ring, secret, scaled);
        }
        if (seed)
            load_key(seed, state->seed);
        for (size_t b = 0; b < mask_count; b++)
            load_key(masks[b].key, keys[b]);
        for (int j = 0; j < PRIMES; j++)
            set_up_limbs(&ring->prime[j], part, secret ? 64 : 0, &state->limbs[j]);
        size_t at = 0;
        for (uint64_t i = part->first; at < part->values; i++) {
            const size_t held = at_most(capacity, part->values - at);
            const size_t m = held == capacity ? n : (held + part->slots - 1) / part->slots;
            pad_polynomial(&encoder, state, secret ? scaled : NULL, masks,
                           (const uint32_t(*)[KEY_WORDS])keys, mask_count, i, at, held, m, rows,
                           body);
            at += held;
            body += COEFFICIENT_BYTES * m;
        }
        *clamped = encoder.clamped;
        status = encoder.finite ? LATTICE_OK : LATTICE_NOT_FINITE;
    }
    if (state)
        lattice_overwrite(state, sizeof *state);
    if (rows)
        lattice_overwrite(rows, table);
    if (scaled)
        lattice_overwrite(scaled, table);
    if (keys)
        lattice_overwrite(keys, mask_count * sizeof *keys);
    free(state);
    free(rows);
    free(scaled);
    free(keys);
    return status;
}

/* --- open -----------------------------------------------------------------------------------*/

typedef struct {
    uint64_t words[BLOCK];
    uint64_t shares[PRIMES][BLOCK];
    uint64_t numbers[4][BLOCK];
    int64_t slots[BLOCK];
} OpenState;

void lattice_assemble(const Ring *ring, const uint64_t (*shares)[BLOCK], size_t count,
                      uint64_t (*numbers)[BLOCK])
{
    for (size_t c = 0; c < count; c++) {
        /* The multiple is the whole part of the sum of y_j / p_j, here in units of 2^-61; each
         * term is less than three units too small, so the multiple is right or one too small. */
        uint64_t parts = 0;
        uint128 sum[4] = {0};
        for (int j = 0; j < PRIMES; j++) {
            const uint64_t y = shares[j][c];
            parts += high(y << 14, ring->fraction[j]) >> 2;
            for (int i = 0; i < 3; i++) { /* q / p_j has 150 bits */
                const uint128 part = (uint128)y * ring->share[j][i];
                sum[i] += (uint64_t)part;
                sum[i + 1] += (uint64_t)(part >> 64);
            }
        }
        const uint64_t times = parts >> 61;
        uint64_t number[4], less[4];
        uint128 carry = 0, borrow = 0;
        for (int i = 0; i < 4; i++) {
            const uint128 part = (uint128)times * ring->q[i] + borrow;
            carry += sum[i];
            const uint64_t word = (uint64_t)carry;
            carry >>= 64;
            borrow = (part >> 64) + (word < (uint64_t)part);
            number[i] = word - (uint64_t)part;
        }
        uint64_t under = 0;
        for (int i = 0; i < 4; i++) {
            const uint128 difference = (uint128)number[i] - ring->q[i] - under;
            less[i] = (uint64_t)difference;
            under = (uint64_t)(difference >> 64) & 1;
        }
        const uint64_t keep = 0 - under;
        for (int i = 0; i < 4; i++)
            numbers[i][c] = (number[i] & keep) | (less[i] & ~keep);
    }
}

/* Whether all errors are within the bound, and nothing is above the slots; not zero: no. */
static uint64_t beyond_range(const OpenState *state, size_t count, uint64_t bound, unsigned end)
{
    const uint64_t mask = (1ULL << NOISE_BITS) - 1, half = 1ULL << (NOISE_BITS - 1);
    uint64_t wrong = 0;
    for (size_t c = 0; c < count; c++) {
        const uint64_t shifted = (state->numbers[0][c] & mask) - half + bound; /* E + bound */
        wrong |= (2 * bound - shifted) >> 63 | shifted >> 63;
        for (unsigned word = end / 64; word < 4; word++) {
            const unsigned shift = word == end / 64 ? end % 64 : 0;
            wrong |= state->numbers[word][c] >> shift;
        }
    }
    return wrong;
}

/* What is added to v: makes the error and the slots of an honest one non-negative. */
static uint64_t open_bias(const Prime *prime, const Part *part)
{
    Limbs limbs;
    set_up_limbs(prime, part, 1ULL << (NOISE_BITS - 1), &limbs);
    return limbs.bias;
}

int lattice_open(const Ring *ring, const Steps *steps, const uint8_t k_a[KEY_BYTES],
                 const uint64_t *secret, uint64_t bound, const Part *part, const uint8_t *body,
                 int64_t *out, bool *good)
{
    const size_t n = ring->n, capacity = n * part->slots;
    const size_t table = PRIMES * n * sizeof(uint64_t);
    const unsigned bits = part->slot_bits, end = NOISE_BITS + bits * part->slots;
    OpenState *state = calloc(1, sizeof *state);
    uint64_t *rows = malloc(table), *scaled = malloc(table);
    int status = LATTICE_MEMORY;
    if (state && rows && scaled) {
        uint32_t key[KEY_WORDS];
        uint64_t bias[PRIMES], wrong = 0;
        bool in_range = true;
        load_key(k_a, key);
        scale_secret(ring, secret, scaled);
        for (int j = 0; j < PRIMES; j++)
            bias[j] = open_bias(&ring->prime[j], part);
        size_t at = 0;
        for (uint64_t i = part->first; at < part->values; i++) {
            const size_t held = at_most(capacity, part->values - at);
            const size_t m = held == capacity ? n : (held + part->slots - 1) / part->slots;
            for (int j = 0; j < PRIMES; j++) {
                public_words(ring, steps, key, i, j, rows + n * (size_t)j);
                steps->pad(&ring->prime[j], n, rows + n * (size_t)j, scaled + n * (size_t)j);
            }
            for (size_t start = 0; start < m; start += BLOCK) {
                const size_t count = at_most(BLOCK, m - start);
                for (int j = 0; j < PRIMES; j++) {
                    const Prime *prime = &ring->prime[j];
                    in_range &= read_block(prime, j, start, count, m, body, state->words);
                    steps->shares(prime, state->words, rows + n * (size_t)j + start, count,
                                  bias[j], ring->cofactor[j], ring->cofactor_quotient[j],
                                  state->shares[j]);
                }
                steps->assemble(ring, (const uint64_t (*)[BLOCK])state->shares, count,
                                state->numbers);
                wrong |= beyond_range(state, count, bound, end);
                for (unsigned slot = 0; slot < part->slots; slot++) {
                    const size_t first = slot * m + start;
                    const size_t here = first >= held ? 0 : at_most(count, held - first);
                    int64_t *to = here == count ? out + at + first : state->slots;
                    steps->slots((const uint64_t (*)[BLOCK])state->numbers, count,
                                 NOISE_BITS + bits * slot, bits, 1ULL << (bits - 1), to);
                    if (here < count) {
                        memcpy(out + at + (here ? first : 0), state->slots, here * sizeof *out);
                        for (size_t c = here; c < count; c++)
                            wrong |= (uint64_t)state->slots[c];
                    }
                }
            }
            at += held;
            body += COEFFICIENT_BYTES * m;
        }
        *good = !wrong;
        status = in_range ? LATTICE_OK : LATTICE_RANGE;
    }
    if (state)
        lattice_overwrite(state, sizeof *state);
    if (rows)
        lattice_overwrite(rows, table);
    if (scaled)
        lattice_overwrite(scaled, table);
    free(state);
    free(rows);
    free(scaled);
    return status;
}

/* --- sums -----------------------------------------------------------------------------------*/

static size_t next_polynomial(const Ring *ring, size_t coefficients)
{
    return at_most(ring->n, coefficients);
}

int lattice_sum_body(const Ring *ring, const Steps *steps, uint64_t *sum, size_t coefficients,
                     const uint8_t *body, int how)
{
    uint64_t words[BLOCK];
    bool in_range = true;
    while (coefficients) {
        const size_t m = next_polynomial(ring, coefficients);
        for (int j = 0; j < PRIMES; j++, sum += m) {
            const Prime *prime = &ring->prime[j];
            for (size_t start = 0; start < m; start += BLOCK) {
                const size_t count = at_most(BLOCK, m - start);
                in_range &= read_block(prime, j, start, count, m, body, words);
                if (how == SUM_SUBTRACT_FROM) {
                    steps->canonical(prime, sum + start, count);
                    for (size_t c = 0; c < count; c++)
                        sum[start + c] = words[c] + prime->p - sum[start + c];
                } else
                    steps->add(prime, how == SUM_SUBTRACT, words, count, sum + start);
            }
        }
        coefficients -= m;
        body += COEFFICIENT_BYTES * m;
    }
    return in_range ? LATTICE_OK : LATTICE_RANGE;
}

void lattice_sum_mask(const Ring *ring, const Steps *steps, uint64_t *sum, size_t coefficients,
                      uint64_t first, const Mask *mask)
{
    uint64_t scratch[BLOCK];
    uint32_t key[KEY_WORDS];
    load_key(mask->key, key);
    for (uint64_t i = first; coefficients; i++) {
        const size_t m = next_polynomial(ring, coefficients);
        for (int j = 0; j < PRIMES; j++, sum += m)
            for (size_t start = 0; start < m; start += BLOCK)
                add_mask(ring, steps, key, mask->minus, i, j, start, at_most(BLOCK, m - start),
                         scratch, sum + start);
        coefficients -= m;
    }
    lattice_overwrite(scratch, sizeof scratch);
    lattice_overwrite(key, sizeof key);
}

void lattice_sum_reduce(const Ring *ring, const Steps *steps, uint64_t *sum, size_t coefficients)
{
    while (coefficients) {
        const size_t m = next_polynomial(ring, coefficients);
        for (int j = 0; j < PRIMES; j++, sum += m)
            steps->canonical(&ring->prime[j], sum, m);
        coefficients -= m;
    }
}

void lattice_sum_write(const Ring *ring, const Steps *steps, uint64_t *sum, size_t coefficients,
                       uint8_t *body)
{
    lattice_sum_reduce(ring, steps, sum, coefficients);
    while (coefficients) {
        const size_t m = next_polynomial(ring, coefficients);
        for (size_t start = 0; start < m; start += BLOCK) {
            uint64_t *const words[PRIMES] = {sum + start, sum + m + start, sum + 2 * m + start,
                                             sum + 3 * m + start};
            write_block(words, start, at_most(BLOCK, m - start), m, body);
        }
        sum += PRIMES * m;
        coefficients -= m;
        body += COEFFICIENT_BYTES * m;
    }
}
