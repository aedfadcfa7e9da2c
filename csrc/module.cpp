#include <Python.h>

// An empty module: importing it runs the static initialisers that register the kernels with torch's
// dispatcher.
#if defined(FASTTAX_MODULE_CUDA)
#define FASTTAX_MODULE "_C_cuda"
#define FASTTAX_INIT PyInit__C_cuda
#else
#define FASTTAX_MODULE "_C"
#define FASTTAX_INIT PyInit__C
#endif

extern "C" __attribute__((visibility("default"))) PyObject* FASTTAX_INIT(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT,
                                      FASTTAX_MODULE,
                                      nullptr,
                                      -1,
                                      nullptr,
                                      nullptr,
                                      nullptr,
                                      nullptr,
                                      nullptr};
  PyObject* const made = PyModule_Create(&module);
#if defined(Py_GIL_DISABLED)
  // the module has no state, and what it registers torch guards
  if (made) PyUnstable_Module_SetGIL(made, Py_MOD_GIL_NOT_USED);
#endif
  return made;
}
