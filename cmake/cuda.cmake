# TDPO_CUDA = AUTO | ON | OFF. This version has no CUDA kernels: AUTO and OFF build for the CPU, ON is
# refused rather than ignored.
if(NOT TDPO_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TDPO_CUDA must be AUTO, ON or OFF, got '${TDPO_CUDA}'")
endif()
if(TDPO_CUDA STREQUAL "ON")
  message(FATAL_ERROR "TDPO_CUDA=ON: this version of tdpo_ext has no CUDA kernels yet; "
                      "use AUTO or OFF (CUDA tensors are served by plain PyTorch)")
endif()
