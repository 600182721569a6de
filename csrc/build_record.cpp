// The build record as a string in the operator library: the text of the file build.json beside it,
// for txl_kernels._C. The library's only visible symbol.
#include "txl_build_record.h"

extern "C" {
extern const char txl_build_record[] __attribute__((visibility("default")));
const char txl_build_record[] = TXL_BUILD_RECORD;
}
