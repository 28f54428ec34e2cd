#include "class_sums.h"
#include "rows.h"
#include "scale.h"

void fusedloss::cuda::run_float64(const Job& job) { run<double>(job); }
void fusedloss::cuda::sum_float64(const Job& job) { sum<double>(job); }
void fusedloss::cuda::scale_float64(const Job& job) { scale<double>(job); }
int fusedloss::cuda::shared_bytes_float64(const Job& job) { return shared_bytes<double>(job); }
