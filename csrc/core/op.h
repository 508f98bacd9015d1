// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "core/api.h"
#include "core/dtype.h"
#include "core/isa.h"

// The CPU backend has every op once per instruction set, in a namespace of that name;
// FULLBEAM_DECLARE_OP declares them all, the CUDA one, and `run`, which calls the
// right one, or records the call: for structs that need no checks.
#if defined(__x86_64__)
#define FULLBEAM_DECLARE_OP(op, Params)         \
  FULLBEAM_API void run(const Params&, Device); \
  namespace cpu {                               \
  namespace portable {                          \
  void op(const Params&);                       \
  }                                             \
  namespace avx2 {                              \
  void op(const Params&);                       \
  }                                             \
  namespace avx512 {                            \
  void op(const Params&);                       \
  }                                             \
  }                                             \
  namespace cuda {                              \
  void op(const Params&);                       \
  }
#define FULLBEAM_CPU(op)                   \
  (isa() == Isa::avx512 ? &cpu::avx512::op \
   : isa() == Isa::avx2 ? &cpu::avx2::op   \
                        : &cpu::portable::op)
#else
#define FULLBEAM_DECLARE_OP(op, Params)         \
  FULLBEAM_API void run(const Params&, Device); \
  namespace cpu {                               \
  namespace portable {                          \
  void op(const Params&);                       \
  }                                             \
  }                                             \
  namespace cuda {                              \
  void op(const Params&);                       \
  }
#define FULLBEAM_CPU(op) (&cpu::portable::op)
#endif
