// The Python module txl_kernels._C: the build record of a loaded operator library. It includes no
// torch header and no header of the kernels, so that one file serves a Python with every torch.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>

namespace py = pybind11;

namespace {

py::object build_info(const std::string& library) {
  // A library is never loaded here: that would register its operators.
  const std::unique_ptr<void, int (*)(void*)> handle(
      dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD), &dlclose);
  if (handle == nullptr) {
    PyErr_Format(PyExc_ValueError, "build_info: library must be loaded, got %s", library.c_str());
    throw py::error_already_set();
  }
  const void* record = dlsym(handle.get(), "txl_build_record");
  if (record == nullptr) {
    PyErr_Format(PyExc_ValueError, "build_info: library must have the symbol txl_build_record: %s",
                 dlerror());
    throw py::error_already_set();
  }
  return py::module_::import("json").attr("loads")(static_cast<const char*>(record));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The build record compiled into a native library of txl_kernels.";
  m.def("build_info", &build_info, py::arg("library"),
        "The record compiled into the operator library at this path, as a dict: what it was built "
        "for and with. The library must be loaded.");
}
