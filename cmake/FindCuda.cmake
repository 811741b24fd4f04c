# Sets QUEST_WITH_CUDA and cutlass_include, CUTLASS's headers; enables the CUDA language for some architectures.
#
# The compiler and torch decide. A test for a GPU would leave CUDA out on builders without one. A torch without CUDA
# loads no CUDA library, so only ON builds one with it: for another machine.
set(QUEST_WITH_CUDA OFF)
# The cache entry stays empty where the environment decides: a later configuration may then have another environment.
if(NOT QUEST_CUDA STREQUAL "")
  set(choice "${QUEST_CUDA}")
elseif(NOT "$ENV{QUEST_CUDA}" STREQUAL "")
  set(choice "$ENV{QUEST_CUDA}")
else()
  set(choice AUTO)
endif()
if(NOT choice MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "QUEST_CUDA must be AUTO, ON or OFF, got ${choice}")
endif()
if(choice STREQUAL "OFF")
  message(STATUS "QUEST_CUDA=OFF: the CUDA library is left out")
  return()
endif()
if(choice STREQUAL "AUTO" AND NOT QUEST_TORCH_HAS_CUDA)
  message(STATUS "torch ${QUEST_TORCH_HEADERS} is not built for CUDA: the CUDA library is left out")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(choice STREQUAL "ON")
    message(FATAL_ERROR "QUEST_CUDA=ON needs nvcc, and none works here: install the CUDA toolkit and put nvcc on PATH "
                        "(or set CUDACXX), or build without it by QUEST_CUDA=OFF.")
  endif()
  message(STATUS "no nvcc that works: the CUDA library is left out")
  return()
endif()

# -D CMAKE_CUDA_ARCHITECTURES or CMake's environment variable CUDAARCHS chooses. A release has machine code for all, and
# PTX of the last for newer GPUs.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90a-real 100-real 120)
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "quest_ops needs nvcc 12.4 or newer, found ${CMAKE_CUDA_COMPILER_VERSION}: update the CUDA "
                      "toolkit, or build without it by QUEST_CUDA=OFF.")
endif()

quest_find_package(cutlass_library cutlass_folder)
set(cutlass_include "${cutlass_folder}/source/include")
if(NOT EXISTS "${cutlass_include}/cute/tensor.hpp")
  message(FATAL_ERROR "The CUDA library needs CUTLASS's headers, and ${Python_EXECUTABLE} has none: run "
                      "`pip install nvidia-cutlass`, or build without it by QUEST_CUDA=OFF.")
endif()

set(QUEST_WITH_CUDA ON)
message(STATUS "nvcc ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}, ${cutlass_include}")
