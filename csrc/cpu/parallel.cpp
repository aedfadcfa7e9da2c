// Signals while an op computes, and threads after a fork. Python runs signals' handlers between its
// own steps alone, so that an op of a minute would hold Ctrl-C up for a minute. A fork takes one
// thread along: libgomp then waits for the others of its pool for ever.
#include <Python.h>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <memory>

#include "parallel.h"

namespace fasttax {
namespace {

struct Raised {
  PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
};

// Raises again what a handler raised, which torch would turn into a RuntimeError on its way.
int raise_again(void* argument) {
  const std::unique_ptr<Raised> raised(static_cast<Raised*>(argument));
  PyErr_Restore(raised->type, raised->value, raised->trace);
  return -1;
}

std::atomic<bool> pool_lost{false};

#if defined(__unix__) || defined(__APPLE__)
// Whether the pool was there can't be seen: any op of torch's own may have made it.
void in_child() { pool_lost.store(true); }
const int watching_forks = pthread_atfork(nullptr, nullptr, in_child);
#endif

}  // namespace

bool has_threads() { return !pool_lost.load(std::memory_order_relaxed); }

bool signal_raised() {
  if (!Py_IsInitialized()) return false;
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool raised = PyErr_CheckSignals() != 0;  // in the main thread alone
  if (raised) {
    auto what = std::make_unique<Raised>();
    PyErr_Fetch(&what->type, &what->value, &what->trace);
    if (Py_AddPendingCall(raise_again, what.get()) == 0) {
      what.release();
    } else {  // 32 others wait
      PyErr_Restore(what->type, what->value, what->trace);
      PyErr_Clear();
      PyErr_SetInterrupt();
    }
  }
  PyGILState_Release(state);
  return raised;
}

}  // namespace fasttax
