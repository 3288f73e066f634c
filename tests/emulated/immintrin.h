/* AVX-512 in plain C, for tests of the kernels on machines that do not have it.
 *
 * Put in the place of <immintrin.h> (-I tests/emulated -DDTL_EMULATED), it computes what the
 * instructions compute, a lane at a time; it says nothing about their speed. Only what the
 * kernels use is here. Meanings: Intel's Intrinsics Guide.
 */
#ifndef DTL_EMULATED_IMMINTRIN_H
#define DTL_EMULATED_IMMINTRIN_H

#ifndef DTL_EMULATED
#error "tests/emulated/immintrin.h is for builds with -DDTL_EMULATED"
#endif

#include <stdint.h>
#include <string.h>

#pragma GCC diagnostic ignored "-Wpsabi" /* nothing here is called from elsewhere */

typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef unsigned long long dtl_u512 __attribute__((vector_size(64), may_alias));
typedef uint8_t __mmask8;

#define DTL_EMULATED_ __attribute__((always_inline, unused)) static inline
#define DTL_LIMB_ ((1ULL << 52) - 1)
#define DTL_LANES_ for (int lane_ = 0; lane_ < 8; lane_++)

/* All ones in the lanes of k. */
DTL_EMULATED_ __m512i dtl_lanes(__mmask8 k)
{
    __m512i out;
    DTL_LANES_ out[lane_] = -(long long)(k >> lane_ & 1);
    return out;
}

DTL_EMULATED_ __m512i _mm512_setzero_si512(void)
{
    return (__m512i){0};
}

DTL_EMULATED_ __m512i _mm512_set1_epi64(long long a)
{
    return (__m512i){a, a, a, a, a, a, a, a};
}

/* --- memory --- */

DTL_EMULATED_ __m512i _mm512_loadu_si512(const void *from)
{
    __m512i out;
    memcpy(&out, from, sizeof out);
    return out;
}

DTL_EMULATED_ void _mm512_storeu_si512(void *to, __m512i a)
{
    memcpy(to, &a, sizeof a);
}

DTL_EMULATED_ __m512i _mm512_load_si512(const void *from)
{
    return *(const __m512i *)from;
}

DTL_EMULATED_ void _mm512_store_si512(void *to, __m512i a)
{
    *(__m512i *)to = a;
}

/* --- eight numbers of 64 bits; sums and differences modulo 2^64 --- */

DTL_EMULATED_ __m512i _mm512_add_epi64(__m512i a, __m512i b)
{
    return (__m512i)((dtl_u512)a + (dtl_u512)b);
}

DTL_EMULATED_ __m512i _mm512_sub_epi64(__m512i a, __m512i b)
{
    return (__m512i)((dtl_u512)a - (dtl_u512)b);
}

DTL_EMULATED_ __m512i _mm512_and_si512(__m512i a, __m512i b)
{
    return a & b;
}

DTL_EMULATED_ __m512i _mm512_or_si512(__m512i a, __m512i b)
{
    return a | b;
}

DTL_EMULATED_ __m512i _mm512_xor_si512(__m512i a, __m512i b)
{
    return a ^ b;
}

DTL_EMULATED_ __m512i _mm512_slli_epi64(__m512i a, unsigned count)
{
    return count > 63 ? _mm512_setzero_si512() : (__m512i)((dtl_u512)a << (int)count);
}

DTL_EMULATED_ __m512i _mm512_srli_epi64(__m512i a, unsigned count)
{
    return count > 63 ? _mm512_setzero_si512() : (__m512i)((dtl_u512)a >> (int)count);
}

/* With the sign: GCC shifts negative numbers so. */
DTL_EMULATED_ __m512i _mm512_srai_epi64(__m512i a, unsigned count)
{
    return a >> (int)(count > 63 ? 63 : count);
}

/* --- masks --- */

DTL_EMULATED_ __m512i _mm512_mask_mov_epi64(__m512i otherwise, __mmask8 k, __m512i a)
{
    const __m512i lanes = dtl_lanes(k);
    return (a & lanes) | (otherwise & ~lanes);
}

DTL_EMULATED_ __m512i _mm512_maskz_mov_epi64(__mmask8 k, __m512i a)
{
    return a & dtl_lanes(k);
}

DTL_EMULATED_ __m512i _mm512_mask_add_epi64(__m512i otherwise, __mmask8 k, __m512i a, __m512i b)
{
    return _mm512_mask_mov_epi64(otherwise, k, _mm512_add_epi64(a, b));
}

DTL_EMULATED_ __m512i _mm512_mask_sub_epi64(__m512i otherwise, __mmask8 k, __m512i a, __m512i b)
{
    return _mm512_mask_mov_epi64(otherwise, k, _mm512_sub_epi64(a, b));
}

DTL_EMULATED_ __m512i _mm512_mask_and_epi64(__m512i otherwise, __mmask8 k, __m512i a, __m512i b)
{
    return _mm512_mask_mov_epi64(otherwise, k, a & b);
}

DTL_EMULATED_ __mmask8 _mm512_cmpeq_epi64_mask(__m512i a, __m512i b)
{
    unsigned k = 0;
    DTL_LANES_ k |= (unsigned)(a[lane_] == b[lane_]) << lane_;
    return (__mmask8)k;
}

DTL_EMULATED_ __mmask8 _mm512_cmplt_epu64_mask(__m512i a, __m512i b)
{
    const dtl_u512 x = (dtl_u512)a, y = (dtl_u512)b;
    unsigned k = 0;
    DTL_LANES_ k |= (unsigned)(x[lane_] < y[lane_]) << lane_;
    return (__mmask8)k;
}

DTL_EMULATED_ __mmask8 _mm512_cmpge_epu64_mask(__m512i a, __m512i b)
{
    return (__mmask8)~_mm512_cmplt_epu64_mask(a, b);
}

DTL_EMULATED_ __m512i _mm512_min_epu64(__m512i a, __m512i b)
{
    return _mm512_mask_mov_epi64(b, _mm512_cmplt_epu64_mask(a, b), a);
}

/* --- IFMA: the low or high 52 bits of the product of two numbers of 52 bits, added --- */

DTL_EMULATED_ __m512i _mm512_madd52lo_epu64(__m512i sum, __m512i a, __m512i b)
{
    dtl_u512 out = (dtl_u512)sum;
    DTL_LANES_ out[lane_] +=
        (((uint64_t)a[lane_] & DTL_LIMB_) * ((uint64_t)b[lane_] & DTL_LIMB_)) & DTL_LIMB_;
    return (__m512i)out;
}

DTL_EMULATED_ __m512i _mm512_madd52hi_epu64(__m512i sum, __m512i a, __m512i b)
{
    dtl_u512 out = (dtl_u512)sum;
    DTL_LANES_ out[lane_] +=
        (uint64_t)((unsigned __int128)((uint64_t)a[lane_] & DTL_LIMB_) *
                       ((uint64_t)b[lane_] & DTL_LIMB_) >>
                   52);
    return (__m512i)out;
}

#endif
