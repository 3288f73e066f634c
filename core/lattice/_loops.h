/* Those steps of _lattice.h that are plain loops: the compiler makes vectors of them. The file that
 * includes this defines NAME(x), the name of a function of this variant. */

static void NAME(popcounts)(const uint64_t *bits, size_t count, uint64_t *out)
{
    const uint64_t pairs = 0x5555555555555555, fours = 0x3333333333333333;
    const uint64_t bytes = 0x0f0f0f0f0f0f0f0f;
    for (size_t c = 0; c < count; c++) {
        uint64_t a = bits[2 * c], b = bits[2 * c + 1];
        a -= a >> 1 & pairs;
        b -= b >> 1 & pairs;
        a = (a & fours) + (a >> 2 & fours);
        b = (b & fours) + (b >> 2 & fours);
        a = (a & bytes) + (a >> 4 & bytes) + (b & bytes) + (b >> 4 & bytes);
        /* Eight bytes of at most 16 each, 128 in all: nothing is carried into the next byte. */
        a += a >> 32;
        a += a >> 16;
        a += a >> 8;
        out[c] = a & 255;
    }
}

static void NAME(place)(const uint64_t *restrict slots, size_t count, unsigned place,
                        unsigned bits, uint64_t (*restrict limbs)[BLOCK])
{
    for (unsigned got = 0; got < bits;) {
        const unsigned limb = (place + got) / WORD_BITS, shift = (place + got) % WORD_BITS;
        uint64_t *restrict out = limbs[limb];
        for (size_t c = 0; c < count; c++)
            out[c] |= slots[c] >> got << shift & WORD_MASK;
        got += WORD_BITS - shift;
    }
}

static bool NAME(add)(const Prime *prime, bool minus, const uint64_t *restrict words, size_t count,
                      uint64_t *restrict sum)
{
    const uint64_t p = prime->p;
    uint64_t beyond = 0;
    if (minus)
        for (size_t c = 0; c < count; c++) {
            const uint64_t word = words[c] & WORD_MASK;
            beyond |= p - 1 - word;
            sum[c] += p - word; /* where it is beyond p, the caller puts it right, modulo 2^64 */
        }
    else
        for (size_t c = 0; c < count; c++) {
            const uint64_t word = words[c] & WORD_MASK;
            beyond |= p - 1 - word;
            sum[c] += word;
        }
    return beyond >> 63;
}

static bool NAME(take)(const Prime *prime, uint64_t *words, size_t count)
{
    const uint64_t p = prime->p;
    uint64_t beyond = 0;
    for (size_t c = 0; c < count; c++) {
        words[c] &= WORD_MASK;
        beyond |= p - 1 - words[c];
    }
    return beyond >> 63;
}

static void NAME(slots)(const uint64_t (*numbers)[BLOCK], size_t count, unsigned place,
                        unsigned bits, uint64_t bias, int64_t *restrict out)
{
    const unsigned word = place / 64, shift = place % 64;
    const uint64_t mask = (1ULL << bits) - 1; /* bits <= 52 */
    const uint64_t *restrict low = numbers[word], *restrict next = numbers[word + (word < 3)];
    if (shift + bits <= 64)
        for (size_t c = 0; c < count; c++)
            out[c] = (int64_t)((low[c] >> shift & mask) - bias);
    else
        for (size_t c = 0; c < count; c++)
            out[c] = (int64_t)(((low[c] >> shift | next[c] << (64 - shift)) & mask) - bias);
}
