#include "kernels/cuda/c_api.h"

#include <string>

namespace {
thread_local std::string last_error;
}  // namespace

extern "C" const char* lockstep_last_error() {
  return last_error.c_str();
}

namespace lockstep::cuda {

int CApiResult(const absl::Status& status) {
  if (status.ok()) return 0;
  last_error = status.ToString();
  return 1;
}

}  // namespace lockstep::cuda
