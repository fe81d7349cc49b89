// fastkl._native: the kernel as a Python module, built for Python 3.10's limited API (see setup.py).
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <utility>
#include <vector>

#include "kl.hpp"

namespace {

using fastkl::Dtype;
using fastkl::Level;
using fastkl::Matrix;

// Python's signal handlers run at least this often.
constexpr std::chrono::milliseconds kSignals{20};

const Level* find_level(const char* name) {
    for (const Level* const* level = fastkl::levels(); *level; ++level)
        if (std::strcmp((*level)->name, name) == 0) return *level;
    PyErr_Format(PyExc_ValueError, "no instruction-set level '%s' on this machine", name);
    return nullptr;
}

// The calling thread, which runs without the GIL.
struct Caller {
    PyThreadState* thread = nullptr;
    std::chrono::steady_clock::time_point asked = std::chrono::steady_clock::now();

    static bool keep_going(void* context) {
        Caller& self = *static_cast<Caller*>(context);
        const auto now = std::chrono::steady_clock::now();
        if (now - self.asked < kSignals) return true;
        self.asked = now;
        PyEval_RestoreThread(self.thread);
        const bool interrupted = PyErr_CheckSignals() != 0;
        self.thread = PyEval_SaveThread();
        return !interrupted;
    }
};

// Reads (address, row stride, dtype).
bool read_matrix(PyObject* item, Matrix* matrix) {
    Py_ssize_t address, row_stride;
    int dtype;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "logits must be a tuple (address, row stride, dtype)");
        return false;
    }
    if (!PyArg_ParseTuple(item, "nni", &address, &row_stride, &dtype)) return false;
    if (dtype < 0 || dtype > 2) {
        PyErr_Format(PyExc_ValueError, "dtype must be 0, 1 or 2, got %d", dtype);
        return false;
    }
    *matrix = {reinterpret_cast<const void*>(address), row_stride, static_cast<Dtype>(dtype)};
    return true;
}

bool read_matrices(PyObject* list, std::vector<Matrix>& matrices) {
    try {
        matrices.resize(PyList_Size(list));
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
        return false;
    }
    for (std::size_t k = 0; k < matrices.size(); ++k) {
        PyObject* item = PyList_GetItem(list, static_cast<Py_ssize_t>(k));
        if (!item || !read_matrix(item, &matrices[k])) return false;
    }
    return true;
}

// Runs work(poll) without the GIL. Returns None, or null with an exception set: a signal handler's, if
// that stopped the work.
template <class Work> PyObject* compute(Work work) {
    Caller caller;
    caller.thread = PyEval_SaveThread();
    bool finished = false;
    std::exception_ptr error;
    try {
        finished = work(fastkl::Poll{Caller::keep_going, &caller});
    } catch (...) {
        error = std::current_exception();
    }
    PyEval_RestoreThread(caller.thread);
    try {
        if (error) std::rethrow_exception(error);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& raised) {
        PyErr_SetString(PyExc_RuntimeError, raised.what());
        return nullptr;
    }
    if (!finished) return nullptr;
    Py_RETURN_NONE;
}

PyObject* levels(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    if (!names) return nullptr;
    for (const Level* const* level = fastkl::levels(); *level; ++level) {
        PyObject* name = PyUnicode_FromString((*level)->name);
        const bool failed = !name || PyList_Append(names, name) != 0;
        Py_XDECREF(name);
        if (failed) {
            Py_DECREF(names);
            return nullptr;
        }
    }
    return names;
}

PyObject* measure(PyObject*, PyObject* args) {
    const char* level_name;
    PyObject *circuits, *reference;
    Py_ssize_t n_rows, n_cols, kl, states;
    int n_threads;
    fastkl::Problem problem;
    if (!PyArg_ParseTuple(args, "sO!Onndnni", &level_name, &PyList_Type, &circuits, &reference,
                          &n_rows, &n_cols, &problem.temperature, &kl, &states, &n_threads) ||
        !read_matrix(reference, &problem.reference)) {
        return nullptr;
    }
    const Level* level = find_level(level_name);
    if (!level) return nullptr;
    std::vector<Matrix> matrices;
    if (!read_matrices(circuits, matrices)) return nullptr;
    problem.circuits = matrices.data();
    problem.n_circuits = static_cast<int64_t>(matrices.size());
    problem.n_rows = n_rows;
    problem.n_cols = n_cols;
    const fastkl::Output output{reinterpret_cast<float*>(kl),
                                reinterpret_cast<fastkl::State*>(states)};
    return compute([&](const fastkl::Poll& poll) {
        return fastkl::run(*level, problem, output, n_threads, poll);
    });
}

PyObject* gradients(PyObject*, PyObject* args) {
    const char* level_name;
    PyObject *circuits, *dqs, *reference, *dp;
    Py_ssize_t n_rows, n_cols, grad, states;
    int n_threads;
    fastkl::GradientProblem problem;
    if (!PyArg_ParseTuple(args, "snnO!OO!Onndi", &level_name, &grad, &states, &PyList_Type,
                          &circuits, &reference, &PyList_Type, &dqs, &dp, &n_rows, &n_cols,
                          &problem.temperature, &n_threads) ||
        !read_matrix(reference, &problem.reference) || !read_matrix(dp, &problem.dp)) {
        return nullptr;
    }
    const Level* level = find_level(level_name);
    if (!level) return nullptr;
    std::vector<Matrix> inputs, outputs;
    if (!read_matrices(circuits, inputs) || !read_matrices(dqs, outputs)) return nullptr;
    if (inputs.size() != outputs.size()) {
        PyErr_SetString(PyExc_ValueError,
                        "the lists of circuits and of their gradients differ in length");
        return nullptr;
    }
    problem.grad = reinterpret_cast<const double*>(grad);
    problem.states = reinterpret_cast<const fastkl::State*>(states);
    problem.circuits = inputs.data();
    problem.dqs = outputs.data();
    problem.n_circuits = static_cast<int64_t>(inputs.size());
    problem.n_rows = n_rows;
    problem.n_cols = n_cols;
    return compute([&](const fastkl::Poll& poll) {
        return fastkl::run(*level, problem, n_threads, poll);
    });
}

PyObject* js(PyObject*, PyObject* args) {
    const char* level_name;
    PyObject *circuit, *reference, *dq, *dp;
    Py_ssize_t n_rows, n_cols, result, grad;
    int n_threads;
    double beta, temperature;
    Matrix p, q;
    fastkl::JsGradients gradients;
    if (!PyArg_ParseTuple(args, "sOOddnnnnOOi", &level_name, &circuit, &reference, &beta,
                          &temperature, &n_rows, &n_cols, &result, &grad, &dq, &dp,
                          &n_threads) ||
        !read_matrix(reference, &p) || !read_matrix(circuit, &q) ||
        !read_matrix(dp, &gradients.sides[0]) || !read_matrix(dq, &gradients.sides[1])) {
        return nullptr;
    }
    const Level* level = find_level(level_name);
    if (!level) return nullptr;
    fastkl::JsProblem problem{{p, q},
                              n_rows,
                              n_cols,
                              fastkl::Mixture(std::min(beta, 1 - beta)),
                              fastkl::inverse_of(temperature)};
    if (beta < 0.5) {
        std::swap(problem.sides[0], problem.sides[1]);
        std::swap(gradients.sides[0], gradients.sides[1]);
    }
    gradients.grad = reinterpret_cast<const double*>(grad);
    return compute([&](const fastkl::Poll& poll) {
        return gradients.grad
                   ? fastkl::run(*level, problem, gradients, n_threads, poll)
                   : fastkl::run(*level, problem, reinterpret_cast<float*>(result), n_threads, poll);
    });
}

PyObject* summarize(PyObject*, PyObject* args) {
    const char* level_name;
    PyObject* sides;
    Py_ssize_t n_rows, n_cols, summaries;
    double temperature;
    int n_threads;
    if (!PyArg_ParseTuple(args, "sO!nndni", &level_name, &PyList_Type, &sides, &n_rows, &n_cols,
                          &temperature, &summaries, &n_threads)) {
        return nullptr;
    }
    const Level* level = find_level(level_name);
    if (!level) return nullptr;
    std::vector<Matrix> matrices;
    if (!read_matrices(sides, matrices)) return nullptr;
    const fastkl::SummaryProblem problem{matrices.data(), static_cast<int64_t>(matrices.size()),
                                         n_rows, n_cols, fastkl::inverse_of(temperature)};
    return compute([&](const fastkl::Poll& poll) {
        return fastkl::run(*level, problem, reinterpret_cast<fastkl::Summary*>(summaries), n_threads,
                           poll);
    });
}

PyObject* exponential(PyObject*, PyObject* args) {
    const char* level_name;
    Py_ssize_t x, y, n;
    if (!PyArg_ParseTuple(args, "snnn", &level_name, &x, &y, &n)) return nullptr;
    const Level* level = find_level(level_name);
    if (!level) return nullptr;
    level->exponential(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), n);
    Py_RETURN_NONE;
}

PyObject* logarithm(PyObject*, PyObject* args) {
    const char* level_name;
    Py_ssize_t x, rest, y, n;
    if (!PyArg_ParseTuple(args, "snnnn", &level_name, &x, &rest, &y, &n)) return nullptr;
    const Level* level = find_level(level_name);
    if (!level) return nullptr;
    level->logarithm(reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(rest),
                     reinterpret_cast<float*>(y), n);
    Py_RETURN_NONE;
}

PyObject* phi_over_square(PyObject*, PyObject* args) {
    const char* level_name;
    Py_ssize_t d, y, n;
    int wide;
    if (!PyArg_ParseTuple(args, "snnnp", &level_name, &d, &y, &n, &wide)) return nullptr;
    const Level* level = find_level(level_name);
    if (!level) return nullptr;
    level->phi_over_square(reinterpret_cast<const float*>(d), reinterpret_cast<float*>(y), n, wide);
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"levels", levels, METH_NOARGS,
     "levels()\n--\n\nNames of the instruction-set levels this machine can run, best first."},
    {"measure", measure, METH_VARARGS,
     "measure(level, circuits, reference, n_rows, n_cols, temperature, kl, states, n_threads)\n--\n\n"
     "Write KL(reference || circuit) of every row, of logits divided by the temperature.\n\n"
     "`circuits` is a list of, and `reference` one, (address, row stride in elements, dtype): 0 for\n"
     "float32, 1 for bfloat16, 2 for float16. `kl` is the address of float32 (K, R) or 0, `states`\n"
     "that of float64 (K, R, 5) or 0: max and sum of p, of q, and the divergence (see kl.hpp)."},
    {"gradients", gradients, METH_VARARGS,
     "gradients(level, grad, states, circuits, reference, dqs, dp, n_rows, n_cols, temperature, "
     "n_threads)\n--\n\n"
     "Write the gradients of the sum of grad * KL.\n\n"
     "`grad` is the address of float64 (K, R), with the inverse of the temperature in it; `states` that\n"
     "of what measure() wrote for logits divided by the temperature. The others are as for it, and an\n"
     "address of 0 in `dqs` or `dp` leaves that gradient out."},
    {"js", js, METH_VARARGS,
     "js(level, circuit, reference, beta, temperature, n_rows, n_cols, js, grad, dq, dp, "
     "n_threads)\n--\n\n"
     "Write the Jensen-Shannon divergence of every row to `js`, the address of float32 (R,), or, where\n"
     "`grad` is not 0, the gradients of the sum of grad * JS to `dq` and `dp`.\n\n"
     "Matrices are as for gradients(), and `grad` is the address of float64 (R,)."},
    {"summarize", summarize, METH_VARARGS,
     "summarize(level, sides, n_rows, n_cols, temperature, summaries, n_threads)\n--\n\n"
     "Sum every row up by itself, with x = (logit - the row's largest) / temperature.\n\n"
     "`sides` is a list of matrices as for measure(), and `summaries` the address of 4 numbers a row and\n"
     "side: the largest logit, the sum of e^x, of the first side the sum of x e^x, float64 each, and where\n"
     "the largest logit is, an int64."},
    {"exponential", exponential, METH_VARARGS,
     "exponential(level, x, y, n)\n--\n\n"
     "Set y = e^x, for tests: addresses of n float32 each, n a multiple of 16."},
    {"logarithm", logarithm, METH_VARARGS,
     "logarithm(level, x, rest, y, n)\n--\n\n"
     "Set y = log x where rest is x - 1, for tests: see exponential()."},
    {"phi_over_square", phi_over_square, METH_VARARGS,
     "phi_over_square(level, d, y, n, wide)\n--\n\n"
     "Set y = (e^-d - 1 + d) / d^2, for |d| < 3 where wide and for |d| < 0.5 elsewhere, for tests: see\n"
     "exponential()."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "fastkl._native", "Divergences on the CPU, by vector instructions.",
    0, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
    PyObject* self = PyModule_Create(&module);
#ifdef Py_GIL_DISABLED
    // Calls share no state. Without this, importing would give a free-threaded Python its GIL back.
    if (self) PyUnstable_Module_SetGIL(self, Py_MOD_GIL_NOT_USED);
#endif
    return self;
}
