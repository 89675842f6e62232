// Which kernels this processor runs best, and why none where there are none.
#pragma once

#include "kernels/kernels.h"

namespace lowbit {

struct Choice {
    const Kernels* kernels;  // null: the provider offers no device
    const char* reason;      // one line, for people
};

// `wanted` names an instruction set ("avx512", "avx2", "portable", ...), or is empty for the best one.
Choice choose_kernels(const char* wanted);

}  // namespace lowbit
