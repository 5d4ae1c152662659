# lockstep_library(NAME SRCS a.cc ... DEPS x y): one static library per folder, sources listed by name.
function(lockstep_library name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_library(${name} STATIC ${ARG_SRCS})
  target_link_libraries(${name} PUBLIC lockstep_flags ${ARG_DEPS})
endfunction()

# lockstep_binary(NAME SRCS a.cc DEPS x): a program in build/<preset>/bin.
function(lockstep_binary name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE lockstep_flags ${ARG_DEPS})
endfunction()

# lockstep_test(NAME SRCS a_test.cc DEPS x [TIMEOUT seconds]): one ctest entry per GoogleTest program.
function(lockstep_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SRCS;DEPS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE lockstep_flags ${ARG_DEPS} GTest::gmock GTest::gtest GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE LOCKSTEP_TEST_DATA="${PROJECT_SOURCE_DIR}/tests/data")
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS cpp)
endfunction()

# lockstep_fuzz(NAME SRCS a_fuzz.cc DEPS x): a libFuzzer program; nothing unless LOCKSTEP_FUZZ.
function(lockstep_fuzz name)
  if(NOT LOCKSTEP_FUZZ)
    return()
  endif()
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE lockstep_flags ${ARG_DEPS})
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
endfunction()

# lockstep_cuda_test(NAME SRCS a_test.cu DEPS x): a lockstep_test with the label cuda. It skips its device part, and says why, where there is no GPU.
if(LOCKSTEP_CUDA)
  function(lockstep_cuda_test name)
    lockstep_test(${name} ${ARGN})
    set_tests_properties(${name} PROPERTIES LABELS "cpp;cuda" RESOURCE_LOCK gpu)
    set_property(GLOBAL APPEND PROPERTY LOCKSTEP_CUDA_TESTS ${name})
  endfunction()
endif()
