// AVX2: not written yet.
#include "kernels.h"

namespace lowbit {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace lowbit
