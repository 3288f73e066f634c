/* The steps for any processor: 64-bit words, or float64 where every processor of the kind has
 * a fused multiply-add. */

#define VALUE_LANES 2
typedef double reals __attribute__((vector_size(16)));

#if defined(__aarch64__)
#include <arm_neon.h>
#define REAL_LANES 2
#define FMA(a, b, c) ((reals)vfmaq_f64((float64x2_t)(c), (float64x2_t)(a), (float64x2_t)(b)))
#define FNMA(a, b, c) ((reals)vfmsq_f64((float64x2_t)(c), (float64x2_t)(a), (float64x2_t)(b)))
#define ROUND(a) ((reals)vrndnq_f64((float64x2_t)(a)))
#define LEAST(a, b) ((reals)vminq_f64((float64x2_t)(a), (float64x2_t)(b)))
#define MOST(a, b) ((reals)vmaxq_f64((float64x2_t)(a), (float64x2_t)(b)))
#else
#define REAL_LANES 0
typedef long long lanes __attribute__((vector_size(16)));
static inline reals choose(lanes first, reals a, reals b)
{
    return (reals)(((lanes)a & first) | ((lanes)b & ~first));
}
#define LEAST(a, b) choose((lanes)((a) < (b)), a, b)
#define MOST(a, b) choose((lanes)((a) > (b)), a, b)
#endif

#define CHACHA_LANES 4
#define NAME(x) generic_##x
#include "_steps.h"

const Steps lattice_generic = STEPS_OF_THIS_VARIANT;
