# Targets torch::cpu and torch::all: headers and libraries of the torch that the building Python sees. Sets
# QUEST_TORCH_HEADERS, its version, and QUEST_TORCH_HAS_CUDA.
#
# find_package(Torch) would run a CUDA discovery of its own on a CUDA torch and ignore CMAKE_CUDA_ARCHITECTURES. Nothing
# is cached, as an isolated build has its torch in another folder each time.

# The oldest torch that the libraries load with. Newer headers hide everything that came after it.
set(QUEST_TORCH_TARGET 2.10)
set(QUEST_TORCH_TARGET_HEX 0x020a000000000000)

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)

# The folder of a Python package, found without importing it.
function(quest_find_package name result)
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('${name}'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE folder
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  file(TO_CMAKE_PATH "${folder}" folder)
  set(${result} "${folder}" PARENT_SCOPE)
endfunction()

quest_find_package(torch torch_folder)
if(NOT torch_folder)
  message(FATAL_ERROR "quest_ops needs torch ${QUEST_TORCH_TARGET} or newer to build, and ${Python_EXECUTABLE} has none: "
                      "run `pip install torch`.")
endif()

set(version_header "${torch_folder}/include/torch/headeronly/version.h")
if(EXISTS "${version_header}")
  file(STRINGS "${version_header}" lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
  string(REGEX REPLACE "[^0-9;]" "" lines "${lines}")
  list(JOIN lines "." QUEST_TORCH_HEADERS)
else()
  set(QUEST_TORCH_HEADERS "an older one")  # the header came with 2.10
endif()
if(QUEST_TORCH_HEADERS VERSION_LESS QUEST_TORCH_TARGET)
  message(FATAL_ERROR "quest_ops needs torch ${QUEST_TORCH_TARGET} or newer to build, found ${QUEST_TORCH_HEADERS} in "
                      "${torch_folder}: run `pip install 'torch>=${QUEST_TORCH_TARGET}'`.")
endif()

# Whether this torch is built for CUDA.
set(QUEST_TORCH_HAS_CUDA OFF)
if(EXISTS "${torch_folder}/lib/libtorch_cuda.so")
  set(QUEST_TORCH_HAS_CUDA ON)
endif()

function(quest_torch_target target library)
  find_library(path ${library} PATHS "${torch_folder}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
  add_library(${target} SHARED IMPORTED)
  set_target_properties(
    ${target} PROPERTIES IMPORTED_LOCATION "${path}" INTERFACE_INCLUDE_DIRECTORIES "${torch_folder}/include")
  target_compile_definitions(${target} INTERFACE TORCH_TARGET_VERSION=${QUEST_TORCH_TARGET_HEX})
endfunction()
quest_torch_target(torch::cpu torch_cpu)
quest_torch_target(torch::all torch)

message(STATUS "torch ${QUEST_TORCH_HEADERS} in ${torch_folder}, target ${QUEST_TORCH_TARGET}")
