// Every op's schema, on one page. Kernels are registered in csrc/<op>/<op>.cpp and <op>.cu; fake
// kernels and gradients in musiclm_fast/ops/<op>/.

#include "common/stable.h"

STABLE_TORCH_LIBRARY_FRAGMENT(musiclm_fast, m) {
  (void)m;
}
