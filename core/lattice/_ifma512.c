#include "_lattice.h"

const Steps *lattice_ifma(void)
{
    return NULL;
}
