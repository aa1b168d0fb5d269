# The CPU kernels: one file for each instruction set, compiled with its flags. The choice is made at
# run time. All other files are compiled for the baseline of the architecture.
add_library(tdpo_cpu OBJECT csrc/cpu/token_stats.cpp csrc/cpu/threads.cpp
                            csrc/cpu/instruction_sets.cpp csrc/cpu/kernels_baseline.cpp)
set_target_properties(tdpo_cpu PROPERTIES POSITION_INDEPENDENT_CODE ON)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64" AND NOT CMAKE_OSX_ARCHITECTURES MATCHES "arm64")
  target_compile_definitions(tdpo_cpu PUBLIC TDPO_X86)
  target_sources(tdpo_cpu PRIVATE csrc/cpu/kernels_avx2.cpp csrc/cpu/kernels_avx512.cpp)
  set_source_files_properties(csrc/cpu/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS
                                                                   "-mavx2;-mfma;-mf16c")
  set_source_files_properties(
    csrc/cpu/kernels_avx512.cpp
    PROPERTIES COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mfma;-mf16c")
endif()

# Options that strict arithmetic (CMakeLists.txt) leaves open: a * b + c is rounded once, and neither
# errno nor floating-point flags are kept.
target_compile_options(
  tdpo_cpu
  PRIVATE -O3 $<IF:$<CXX_COMPILER_ID:GNU>,-ffp-contract=fast,-ffp-contract=on> -fno-math-errno -fno-trapping-math -Wall -Wextra
          # Let GCC interleave chains of dependent instructions before it allocates registers.
          $<$<CXX_COMPILER_ID:GNU>:-fschedule-insns -fsched-pressure>
          # GCC 12 warns at its own AVX-512 header, which reads undefined vectors.
          $<$<CXX_COMPILER_ID:GNU>:-Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized
            -Wno-uninitialized>)

# The threads are those of torch's OpenMP runtime, which is looked up at run time (threads.h).
target_link_libraries(tdpo_cpu PUBLIC ${CMAKE_DL_LIBS})
