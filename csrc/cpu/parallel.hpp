// OpenMP, if the compiler supports it. The runtime is the one that torch has loaded, so both share their threads.
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
