/* ChaCha20, CHACHA_LANES blocks side by side: 16, 8 or 4. The file that includes this defines that
 * and NAME(x), the name of a function of this variant; it may be included more than once. */

#undef NUMBERS
#undef LOW32
#undef HIGH32
#undef LOW64
#undef HIGH64
#undef LOW128
#undef HIGH128
#undef ROTATE16
#undef ROTATE8

#if CHACHA_LANES == 16
typedef uint32_t NAME(lanes) __attribute__((vector_size(64)));
typedef uint32_t NAME(loose_lanes) __attribute__((vector_size(64), aligned(4), may_alias));
#define NUMBERS {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#define IN_LANES(a, b, w, x, y, z)                                                                 \
    SHUFFLE(NAME(lanes), a, b, w, x, y, z, w + 4, x + 4, y + 4, z + 4, w + 8, x + 8, y + 8,        \
                            z + 8, w + 12, x + 12, y + 12, z + 12)
#define LOW32(a, b) IN_LANES(a, b, 0, 16, 1, 17)
#define HIGH32(a, b) IN_LANES(a, b, 2, 18, 3, 19)
#define LOW64(a, b) IN_LANES(a, b, 0, 1, 16, 17)
#define HIGH64(a, b) IN_LANES(a, b, 2, 3, 18, 19)
/* Fours i and j of a, then of b. */
#define FOURS(a, b, i, j)                                                                          \
    SHUFFLE(NAME(lanes), a, b, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, 4 * j, 4 * j + 1,           \
                            4 * j + 2, 4 * j + 3, 16 + 4 * i, 17 + 4 * i, 18 + 4 * i, 19 + 4 * i,  \
                            16 + 4 * j, 17 + 4 * j, 18 + 4 * j, 19 + 4 * j)
#elif CHACHA_LANES == 8
typedef uint8_t NAME(bytes) __attribute__((vector_size(32)));
typedef uint32_t NAME(lanes) __attribute__((vector_size(32)));
typedef uint32_t NAME(loose_lanes) __attribute__((vector_size(32), aligned(4), may_alias));
#define NUMBERS {0, 1, 2, 3, 4, 5, 6, 7}
#define LOW32(a, b) SHUFFLE(NAME(lanes), a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH32(a, b) SHUFFLE(NAME(lanes), a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW64(a, b) SHUFFLE(NAME(lanes), a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH64(a, b) SHUFFLE(NAME(lanes), a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define LOW128(a, b) SHUFFLE(NAME(lanes), a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define HIGH128(a, b) SHUFFLE(NAME(lanes), a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#else
typedef uint32_t NAME(lanes) __attribute__((vector_size(16)));
typedef uint32_t NAME(loose_lanes) __attribute__((vector_size(16), aligned(4), may_alias));
#define NUMBERS {0, 1, 2, 3}
#define LOW32(a, b) SHUFFLE(NAME(lanes), a, b, 0, 4, 1, 5)
#define HIGH32(a, b) SHUFFLE(NAME(lanes), a, b, 2, 6, 3, 7)
#define LOW64(a, b) SHUFFLE(NAME(lanes), a, b, 0, 1, 4, 5)
#define HIGH64(a, b) SHUFFLE(NAME(lanes), a, b, 2, 3, 6, 7)
#endif

#ifndef ROTATE
#define ROTATE(x, r) ((x) << (r) | (x) >> (32 - (r)))
#endif
#if CHACHA_LANES == 8 && defined(SHUFFLED_BYTES) /* two rotations as one shuffle each */
#define BYTES(x) ((NAME(bytes))(x))
#define EACH4(f) f(0), f(4), f(8), f(12), f(16), f(20), f(24), f(28)
#define BY16(i) i + 2, i + 3, i, i + 1
#define BY8(i) i + 3, i, i + 1, i + 2
#define ROTATE16(x) ((NAME(lanes))SHUFFLE(NAME(bytes), BYTES(x), BYTES(x), EACH4(BY16)))
#define ROTATE8(x) ((NAME(lanes))SHUFFLE(NAME(bytes), BYTES(x), BYTES(x), EACH4(BY8)))
#else
#define ROTATE16(x) ROTATE(x, 16)
#define ROTATE8(x) ROTATE(x, 8)
#endif

#ifndef QUARTER
#define QUARTER(a, b, c, d)                                                                        \
    do {                                                                                           \
        a += b, d ^= a, d = ROTATE16(d);                                                           \
        c += d, b ^= c, b = ROTATE(b, 12);                                                         \
        a += b, d ^= a, d = ROTATE8(d);                                                            \
        c += d, b ^= c, b = ROTATE(b, 7);                                                          \
    } while (0)
#endif

/* Word w of every block in x[w], for as many words as there are lanes, to where they belong. */
static inline __attribute__((always_inline)) void NAME(turn)(const NAME(lanes) * x, uint32_t *out)
{
    NAME(lanes) t[CHACHA_LANES], u[CHACHA_LANES];
    for (int i = 0; i < CHACHA_LANES; i += 2) {
        t[i] = LOW32(x[i], x[i + 1]);
        t[i + 1] = HIGH32(x[i], x[i + 1]);
    }
    for (int i = 0; i < CHACHA_LANES; i += 4) {
        u[i] = LOW64(t[i], t[i + 2]);
        u[i + 1] = HIGH64(t[i], t[i + 2]);
        u[i + 2] = LOW64(t[i + 1], t[i + 3]);
        u[i + 3] = HIGH64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
#if CHACHA_LANES == 16
        const NAME(lanes) a = FOURS(u[i], u[i + 4], 0, 1), b = FOURS(u[i + 8], u[i + 12], 0, 1);
        const NAME(lanes) c = FOURS(u[i], u[i + 4], 2, 3), d = FOURS(u[i + 8], u[i + 12], 2, 3);
        *(NAME(loose_lanes) *)(out + 16 * i) = FOURS(a, b, 0, 2);
        *(NAME(loose_lanes) *)(out + 16 * (i + 4)) = FOURS(a, b, 1, 3);
        *(NAME(loose_lanes) *)(out + 16 * (i + 8)) = FOURS(c, d, 0, 2);
        *(NAME(loose_lanes) *)(out + 16 * (i + 12)) = FOURS(c, d, 1, 3);
#elif CHACHA_LANES == 8
        *(NAME(loose_lanes) *)(out + 16 * i) = LOW128(u[i], u[i + 4]);
        *(NAME(loose_lanes) *)(out + 16 * (i + 4)) = HIGH128(u[i], u[i + 4]);
#else
        *(NAME(loose_lanes) *)(out + 16 * i) = u[i];
#endif
    }
}

static void NAME(keystream)(const uint32_t key[KEY_WORDS], const uint32_t nonce[3],
                            uint32_t counter, size_t blocks, uint32_t *out)
{
    static const uint32_t constants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    const NAME(lanes) zero = {0}, numbers = NUMBERS;
    for (size_t done = 0; done < blocks; done += CHACHA_LANES, out += 16 * CHACHA_LANES) {
        NAME(lanes) x[16];
        const NAME(lanes) place = numbers + (counter + (uint32_t)done);
        for (int i = 0; i < 4; i++)
            x[i] = zero + constants[i];
        for (int i = 0; i < KEY_WORDS; i++)
            x[4 + i] = zero + key[i];
        x[12] = place;
        for (int i = 0; i < 3; i++)
            x[13 + i] = zero + nonce[i];
        for (int round = 0; round < 10; round++) {
            QUARTER(x[0], x[4], x[8], x[12]);
            QUARTER(x[1], x[5], x[9], x[13]);
            QUARTER(x[2], x[6], x[10], x[14]);
            QUARTER(x[3], x[7], x[11], x[15]);
            QUARTER(x[0], x[5], x[10], x[15]);
            QUARTER(x[1], x[6], x[11], x[12]);
            QUARTER(x[2], x[7], x[8], x[13]);
            QUARTER(x[3], x[4], x[9], x[14]);
        }
        for (int i = 0; i < 4; i++)
            x[i] += constants[i];
        for (int i = 0; i < KEY_WORDS; i++)
            x[4 + i] += key[i];
        x[12] += place;
        for (int i = 0; i < 3; i++)
            x[13 + i] += nonce[i];
        for (int i = 0; i < 16; i += CHACHA_LANES)
            NAME(turn)(x + i, out + i);
    }
}
