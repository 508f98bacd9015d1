// SPDX-License-Identifier: Apache-2.0
// Arrays of strings as GGUF files store them: of each string 8 bytes of length, then its bytes.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <cstdint>

namespace fullbeam {

// Where strings end, uint32 each, from the first one's length on: of `count` strings, or of fewer
// where one does not end within the data.
pybind11::bytes string_ends(const pybind11::buffer& data, std::int64_t count);

// The strings themselves, up to the first one that is not UTF-8.
pybind11::typing::List<pybind11::str> decode_strings(const pybind11::buffer& data,
                                                     const pybind11::buffer& ends);

}  // namespace fullbeam
