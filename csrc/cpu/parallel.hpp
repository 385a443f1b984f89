// OpenMP where the compiler has it. The runtime is the one that torch has loaded, so the threads are shared with it.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace corrmatch::CORRMATCH_ISA {

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace corrmatch::CORRMATCH_ISA
