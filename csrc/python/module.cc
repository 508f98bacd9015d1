// SPDX-License-Identifier: Apache-2.0
// The native API: one m.def per op, and what the package asks of the build and the machine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include "core/ceiling.h"
#include "core/check.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/packed_weight.h"
#include "core/parallel.h"
#include "core/program.h"
#include "ops/ops.h"
#include "python/strings.h"
#include "python/tensors.h"

namespace py = pybind11;
using namespace fullbeam;

namespace {

using PartTuple = std::tuple<py::object, std::string, std::pair<std::int64_t, std::int64_t>>;

std::vector<WeightPart> parts_of(const std::vector<PartTuple>& parts,
                                 std::vector<py::object>& owners) {
  std::vector<WeightPart> views;
  for (const auto& [data, type, shape] : parts) {
    TensorView view;
    view_of(data, view, owners.emplace_back());
    Check check("pack_weight");
    check.tensor("data", view, {"num_bytes"}, {DType::u8});
    views.push_back({static_cast<const std::uint8_t*>(view.data), check.size("num_bytes"), type,
                     shape.first, shape.second});
  }
  return views;
}

PackedWeight pack_weight(const std::vector<PartTuple>& parts, bool largest_only) {
  std::vector<py::object> owners;
  const std::vector<WeightPart> views = parts_of(parts, owners);
  py::gil_scoped_release release;
  return PackedWeight(views, largest_only);
}

// Holds on to the parts' memory until all is packed.
struct PyPacking {
  std::vector<py::object> owners;
  Packing packing;
  PyPacking(int num_threads, std::int64_t spare_bytes) : packing(num_threads, spare_bytes) {}
};

py::typing::Dict<py::str, py::object> build_info() {
  py::typing::Dict<py::str, py::object> info;
  info["cuda"] = py::str(FULLBEAM_BUILD_CUDA);
  info["compiler"] = py::str(FULLBEAM_BUILD_COMPILER);
  info["cpu_isas"] = py::str(FULLBEAM_BUILD_ISAS).attr("split")();
  return info;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (has_isa(isa)) names.emplace_back(name_of(isa));
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    } catch (const NotImplemented& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    }
  });
  using Release = py::call_guard<py::gil_scoped_release>;
  using Op = py::call_guard<OpCall>;

  py::class_<PackedWeight>(m, "PackedWeight", py::module_local())
      .def_property_readonly(
          "shape", [](const PackedWeight& w) { return py::make_tuple(w.rows(), w.cols()); })
      .def_property_readonly("num_bytes", &PackedWeight::num_bytes)
      .def_property_readonly("low_bytes", &PackedWeight::low_bytes)
      .def_property_readonly("types", [](const PackedWeight& w) {
        std::vector<std::string> types;
        for (const WeightSegment& segment : w.segments()) types.emplace_back(name_of(segment.type));
        return types;
      });
  m.def("pack_weight", &pack_weight, py::arg("parts"), py::arg("largest_only"));
  py::class_<PyPacking>(m, "Packing")
      .def(py::init<int, std::int64_t>(), py::arg("num_threads"), py::arg("spare_bytes"))
      .def(
          "add",
          [](PyPacking& self, const std::vector<PartTuple>& parts, bool release,
             bool largest_only) {
            return self.packing.add(parts_of(parts, self.owners), release, largest_only);
          },
          py::arg("parts"), py::arg("release"), py::arg("largest_only"))
      .def(
          "wait",
          [](PyPacking& self, double seconds) {
            bool is_done = false;
            {
              py::gil_scoped_release release;
              is_done = self.packing.wait(seconds);
            }
            if (is_done) self.owners.clear();
            return is_done;
          },
          py::arg("seconds"))
      .def_property_readonly("packed_bytes",
                             [](const PyPacking& self) { return self.packing.packed_bytes(); });

  m.def("string_ends", &string_ends, py::arg("data"), py::arg("count"));
  m.def("decode_strings", &decode_strings, py::arg("data"), py::arg("ends"));

  m.def("dequantise", &ops::dequantise, Op(), py::arg("data"), py::arg("type"), py::arg("out"));
  m.def("embedding", &ops::embedding, Op(), py::arg("token_ids"), py::arg("table"),
        py::arg("residual").none(true), py::arg("out"), py::arg("scale"));
  m.def("rms_norm", &ops::rms_norm, Op(), py::arg("x"), py::arg("weight"),
        py::arg("residual").none(true), py::arg("out"), py::arg("eps"), py::arg("weight_offset"));
  m.def("layer_norm", &ops::layer_norm, Op(), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("out"), py::arg("eps"));
  m.def("linear", &ops::linear, Op(), py::arg("x"), py::arg("weight"), py::arg("bias").none(true),
        py::arg("residual").none(true), py::arg("out"), py::arg("largest_only"));
  m.def("rope", &ops::rope, Op(), py::arg("x"), py::arg("positions"), py::arg("inv_freq"),
        py::arg("interleaved"), py::arg("scale"));
  m.def("kv_write", &ops::kv_write, Op(), py::arg("k"), py::arg("v"), py::arg("k_pages"),
        py::arg("v_pages"), py::arg("slots"));
  m.def("attention_prefill", &ops::attention_prefill, Op(), py::arg("q"), py::arg("k_pages"),
        py::arg("v_pages"), py::arg("page_table"), py::arg("seq_lens"), py::arg("query_starts"),
        py::arg("out"), py::arg("scale"), py::arg("window"), py::arg("softcap"));
  m.def("attention_decode", &ops::attention_decode, Op(), py::arg("q"), py::arg("k_pages"),
        py::arg("v_pages"), py::arg("page_table"), py::arg("seq_lens"),
        py::arg("query_starts").none(true), py::arg("slot_starts").none(true),
        py::arg("num_slots").none(true), py::arg("visible").none(true),
        py::arg("slot_positions").none(true), py::arg("positions").none(true), py::arg("out"),
        py::arg("scale"), py::arg("window"), py::arg("softcap"));
  m.def("gated_activation", &ops::gated_activation, Op(), py::arg("x"), py::arg("out"),
        py::arg("activation"));
  m.def("activation", &ops::activation, Op(), py::arg("x"), py::arg("out"), py::arg("activation"));
  m.def("softcap", &ops::softcap, Op(), py::arg("x"), py::arg("out"), py::arg("cap"));
  m.def("logprobs", &ops::logprobs, Op(), py::arg("logits"), py::arg("token_ids"),
        py::arg("out_logprobs"), py::arg("out_ranks"), py::arg("out_top_ids"),
        py::arg("out_top_logprobs"));
  m.def("sample", &ops::sample, Op(), py::arg("logits"), py::arg("temperature"), py::arg("top_k"),
        py::arg("top_p"), py::arg("min_p"), py::arg("seeds"), py::arg("counters"),
        py::arg("allowed").none(true), py::arg("allowed_idx").none(true),
        py::arg("bias_starts").none(true), py::arg("bias_ids").none(true),
        py::arg("bias_values").none(true), py::arg("history_starts").none(true),
        py::arg("history_ids").none(true), py::arg("history_counts").none(true),
        py::arg("history_last").none(true), py::arg("repetition_penalty").none(true),
        py::arg("frequency_penalty").none(true), py::arg("presence_penalty").none(true),
        py::arg("num_top").none(true), py::arg("out_token_ids"), py::arg("out_logprobs").none(true),
        py::arg("out_ranks").none(true), py::arg("out_top_ids").none(true),
        py::arg("out_top_logprobs").none(true), py::arg("out_log_sums").none(true));
  m.def("beam_step", &ops::beam_step, Op(), py::arg("logits"), py::arg("beam_rows"),
        py::arg("sums"), py::arg("group_starts"), py::arg("request_starts"), py::arg("beam_sizes"),
        py::arg("diversity_strengths"), py::arg("allowed").none(true),
        py::arg("allowed_idx").none(true), py::arg("terminators").none(true),
        py::arg("terminator_idx").none(true), py::arg("bias_starts").none(true),
        py::arg("bias_ids").none(true), py::arg("bias_values").none(true), py::arg("out_parents"),
        py::arg("out_token_ids"), py::arg("out_logprobs"), py::arg("out_sums"),
        py::arg("out_finished_parents"), py::arg("out_finished_token_ids"),
        py::arg("out_finished_logprobs"), py::arg("out_finished_sums"));

  // Recording: between start_recording and stop_recording this thread's ops are checked and kept
  // instead of run.
  py::class_<Stop>(m, "Stop", py::module_local()).def(py::init<>()).def("set", &Stop::set);
  py::class_<Program>(m, "Program", py::module_local())
      .def(
          "run",
          [](const Program& program, std::optional<const Stop*> stop) {
            return program.run(stop.value_or(nullptr));
          },
          Release(), py::arg("stop") = std::nullopt)
      .def("__len__", &Program::size);
  m.def("start_recording", [] {
    if (Program::recording() != nullptr)
      throw std::runtime_error("start_recording: this thread is recording already");
    Program::recording() = new Program();
  });
  m.def("stop_recording", [] {
    Program* program = Program::recording();
    if (program == nullptr)
      throw std::runtime_error("stop_recording: this thread is not recording");
    Program::recording() = nullptr;
    return std::unique_ptr<Program>(program);
  });

  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("count"));
  m.def("num_physical_cores", &num_physical_cores);
  m.def("cpu_isa", [] { return std::string(name_of(isa())); });
  m.def("set_isa", [](const std::string& name) { set_isa(name.c_str()); }, py::arg("name"));
  m.def("available_isas", &available_isas);
  m.def("num_cuda_devices", &num_cuda_devices);
  m.def("why_no_cuda_device", &why_no_cuda_device);
  m.def("int8_ops_per_second", &int8_ops_per_second, Release());
  m.def("build_info", &build_info);
}
