# The CUDA kernels: TDPO_CUDA = AUTO (if a compiler is found), ON (it must be), OFF.
#
# It sets tdpo_cuda, an object library, or TDPO_NO_CUDA_BECAUSE, which tdpo_ext.backends() reports. The
# compiler is searched for in CUDACXX, on the path, in CUDA_HOME or CUDA_PATH, and in /usr/local/cuda; with
# TDPO_CUDA_FROM_PYPI among the packages of the build environment only, where pyproject.toml puts it. The
# CUDA runtime is linked statically: no CUDA library is needed to import the package.
if(NOT TDPO_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TDPO_CUDA must be AUTO, ON or OFF, got '${TDPO_CUDA}'")
endif()

set(TDPO_NO_CUDA_BECAUSE "")
if(TDPO_CUDA STREQUAL "OFF")
  set(TDPO_NO_CUDA_BECAUSE "it was built with TDPO_CUDA=OFF")
else()
  # CUDACXX is set rather than CMAKE_CUDA_COMPILER, with which check_language would not try it.
  if(TDPO_CUDA_FROM_PYPI)
    # Python is asked, since pip spreads the build environment over several folders.
    set(ask "import nvidia; print(';'.join(f'{path}/cu13/bin' for path in nvidia.__path__))")
    execute_process(COMMAND "${Python_EXECUTABLE}" -c "${ask}" OUTPUT_VARIABLE folders ERROR_QUIET
                    OUTPUT_STRIP_TRAILING_WHITESPACE)
    find_program(TDPO_NVCC nvcc PATHS ${folders} NO_DEFAULT_PATH)
    if(NOT TDPO_NVCC)
      message(FATAL_ERROR "TDPO_CUDA_FROM_PYPI is set, and nvidia-cuda-nvcc is not in the build environment; "
                          "pip installs it there unless it is told --no-build-isolation")
    endif()
    set(ENV{CUDACXX} "${TDPO_NVCC}")
    # Its libraries lie in lib, and nvcc has the linker look in lib64.
    get_filename_component(TDPO_CUDA_LIBRARIES "${TDPO_NVCC}/../../lib" ABSOLUTE)
    set(ENV{LIBRARY_PATH} "${TDPO_CUDA_LIBRARIES}:$ENV{LIBRARY_PATH}")
  elseif(NOT DEFINED ENV{CUDACXX})
    find_program(TDPO_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
                 PATH_SUFFIXES bin)
    if(TDPO_NVCC)
      set(ENV{CUDACXX} "${TDPO_NVCC}")
    endif()
  endif()
  # The version is checked first, since CMake does not report why a compiler that it tries fails.
  set(version "")
  if(DEFINED ENV{CUDACXX})
    separate_arguments(command UNIX_COMMAND "$ENV{CUDACXX}")
    execute_process(COMMAND ${command} --version OUTPUT_VARIABLE version ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" version "${version}")
    set(version "${CMAKE_MATCH_1}")
  endif()
  if(version AND version VERSION_LESS 11.8)
    set(TDPO_NO_CUDA_BECAUSE "$ENV{CUDACXX} is of CUDA ${version}, and 11.8 is the oldest that will do")
  else()
    include(CheckLanguage)
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER AND DEFINED ENV{CUDACXX})
      set(TDPO_NO_CUDA_BECAUSE
          "$ENV{CUDACXX} could not compile (is it complete, and not too old for the C++ compiler?)")
    elseif(NOT CMAKE_CUDA_COMPILER)
      set(TDPO_NO_CUDA_BECAUSE
          "no CUDA compiler (nvcc) was found when it was built; TDPO_CUDA_FROM_PYPI=1 pip install . brings one")
    endif()
  endif()
endif()

if(TDPO_NO_CUDA_BECAUSE)
  if(TDPO_CUDA STREQUAL "ON")
    message(FATAL_ERROR "TDPO_CUDA=ON, but ${TDPO_NO_CUDA_BECAUSE}")
  endif()
  message(STATUS "tdpo_ext: no CUDA kernels, because ${TDPO_NO_CUDA_BECAUSE}")
  # The reason becomes a string in C++.
  string(REGEX REPLACE "[\\\"]" "'" TDPO_NO_CUDA_BECAUSE "${TDPO_NO_CUDA_BECAUSE}")
  return()
endif()

# Machine code for Ampere and Ada, Hopper and, if the compiler knows them, both families of Blackwell;
# PTX of the newest one for later cards. This must be set before the language is enabled.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known)
  if(known MATCHES "compute_120")
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 120)
  else()
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
  endif()
endif()
enable_language(CUDA)
message(STATUS "tdpo_ext: CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES} with ${CMAKE_CUDA_COMPILER}")

list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
add_library(tdpo_cuda OBJECT csrc/cuda/token_stats_forward.cu csrc/cuda/token_stats_backward.cu
                             csrc/cuda/tdpo_loss.cu csrc/cuda/runtime.cu)
set_target_properties(
  tdpo_cuda
  PROPERTIES POSITION_INDEPENDENT_CODE ON
             CUDA_STANDARD 17
             CUDA_STANDARD_REQUIRED ON
             CUDA_VISIBILITY_PRESET hidden
             CUDA_RUNTIME_LIBRARY Static)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
  # A quarter of the default's size. Drivers older than those of CUDA 13 might not unpack it.
  target_compile_options(tdpo_cuda PRIVATE --compress-mode=size)
endif()
if(TDPO_CUDA_LIBRARIES)
  target_link_directories(tdpo_cuda INTERFACE "${TDPO_CUDA_LIBRARIES}")
endif()
target_compile_definitions(tdpo_cuda PUBLIC TDPO_CUDA)
target_compile_definitions(tdpo_cuda PRIVATE "TDPO_CUDA_ARCHITECTURES=\"${architectures}\"")
