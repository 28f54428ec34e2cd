#include "class_sums.h"
#include "pairs.h"
#include "scale.h"

void fusedloss::cuda::run_float64(const Launch& job) { run_any<double>(job); }
void fusedloss::cuda::sum_float64(const Launch& job) { sum<double>(job); }
void fusedloss::cuda::scale_float64(const Launch& job) { scale<double>(job); }
int fusedloss::cuda::shared_bytes_float64(const Launch& job) { return shared_bytes<double>(job); }
