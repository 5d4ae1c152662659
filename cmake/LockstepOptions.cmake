# Options and compile flags. Flags sit on one interface target, so that third-party headers and generated code can opt out of the warnings.
option(LOCKSTEP_CUDA "Build the CUDA backend (needs nvcc)" OFF)
option(LOCKSTEP_RACECHECK "CUDA code in a form that compute-sanitizer's racecheck can follow, slower (kernels/cuda/warp_arrive.cuh)" OFF)
option(LOCKSTEP_FUZZ "Build the libFuzzer targets (needs clang)" OFF)
set(LOCKSTEP_SANITIZE "" CACHE STRING "Value of -fsanitize=, empty for none")

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")

find_program(LOCKSTEP_CCACHE ccache)
if(LOCKSTEP_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${LOCKSTEP_CCACHE}")
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${LOCKSTEP_CCACHE}")
endif()

add_library(lockstep_flags INTERFACE)
target_include_directories(lockstep_flags INTERFACE "${PROJECT_SOURCE_DIR}" "${PROJECT_BINARY_DIR}/proto")
# -ffp-contract=off: an a*b+c in the source is two roundings and stays two. Where one is meant, the code says fma.
target_compile_options(lockstep_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off -Wall -Wextra -Werror -Wshadow -Wnon-virtual-dtor -Wimplicit-fallthrough -Wno-sign-compare -Wno-missing-field-initializers>)
if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  target_compile_options(lockstep_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wthread-safety>)
endif()
if(LOCKSTEP_SANITIZE)
  target_compile_options(lockstep_flags INTERFACE -fsanitize=${LOCKSTEP_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  target_link_options(lockstep_flags INTERFACE -fsanitize=${LOCKSTEP_SANITIZE})
endif()
if(LOCKSTEP_FUZZ)
  target_compile_options(lockstep_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()

if(LOCKSTEP_CUDA)
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "LOCKSTEP_CUDA=ON needs nvcc of CUDA 12 or newer, and found none. Put it on PATH or set CUDACXX to it; "
      "without a CUDA toolkit build the CPU backend alone: cmake --preset cpu")
  endif()
  # wgmma and TMA need the "a": sm_90a code runs on Hopper only.
  set(CMAKE_CUDA_ARCHITECTURES 90a)
  # A binary needs the driver alone where it runs.
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  # After enable_language, and with the flag by name, because CMake 3.25 does not know that nvcc speaks C++20.
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  find_package(CUDAToolkit REQUIRED)
  # -fmad=false is -ffp-contract=off for device code: where a fused multiply-add is meant, the code says __fmaf_rn.
  target_compile_options(lockstep_flags INTERFACE
    "$<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;--compress-mode=size;-Werror=all-warnings;-Xcompiler=-ffp-contract=off,-Wall,-Wextra,-Werror,-Wno-sign-compare>")
  if(LOCKSTEP_RACECHECK)
    target_compile_options(lockstep_flags INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:-DLOCKSTEP_RACECHECK;-lineinfo>")
  endif()
endif()
