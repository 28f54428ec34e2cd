#include "rows.h"

void fusedloss::cuda::run_float64(const Job& job) { run<double>(job); }
