// SPDX-License-Identifier: Apache-2.0
#include "python/strings.h"

#include <cstring>
#include <limits>
#include <string>

namespace py = pybind11;

namespace fullbeam {

py::bytes string_ends(const py::buffer& data, std::int64_t count) {
  const py::buffer_info info = data.request();
  const auto* begin = static_cast<const char*>(info.ptr);
  const auto size = static_cast<std::uint64_t>(info.size * info.itemsize);
  std::string ends;
  std::uint64_t pos = 0;
  for (std::int64_t i = 0; i < count && size - pos >= 8; ++i) {
    std::uint64_t length = 0;
    std::memcpy(&length, begin + pos, 8);
    if (length > size - pos - 8) break;
    pos += 8 + length;
    if (pos > std::numeric_limits<std::uint32_t>::max()) break;
    const auto end = static_cast<std::uint32_t>(pos);
    ends.append(reinterpret_cast<const char*>(&end), sizeof end);
  }
  return py::bytes(ends);
}

py::typing::List<py::str> decode_strings(const py::buffer& data, const py::buffer& ends) {
  const py::buffer_info info = data.request(), end_info = ends.request();
  const auto* begin = static_cast<const char*>(info.ptr);
  const auto* end = static_cast<const std::uint32_t*>(end_info.ptr);
  py::typing::List<py::str> texts;
  std::uint32_t start = 8;
  for (py::ssize_t i = 0; i < end_info.size; ++i) {
    if (end[i] < start || end[i] > info.size * info.itemsize)
      throw py::value_error("decode_strings: ends must ascend within the data");
    PyObject* text = PyUnicode_DecodeUTF8(begin + start, end[i] - start, nullptr);
    if (text == nullptr) {
      if (!PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) throw py::error_already_set();
      PyErr_Clear();
      break;
    }
    texts.append(py::reinterpret_steal<py::str>(text));
    start = end[i] + 8;
  }
  return texts;
}

}  // namespace fullbeam
