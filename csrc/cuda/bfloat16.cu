#include "class_sums.h"
#include "pairs.h"
#include "scale.h"

void fusedloss::cuda::run_bfloat16(const Launch& job) { run_any<bfloat16>(job); }
void fusedloss::cuda::sum_bfloat16(const Launch& job) { sum<bfloat16>(job); }
void fusedloss::cuda::scale_bfloat16(const Launch& job) { scale<bfloat16>(job); }
int fusedloss::cuda::shared_bytes_bfloat16(const Launch& job) { return shared_bytes<bfloat16>(job); }
