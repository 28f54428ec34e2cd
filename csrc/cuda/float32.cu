#include "class_sums.h"
#include "pairs.h"
#include "scale.h"

void fusedloss::cuda::run_float32(const Launch& job) { run_any<float>(job); }
void fusedloss::cuda::sum_float32(const Launch& job) { sum<float>(job); }
void fusedloss::cuda::scale_float32(const Launch& job) { scale<float>(job); }
int fusedloss::cuda::shared_bytes_float32(const Launch& job) { return shared_bytes<float>(job); }
