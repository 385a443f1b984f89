// Refusal of bad values.
#pragma once

#include <cinttypes>
#include <cstdio>
#include <stdexcept>

namespace corrmatch::CORRMATCH_ISA {

// `where` narrows down what the rule applies to, " at reliable pixels" for example.
[[noreturn]] inline void refuse(const char* argument, const char* where, int64_t low, int64_t high, int64_t got) {
  char message[256];
  std::snprintf(message, sizeof message, "%s: values%s must lie in [%" PRId64 ", %" PRId64 "], got %" PRId64, argument,
                where, low, high, got);
  throw std::invalid_argument(message);
}

}  // namespace corrmatch::CORRMATCH_ISA
