# SPDX-License-Identifier: Apache-2.0
# Finds what the native module is built with; nothing is vendored (see README.md beside this file).
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
