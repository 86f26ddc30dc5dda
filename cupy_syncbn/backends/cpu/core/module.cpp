// The extension module: the operations of backends/interface.py on NumPy arrays, one call a pass.
//
// Everything about an argument is checked before a pass sees its memory: a wrong call is an error. What depends on a channel
// only is computed here, in float64. The global lock is released while a pass runs; it uses no threads, as ranks are the
// parallelism.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>
#include <cmath>
#include <exception>
#include <initializer_list>
#include <string>
#include "walk.hpp"

namespace core {

#define DECLARE(level)                                                                                          \
    extern const Passes passes_##level##_float16, passes_##level##_bfloat16, passes_##level##_float32,          \
        passes_##level##_float64;
DECLARE(baseline)
#if defined(__x86_64__) && !defined(CORE_ONE_LEVEL)
DECLARE(v3)
DECLARE(v4)
#endif

namespace {

enum Type { FLOAT16, BFLOAT16, FLOAT32, FLOAT64, INT64, OTHER };
const char* const TYPE_NAMES[] = {"float16", "bfloat16", "float32", "float64", "int64", "another type"};

struct Level {
    const char* name;
    bool is_supported;
    const Passes* passes[4];
};
#define LEVEL(level, is_supported)                                                                              \
    {                                                                                                           \
        #level, is_supported,                                                                                   \
        {                                                                                                       \
            &passes_##level##_float16, &passes_##level##_bfloat16, &passes_##level##_float32,                   \
                &passes_##level##_float64                                                                       \
        }                                                                                                       \
    }
const Level LEVELS[] = {
    LEVEL(baseline, true),
#if defined(__x86_64__) && !defined(CORE_ONE_LEVEL)
    // Of each level's instructions, those that came last.
    LEVEL(v3, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")),
    LEVEL(v4, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")),
#endif
};
const Level* level = LEVELS;

// Bytes of an output from which on it is written past the caches. Half of a last cache of 32 MiB: with it, the input stays
// there for the next pass. Steps on 12 MiB took 0.71 to 0.78 of the time that they take when streamed.
constexpr i64 STREAMED = 16 << 20;

// --- References and errors ----------------------------------------------------------------------------------------------------

struct Failure {};  // thrown where a Python exception is set

class Reference {
public:
    explicit Reference(PyObject* owned) : object_(owned)
    {
        if (!owned) throw Failure{};
    }
    ~Reference() { Py_XDECREF(object_); }
    Reference(const Reference&) = delete;
    Reference& operator=(const Reference&) = delete;
    Reference(Reference&& other) : object_(other.release()) {}
    PyObject* get() const { return object_; }
    PyObject* release()
    {
        PyObject* object = object_;
        object_ = nullptr;
        return object;
    }

private:
    PyObject* object_;
};

[[noreturn]] void fail(PyObject* kind, const std::string& message)
{
    PyErr_SetString(kind, message.c_str());
    throw Failure{};
}

Reference none() { return Reference(Py_NewRef(Py_None)); }

// --- Arguments ------------------------------------------------------------------------------------------------------------------

int bfloat16_number = -1;  // of the type that ml_dtypes has registered

Type type_of(PyArrayObject* array)
{
    const int number = PyArray_TYPE(array);
    switch (number) {
    case NPY_HALF: return FLOAT16;
    case NPY_FLOAT: return FLOAT32;
    case NPY_DOUBLE: return FLOAT64;
    }
    if (number == NPY_LONG && PyArray_ITEMSIZE(array) == 8) return INT64;
    if (number == NPY_LONGLONG) return INT64;
    if (number < NPY_USERDEF || PyArray_ITEMSIZE(array) != 2) return OTHER;
    if (bfloat16_number < 0) {
        Reference name(PyObject_GetAttrString(reinterpret_cast<PyObject*>(PyArray_DESCR(array)), "name"));
        if (PyUnicode_CompareWithASCIIString(name.get(), "bfloat16") == 0) bfloat16_number = number;
    }
    return number == bfloat16_number ? BFLOAT16 : OTHER;
}

// An array of a call, and what it is called in errors.
struct Array {
    const char* name;
    PyArrayObject* array;  // null: not there
    Type type = OTHER;

    Array(const char* name, PyObject* object, bool is_optional = false) : name(name), array(nullptr)
    {
        if (is_optional && object == Py_None) return;
        if (!PyArray_Check(object)) fail(PyExc_TypeError, std::string(name) + ": expected a NumPy array");
        array = reinterpret_cast<PyArrayObject*>(object);
        type = type_of(array);
    }
    explicit operator bool() const { return array; }
    i64 size() const { return PyArray_SIZE(array); }
    i64 bytes() const { return size() * PyArray_ITEMSIZE(array); }
    char* data() const { return array ? PyArray_BYTES(array) : nullptr; }

    [[noreturn]] void wrong(PyObject* kind, const std::string& text) const { fail(kind, std::string(name) + ": " + text); }
    void check_types(std::initializer_list<Type> types) const
    {
        for (Type each : types)
            if (type == each) return;
        wrong(PyExc_TypeError, std::string("expected another type (got ") + TYPE_NAMES[type] + ")");
    }
    void check_memory() const
    {
        if (!PyArray_ISCARRAY_RO(array)) wrong(PyExc_ValueError, "expected contiguous, aligned values in this machine's byte order");
    }
    void check_writeable() const
    {
        if (!PyArray_ISWRITEABLE(array)) wrong(PyExc_ValueError, "expected writeable memory");
    }
    void check_length(i64 length) const
    {
        if (PyArray_NDIM(array) != 1 || PyArray_DIM(array, 0) != length)
            wrong(PyExc_ValueError, "expected shape (" + std::to_string(length) + ",)");
    }
    // A vector of float64 of at least that length.
    const double* vector(i64 length) const
    {
        check_types({FLOAT64});
        check_memory();
        if (PyArray_NDIM(array) != 1 || PyArray_DIM(array, 0) < length)
            wrong(PyExc_ValueError, "expected at least " + std::to_string(length) + " values");
        return reinterpret_cast<const double*>(data());
    }
};

// A tensor (N, C, S).
struct Tensor : Array {
    Shape shape;

    Tensor(const char* name, PyObject* object, bool is_optional = false) : Array(name, object, is_optional), shape{0, 0, 0}
    {
        if (!array) return;
        if (PyArray_NDIM(array) != 3) wrong(PyExc_ValueError, "expected 3 axes");
        check_types({FLOAT16, BFLOAT16, FLOAT32, FLOAT64});
        check_memory();
        shape = {PyArray_DIM(array, 0), PyArray_DIM(array, 1), PyArray_DIM(array, 2)};
    }
    Tensor(const char* name, PyObject* object, const Tensor& like, bool is_optional = false) : Tensor(name, object, is_optional)
    {
        if (!array) return;
        if (shape.N != like.shape.N || shape.C != like.shape.C || shape.S != like.shape.S || type != like.type)
            wrong(PyExc_ValueError, std::string("expected the shape and type of ") + like.name);
    }
    // To be written to, where none of the others is; `input` may be the same array.
    void check_output(std::initializer_list<const Tensor*> others, const Tensor* input = nullptr) const
    {
        check_writeable();
        for (const Tensor* other : others) {
            if (!other->array || (other == input && other->data() == data())) continue;
            if (data() < other->data() + other->bytes() && other->data() < data() + bytes())
                wrong(PyExc_ValueError, std::string("expected memory apart from that of ") + other->name);
        }
    }
    // Whether to write past the caches: not over an input, whose lines they hold already.
    bool streams(const Tensor& input) const { return bytes() >= STREAMED && data() != input.data(); }
};

double number(PyObject* object, const char* name)
{
    const double value = PyFloat_AsDouble(object);
    if (value == -1 && PyErr_Occurred()) fail(PyExc_TypeError, std::string(name) + ": expected a number");
    return value;
}

bool flag(PyObject* object, const char* name)
{
    if (!PyBool_Check(object)) fail(PyExc_TypeError, std::string(name) + ": expected a bool");
    return object == Py_True;
}

// Element i of a tuple of that many.
PyObject* item(PyObject* tuple, Py_ssize_t i, Py_ssize_t length, const char* name)
{
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != length)
        fail(PyExc_TypeError, std::string(name) + ": expected a tuple of " + std::to_string(length));
    return PyTuple_GetItem(tuple, i);
}

// --- Values per channel -----------------------------------------------------------------------------------------------------------

// Float64 values that live as long as a call.
class Values {
public:
    explicit Values(i64 size) : values_(new (std::nothrow) double[size + 1])
    {
        if (!values_) {
            PyErr_NoMemory();
            throw Failure{};
        }
    }
    operator double*() const { return values_.get(); }

private:
    std::unique_ptr<double[]> values_;
};

Reference as_kernel_input(PyObject* const* arguments);

bool is_plain(const Array& values) { return PyArray_ISALIGNED(values.array) && PyArray_ISNOTSWAPPED(values.array); }

// Check the (C,) array of a parameter or a running statistic; its strides are its own.
void check_values(const Array& values, i64 C)
{
    values.check_types({FLOAT16, BFLOAT16, FLOAT32, FLOAT64});
    values.check_length(C);
}

void read(const Array& from, i64 C, double* to)
{
    check_values(from, C);
    if (!is_plain(from)) {
        PyObject* object = reinterpret_cast<PyObject*>(from.array);
        Reference plain = as_kernel_input(&object);
        return read(Array(from.name, plain.get()), C, to);
    }
    const char* at = from.data();
    const i64 step = C ? PyArray_STRIDE(from.array, 0) : 0;
    switch (from.type) {
    case FLOAT16:
        for (i64 c = 0; c < C; ++c, at += step) to[c] = value_of(*reinterpret_cast<const float16*>(at));
        return;
    case BFLOAT16:
        for (i64 c = 0; c < C; ++c, at += step) to[c] = value_of(*reinterpret_cast<const bfloat16*>(at));
        return;
    case FLOAT32:
        for (i64 c = 0; c < C; ++c, at += step) to[c] = *reinterpret_cast<const float*>(at);
        return;
    default:
        for (i64 c = 0; c < C; ++c, at += step) to[c] = *reinterpret_cast<const double*>(at);
    }
}

// Write to an array that check_values and is_plain found right.
void write(const Array& to, i64 C, const double* from)
{
    char* at = to.data();
    const i64 step = C ? PyArray_STRIDE(to.array, 0) : 0;
    switch (to.type) {
    case FLOAT16:
        for (i64 c = 0; c < C; ++c, at += step)
            store(reinterpret_cast<float16*>(at), all_lanes<Floats>(static_cast<float>(from[c])), First{1});
        return;
    case BFLOAT16:
        for (i64 c = 0; c < C; ++c, at += step)
            store(reinterpret_cast<bfloat16*>(at), all_lanes<Floats>(static_cast<float>(from[c])), First{1});
        return;
    case FLOAT32:
        for (i64 c = 0; c < C; ++c, at += step) *reinterpret_cast<float*>(at) = static_cast<float>(from[c]);
        return;
    default:
        for (i64 c = 0; c < C; ++c, at += step) *reinterpret_cast<double*>(at) = from[c];
    }
}

Reference new_vector(i64 length, double** values)
{
    npy_intp shape[] = {length};
    Reference array(PyArray_SimpleNew(1, shape, NPY_DOUBLE));
    *values = static_cast<double*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(array.get())));
    return array;
}

// A vector with room for a trailer, which is written; `values` are before it.
Reference new_vector_with(PyObject* trailer, i64 length, double** values)
{
    if (!PyTuple_Check(trailer)) fail(PyExc_TypeError, "trailer: expected a tuple");
    const Py_ssize_t more = PyTuple_Size(trailer);
    Reference array = new_vector(length + more, values);
    for (Py_ssize_t i = 0; i < more; ++i) (*values)[length + i] = number(PyTuple_GetItem(trailer, i), "trailer");
    return array;
}

void run(void (*pass)(const Task&), const Task& task)
{
    if (!task.shape.size()) return;
    Py_BEGIN_ALLOW_THREADS
    pass(task);
    Py_END_ALLOW_THREADS
}

const Passes& passes_of(Type type) { return *level->passes[type]; }

// --- The record of a forward ---------------------------------------------------------------------------------------------------------

// (saved, mask, has_residual, slope, in_place): float64 [mean (C) | invstd (C) | scale (C) | offset (C) | count]; bits or None;
// a bool; a number or None; a bool. Scale and offset are rounded to the accumulator's type. In place, mean and invstd are those
// of z, see formulas.h.
constexpr Py_ssize_t RECORD = 5;

struct Saved {
    double *mean, *invstd, *scale, *offset, *count;
    Saved(double* values, i64 C) : mean(values), invstd(values + C), scale(values + 2 * C), offset(values + 3 * C), count(values + 4 * C) {}
};

// Set the slope and the activation of a task.
void set_activation(Task& task, PyObject* slope)
{
    task.activation = IDENTITY;
    if (slope == Py_None) return;
    task.slope = number(slope, "slope");
    task.activation = task.slope == 0 ? RELU : LEAKY_RELU;
}

// The task of a backward's pass, by its record.
struct Backward {
    Tensor x, dy;
    Array saved, mask;
    bool has_residual;
    Task task{};
    const double *invstd, *count;

    Backward(PyObject* dy_, PyObject* x_, PyObject* record)
        : x("x", x_), dy("dy", dy_, x), saved("saved", item(record, 0, RECORD, "normalization")),
          mask("mask", item(record, 1, RECORD, "normalization"), true), has_residual(flag(item(record, 2, RECORD, "normalization"), "has_residual"))
    {
        const i64 C = x.shape.C;
        const Saved values(const_cast<double*>(saved.vector(4 * C + 1)), C);
        invstd = values.invstd;
        count = values.count;
        task.shape = x.shape;
        task.x = x.data();
        task.dy = dy.data();
        task.mean = values.mean;
        task.scale = values.scale;
        task.offset = values.offset;
        set_activation(task, item(record, 3, RECORD, "normalization"));
        if (mask) {
            if (PyArray_TYPE(mask.array) != NPY_UINT8 || mask.size() != Walk(x.shape).mask_bytes())
                mask.wrong(PyExc_ValueError, "expected that of the forward");
            mask.check_memory();
            task.mask = reinterpret_cast<uint8_t*>(mask.data());
        }
        if (has_residual && task.activation != IDENTITY && !mask) mask.wrong(PyExc_ValueError, "expected one");
        if (!flag(item(record, 4, RECORD, "normalization"), "in_place")) return;
        if (has_residual || task.activation == RELU) saved.wrong(PyExc_ValueError, "expected neither residual nor ReLU in place");
        if (task.activation == LEAKY_RELU) task.activation = INVERTED_LEAKY_RELU;
    }
    bool is_double() const { return x.type == FLOAT64; }
    // Whether dresidual is the gradient behind the activation, exactly: of leaky ReLU, 16 bits round the product with the slope.
    bool is_kept() const { return has_residual && (task.activation != LEAKY_RELU || PyArray_ITEMSIZE(x.array) > 2); }
    // The mean as the passes take it.
    double shift(i64 c) const { return is_double() ? task.mean[c] : static_cast<double>(static_cast<float>(task.mean[c])); }
};

// --- The operations -----------------------------------------------------------------------------------------------------------------

using Arguments = PyObject* const*;

// statistics(x, trailer) -> vector, local
Reference statistics(Arguments arguments)
{
    const Tensor x("x", arguments[0]);
    const i64 C = x.shape.C;
    const double n = static_cast<double>(x.shape.N * x.shape.S);
    double *vector, *local;
    Reference result = new_vector_with(arguments[1], 4 * C + 1, &vector);
    Reference sums = new_vector(3 * C + 1, &local);  // shift, sum, square, n
    std::fill(local, local + 3 * C, 0.0);
    local[3 * C] = n;
    Task task{};
    task.shape = x.shape;
    task.x = x.data();
    task.shift = local;
    task.sum = local + C;
    task.product = local + 2 * C;
    run(passes_of(x.type).statistics, task);
    for (i64 c = 0; c < C; ++c) write_sums(vector, c, C, n, task.shift[c], task.sum[c], task.product[c]);
    vector[4 * C] = n;
    return Reference(PyTuple_Pack(2, result.get(), sums.get()));
}

// centered_squares(local, vector, trailer, mailbox) -> vector
Reference centered_squares(Arguments arguments)
{
    const Array local("local", arguments[0]), sums("vector", arguments[1]);
    const i64 C = (local.size() - 1) / 3;
    local.check_length(3 * C + 1);
    const double *of_rank = local.vector(3 * C + 1), *vector = sums.vector(4 * C + 1);
    double* squares;
    Reference result = new_vector_with(arguments[2], C, &squares);
    for (i64 c = 0; c < C; ++c)
        squares[c] = centered_square(moments_of(sums_of(vector, c, C)).mean, of_rank[3 * C], of_rank[c], of_rank[C + c], of_rank[2 * C + c]);
    return result;
}

PyObject *partial = nullptr, *update = nullptr;  // functools.partial, and `update` of this module

void check_counter(const Array& tracked)
{
    tracked.check_types({INT64});
    tracked.check_memory();
    tracked.check_writeable();
    if (tracked.size() != 1) tracked.wrong(PyExc_ValueError, "expected one value");
}

// update(running_mean, running_var, num_batches_tracked or None, values): write the running statistics
Reference write_running(Arguments arguments)
{
    const Array mean("running_mean", arguments[0]), var("running_var", arguments[1]), tracked("num_batches_tracked", arguments[2], true);
    const Array values("values", arguments[3]);
    const i64 C = mean.size();
    double* from = const_cast<double*>(values.vector(2 * C));
    if (tracked) check_counter(tracked);
    for (const Array* buffer : {&mean, &var}) {
        check_values(*buffer, C);
        buffer->check_writeable();
    }
    if (tracked) ++*reinterpret_cast<i64*>(tracked.data());
    for (const Array* buffer : {&mean, &var}) {
        if (is_plain(*buffer)) {
            write(*buffer, C, from);
        } else {
            npy_intp shape[] = {C};
            Reference part(PyArray_SimpleNewFromData(1, shape, NPY_DOUBLE, from));
            if (PyArray_CopyInto(buffer->array, reinterpret_cast<PyArrayObject*>(part.get())) < 0) throw Failure{};
        }
        from += C;
    }
    return none();
}

// Return the list of what is to be called to update the running statistics: nothing in it allocates.
Reference updates(PyObject* running, const Saved& saved, i64 C, const double* var)
{
    const Array mean("running_mean", item(running, 0, 4, "running")), variance("running_var", item(running, 1, 4, "running"));
    const Array tracked("num_batches_tracked", item(running, 2, 4, "running"), true);
    double momentum = 0, *values;
    if (tracked) {
        check_counter(tracked);
        momentum = 1 / (static_cast<double>(*reinterpret_cast<const i64*>(tracked.data())) + 1);
    }
    PyObject* given = item(running, 3, 4, "running");
    if (given != Py_None)
        momentum = number(given, "momentum");
    else if (!tracked)
        tracked.wrong(PyExc_ValueError, "expected one where momentum is None");
    Reference array = new_vector(2 * C, &values);
    for (const Array* buffer : {&mean, &variance}) {
        double* now = values + (buffer == &mean ? 0 : C);
        buffer->check_writeable();
        read(*buffer, C, now);
        for (i64 c = 0; c < C; ++c)
            now[c] = updated(now[c], buffer == &mean ? saved.mean[c] : unbiased(var[c], *saved.count), momentum);
    }
    Reference call(PyObject_CallFunctionObjArgs(partial, update, item(running, 0, 4, "running"), item(running, 1, 4, "running"),
                                                item(running, 2, 4, "running"), array.get(), nullptr));
    Reference list(PyList_New(1));
    if (PyList_SetItem(list.get(), 0, call.release()) < 0) throw Failure{};
    return list;
}

// normalize(x, y, batch, running, affine, epilogue) -> record, updates
Reference normalize(Arguments arguments)
{
    PyObject *batch = arguments[2], *running = arguments[3], *affine = arguments[4], *epilogue = arguments[5];
    const Tensor x("x", arguments[0]), y("y", arguments[1], x), residual("residual", item(epilogue, 0, 3, "epilogue"), x, true);
    const bool in_place = flag(item(epilogue, 2, 3, "epilogue"), "in_place");
    const Array weight("weight", item(affine, 0, 3, "affine"), true), bias("bias", item(affine, 1, 3, "affine"), true);
    const double eps = number(item(affine, 2, 3, "affine"), "eps");
    y.check_output({&x, &residual}, &x);
    const i64 C = x.shape.C;
    Values var(3 * C);
    double *weights = var + C, *biases = var + 2 * C, *values;
    std::fill(weights, weights + C, 1.0);
    std::fill(biases, biases + C, 0.0);
    if (weight) read(weight, C, weights);
    if (bias) read(bias, C, biases);
    if (in_place)
        for (i64 c = 0; c < C; ++c) weights[c] = invertible(weights[c]);
    Reference array = new_vector(4 * C + 1, &values);
    const Saved saved(values, C);
    *saved.count = 0;
    if (batch != Py_None) {
        const double* vector = Array("vector", item(batch, 0, 4, "batch")).vector(4 * C + 1);
        const Array second("squares", item(batch, 1, 4, "batch"), true);
        const double* squares = second ? second.vector(C) : nullptr;
        *saved.count = vector[4 * C];
        for (i64 c = 0; c < C; ++c) {
            const ChannelMoments moments = moments_of(sums_of(vector, c, C));
            saved.mean[c] = moments.mean;
            var[c] = variance_of(squares ? squares[c] : moments.m2, moments.count);
        }
    } else {
        read(Array("running_mean", item(running, 0, 4, "running")), C, saved.mean);
        read(Array("running_var", item(running, 1, 4, "running")), C, var);
    }
    for (i64 c = 0; c < C; ++c) {
        const auto set = [&](auto step) {
            saved.invstd[c] = step.invstd;
            saved.scale[c] = step.scale;
            saved.offset[c] = step.offset;
        };
        if (x.type == FLOAT64)
            set(step_of<double>(saved.mean[c], var[c], eps, weights[c], biases[c]));
        else
            set(step_of<float>(saved.mean[c], var[c], eps, weights[c], biases[c]));
    }
    Reference list = batch != Py_None && running != Py_None && *saved.count > 0 ? updates(running, saved, C, var) : Reference(PyList_New(0));

    Task task{};
    task.shape = x.shape;
    task.x = x.data();
    task.residual = residual.data();
    task.out = y.data();
    task.mean = saved.mean;
    task.scale = saved.scale;
    task.offset = saved.offset;
    task.streams = y.streams(x);
    set_activation(task, item(epilogue, 1, 3, "epilogue"));
    npy_intp bytes[] = {Walk(x.shape).mask_bytes()};
    const bool has_mask = residual && task.activation != IDENTITY;
    Reference mask = has_mask ? Reference(PyArray_SimpleNew(1, bytes, NPY_UINT8)) : none();
    if (has_mask) {
        task.mask = static_cast<uint8_t*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(mask.get())));
    }
    run(passes_of(x.type).normalize, task);
    if (in_place)
        for (i64 c = 0; c < C; ++c) {
            saved.mean[c] = biases[c];
            saved.invstd[c] = 1 / weights[c];
        }
    Reference record(PyTuple_Pack(RECORD, array.get(), mask.get(), residual ? Py_True : Py_False, item(epilogue, 1, 3, "epilogue"),
                                  in_place ? Py_True : Py_False));
    return Reference(PyTuple_Pack(2, record.get(), list.get()));
}

// reduce_gradients(dy, x, record, dresidual, trailer) -> vector, its copy, the gradient for input_gradient
Reference reduce_gradients(Arguments arguments)
{
    Backward backward(arguments[0], arguments[1], arguments[2]);
    const Tensor dresidual("dresidual", arguments[3], backward.x, true);
    if (bool(dresidual) != backward.has_residual) dresidual.wrong(PyExc_ValueError, "expected one if the forward had a residual, else None");
    if (dresidual) dresidual.check_output({&backward.x, &backward.dy});
    const i64 C = backward.x.shape.C;
    double *vector, *copy;
    Reference result = new_vector_with(arguments[4], 2 * C, &vector), local = new_vector(2 * C, &copy);
    std::fill(vector, vector + 2 * C, 0.0);
    Task& task = backward.task;
    task.out = dresidual.data();
    task.streams = dresidual && dresidual.streams(backward.x);
    task.sum = vector;
    task.product = vector + C;
    run(passes_of(backward.x.type).reduce_gradients, task);
    if (task.shape.size())
        for (i64 c = 0; c < C; ++c) vector[C + c] = about_mean(vector[C + c], vector[c], task.mean[c], backward.shift(c));
    std::copy(vector, vector + 2 * C, copy);
    return Reference(PyTuple_Pack(3, result.get(), local.get(), arguments[backward.is_kept() ? 3 : 0]));
}

// Return the gradient of a parameter in its type, or None.
Reference parameter_gradient(PyObject* type, i64 C, const double* values)
{
    if (type == Py_None) return none();
    PyArray_Descr* dtype;
    if (!PyArray_DescrConverter(type, &dtype)) throw Failure{};
    npy_intp shape[] = {C};
    Reference result(PyArray_NewFromDescr(&PyArray_Type, dtype, 1, shape, nullptr, nullptr, 0, nullptr));
    const Array array("gradient", result.get());
    check_values(array, C);  // a type may itself be of arrays
    array.check_memory();
    write(array, C, values);
    return result;
}

// input_gradient(gradient, x, record, dx, sums, parameters, mailbox) -> dweight, dbias
Reference input_gradient(Arguments arguments)
{
    Backward backward(arguments[0], arguments[1], arguments[2]);
    const Tensor dx("dx", arguments[3], backward.x);
    const Array sums("sums", arguments[4], true);
    dx.check_output({&backward.x, &backward.dy}, &backward.dy);
    PyObject* parameters = arguments[5];
    const i64 C = backward.x.shape.C;
    const double* of_parameters = Array("parameters", item(parameters, 0, 4, "parameters")).vector(2 * C);
    const double by = number(item(parameters, 1, 4, "parameters"), "scale");
    Values values(4 * C);
    double *dweight = values + 2 * C, *dbias = values + 3 * C;
    Task& task = backward.task;
    if (sums) {
        const double* vector = sums.vector(2 * C);
        double *factor = values, *constant = values + C;
        task.factor = factor;
        task.constant = constant;
        for (i64 c = 0; c < C; ++c) {
            const auto set = [&](auto step) {
                factor[c] = step.factor;
                constant[c] = step.constant;
            };
            if (backward.is_double())
                set(gradient_step_of<double>(vector[c], vector[C + c], *backward.count, task.mean[c], backward.invstd[c]));
            else
                set(gradient_step_of<float>(vector[c], vector[C + c], *backward.count, task.mean[c], backward.invstd[c]));
        }
    }
    for (i64 c = 0; c < C; ++c) {
        dweight[c] = of_parameters[C + c] * backward.invstd[c] * by;
        dbias[c] = of_parameters[c] * by;
    }
    Reference of_weight = parameter_gradient(item(parameters, 2, 4, "parameters"), C, dweight);
    Reference of_bias = parameter_gradient(item(parameters, 3, 4, "parameters"), C, dbias);
    task.out = dx.data();
    task.streams = dx.streams(backward.dy);
    if (backward.is_kept()) task.activation = IDENTITY;
    run(passes_of(backward.x.type).input_gradient, task);
    return Reference(PyTuple_Pack(2, of_weight.get(), of_bias.get()));
}

// as_kernel_input(x) -> x, or a copy that the operations take
Reference as_kernel_input(Arguments arguments)
{
    const Array x("x", arguments[0]);
    if (PyArray_ISCARRAY_RO(x.array)) return Reference(Py_NewRef(arguments[0]));
    PyArray_Descr* native = PyArray_DescrNewByteorder(PyArray_DESCR(x.array), NPY_NATIVE);
    if (!native) throw Failure{};
    return Reference(PyArray_FromArray(x.array, native, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_NOTSWAPPED | NPY_ARRAY_ENSUREARRAY));
}

// levels() -> {name: whether this processor can run it}
Reference levels(Arguments)
{
    Reference result(PyDict_New());
    for (const Level& each : LEVELS)
        if (PyDict_SetItemString(result.get(), each.name, each.is_supported ? Py_True : Py_False) < 0) throw Failure{};
    return result;
}

// use(name): compute with the instructions of a level
Reference use(Arguments arguments)
{
    if (!PyUnicode_Check(arguments[0])) fail(PyExc_TypeError, "expected the name of a level");
    for (const Level& each : LEVELS)
        if (each.is_supported && PyUnicode_CompareWithASCIIString(arguments[0], each.name) == 0) {
            level = &each;
            return none();
        }
    fail(PyExc_ValueError, "expected one of levels() that this processor can run");
}

template <Reference (*OPERATION)(Arguments), Py_ssize_t COUNT>
PyObject* call(PyObject*, Arguments arguments, Py_ssize_t count)
{
    if (count != COUNT) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments (got %zd)", COUNT, count);
        return nullptr;
    }
    try {
        return OPERATION(arguments).release();
    } catch (const Failure&) {
        return nullptr;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

#define METHOD(name, operation, count, text)                                                                     \
    {                                                                                                            \
        name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(call<operation, count>)), METH_FASTCALL, text \
    }
PyMethodDef methods[] = {
    METHOD("statistics", statistics, 2, "statistics($module, x, trailer, /)\n--\n\nSee backends.interface.Backend."),
    METHOD("centered_squares", centered_squares, 4, "centered_squares($module, local, vector, trailer, mailbox, /)\n--\n\nSee backends.interface.Backend."),
    METHOD("normalize", normalize, 6, "normalize($module, x, y, batch, running, affine, epilogue, /)\n--\n\nSee backends.interface.Backend."),
    METHOD("reduce_gradients", reduce_gradients, 5, "reduce_gradients($module, dy, x, record, dresidual, trailer, /)\n--\n\nSee backends.interface.Backend."),
    METHOD("input_gradient", input_gradient, 7, "input_gradient($module, gradient, x, record, dx, sums, parameters, mailbox, /)\n--\n\nSee backends.interface.Backend."),
    METHOD("as_kernel_input", as_kernel_input, 1, "as_kernel_input($module, x, /)\n--\n\nSee backends.interface.Backend."),
    METHOD("update", write_running, 4, "update($module, running_mean, running_var, num_batches_tracked, values, /)\n--\n\nWrite new running statistics."),
    METHOD("levels", levels, 0, "levels($module, /)\n--\n\nReturn the instruction sets, and whether this processor has them."),
    METHOD("use", use, 1, "use($module, level, /)\n--\n\nCompute with an instruction set."),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_core", "The compiled CPU core: see module.cpp.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace core

PyMODINIT_FUNC PyInit__core()
{
    using namespace core;
    import_array();
    PyObject* module = PyModule_Create(&definition);
    if (!module) return nullptr;
    PyObject* functools = PyImport_ImportModule("functools");
    partial = functools ? PyObject_GetAttrString(functools, "partial") : nullptr;
    Py_XDECREF(functools);
    update = PyObject_GetAttrString(module, "update");
    for (const Level& each : LEVELS)
        if (each.is_supported && std::strcmp(each.name, "v4") != 0) level = &each;
    if (!partial || !update || PyModule_AddStringConstant(module, "SOURCES", CORE_SOURCES) < 0 ||
        PyModule_AddStringConstant(module, "VERSION", CORE_VERSION) < 0) {
        Py_DECREF(module);
        return nullptr;
    }
    return module;
}
