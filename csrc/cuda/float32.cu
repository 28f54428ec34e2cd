#include "rows.h"

void fusedloss::cuda::run_float32(const Job& job) { run<float>(job); }
