# A stand-in for the toolkit's package ASC: the language ASC for CMake, with a compiler for the emulation of csrc/emu.
# It keeps what a build can rely on: it is found before project(), takes ASCEND_HOME_PATH from the environment, empties
# the flags for C++, and compiles files named .asc with bisheng.
if(NOT DEFINED ENV{ASCEND_HOME_PATH})
  message(FATAL_ERROR "asc-config.cmake: ASCEND_HOME_PATH is not set")
endif()
if(CMAKE_PROJECT_NAME)
  message(FATAL_ERROR "asc-config.cmake: the stand-in wants find_package(ASC) before project(), as the documentation has it")
endif()
set(CMAKE_CXX_FLAGS_RELEASE "")
list(APPEND CMAKE_MODULE_PATH ${CMAKE_CURRENT_LIST_DIR}/asc_modules)
