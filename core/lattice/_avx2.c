/* The steps for x86-64 with AVX2 and FMA: every function carries the target, and it is the
 * processor that is asked at run time. */

#include "_lattice.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__)) && !defined(DTL_EMULATED)

#include <immintrin.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define CHACHA_LANES 8
#define SHUFFLED_BYTES
#define VALUE_LANES 4
#define REAL_LANES 4
typedef double reals __attribute__((vector_size(32)));
#define FMA(a, b, c) ((reals)_mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#define FNMA(a, b, c) ((reals)_mm256_fnmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#define ROUND(a)                                                                                   \
    ((reals)_mm256_round_pd((__m256d)(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#define LEAST(a, b) ((reals)_mm256_min_pd((__m256d)(a), (__m256d)(b)))
#define MOST(a, b) ((reals)_mm256_max_pd((__m256d)(a), (__m256d)(b)))

#define NAME(x) avx2_##x
#include "_steps.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static const Steps steps = STEPS_OF_THIS_VARIANT;

const Steps *lattice_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &steps : NULL;
}

#else

const Steps *lattice_avx2(void)
{
    return NULL;
}

#endif
