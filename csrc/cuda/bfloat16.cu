#include "rows.h"

void fusedloss::cuda::run_bfloat16(const Job& job) { run<bfloat16>(job); }
