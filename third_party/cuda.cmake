# SPDX-License-Identifier: Apache-2.0
# The CUDA compiler, the architectures, and the backend's objects. Included only when there are CUDA sources.
include(CheckLanguage)
# Before enable_language, or the compiler's default wins. sm_80 code and PTX for all; sm_90a for Hopper's own paths.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80 90a-real)
endif()
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  add_library(cuda_kernels OBJECT ${cuda_sources} csrc/cuda/device.cc)
  set_source_files_properties(csrc/cuda/device.cc PROPERTIES LANGUAGE CUDA)
  target_include_directories(cuda_kernels PRIVATE csrc)
  target_compile_features(cuda_kernels PRIVATE cuda_std_20)
  # -fmad=false: products and sums are contracted only where the source says fma, as on the CPU.
  # Constexpr functions of csrc/core serve host and device. A file's two architectures are compiled side by side, so
  # that the longest one doesn't end alone on one core.
  target_compile_options(cuda_kernels PRIVATE -fmad=false --expt-relaxed-constexpr --threads=2 -Xptxas=-v
    -Xcompiler=-fvisibility=hidden,-Wall)
  set(launcher ${CMAKE_SOURCE_DIR}/third_party/keep_ptxas_report.sh ${CMAKE_CUDA_COMPILER_LAUNCHER})
  set_target_properties(cuda_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON
    CUDA_COMPILER_LAUNCHER "${launcher}")
  # The runtime inside the library, the driver found at run time: it imports where there is none.
  target_link_libraries(cuda_kernels PRIVATE CUDA::cudart_static)
  # The library was made before the language was there, and has no default of it.
  set_target_properties(fullbeam PROPERTIES CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
  target_sources(fullbeam PRIVATE $<TARGET_OBJECTS:cuda_kernels>)
  target_link_libraries(fullbeam PRIVATE CUDA::cudart_static)
  target_compile_definitions(fullbeam PUBLIC $<BUILD_INTERFACE:FULLBEAM_WITH_CUDA=1>)
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " cuda_archs)
  set(cuda_state "${CMAKE_CUDA_COMPILER_VERSION} for sm_${cuda_archs}")
elseif(FULLBEAM_CUDA STREQUAL "ON")
  message(FATAL_ERROR "FULLBEAM_CUDA=ON, but no CUDA compiler was found; install one or build with FULLBEAM_CUDA=OFF")
endif()
