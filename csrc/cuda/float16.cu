#include "class_sums.h"
#include "pairs.h"
#include "scale.h"

void fusedloss::cuda::run_float16(const Launch& job) { run_any<float16>(job); }
void fusedloss::cuda::sum_float16(const Launch& job) { sum<float16>(job); }
void fusedloss::cuda::scale_float16(const Launch& job) { scale<float16>(job); }
int fusedloss::cuda::shared_bytes_float16(const Launch& job) { return shared_bytes<float16>(job); }
