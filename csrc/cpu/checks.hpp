// Errors for invalid values.
#pragma once

#include <cinttypes>
#include <cstdio>
#include <stdexcept>

namespace corrmatch::CORRMATCH_ISA {

// `where` restricts the rule, for example " where reliable".
[[noreturn]] inline void refuse(const char* argument, const char* where, int64_t low, int64_t high, int64_t got) {
  char message[256];
  std::snprintf(message, sizeof message, "%s: expected values in [%" PRId64 ", %" PRId64 "]%s, got %" PRId64, argument,
                low, high, where, got);
  throw std::invalid_argument(message);
}

}  // namespace corrmatch::CORRMATCH_ISA
