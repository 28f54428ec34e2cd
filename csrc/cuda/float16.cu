#include "rows.h"

void fusedloss::cuda::run_float16(const Job& job) { run<float16>(job); }
