/* The Python side of the lattice kernel: checks every size, releases the GIL, calls _body.c.
 *
 * Arrays come as C-contiguous, aligned buffers; results are written into buffers that the caller
 * made. Wrong sizes raise ValueError before anything is computed. native.py is the only caller.
 */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "_lattice.h"

typedef struct {
    PyTypeObject *ring_type;
} State;

typedef struct {
    PyObject_HEAD
    Ring *ring;
    const Steps *steps;
} RingObject;

/* --- arguments ------------------------------------------------------------------------------*/

static bool is_of(const Py_buffer *buffer, size_t bytes, const char *name)
{
    if ((size_t)buffer->len != bytes) {
        PyErr_Format(PyExc_ValueError, "%s: expected %zu bytes, found %zd", name, bytes,
                     buffer->len);
        return false;
    }
    return true;
}

static bool in_range(long long value, long long least, long long most, const char *name)
{
    if (value < least || value > most) {
        PyErr_Format(PyExc_ValueError, "%s: expected %lld to %lld, found %lld", name, least, most,
                     value);
        return false;
    }
    return true;
}

static void release_all(Py_buffer *buffers, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (buffers[i].obj)
            PyBuffer_Release(&buffers[i]);
}

static size_t table_bytes(const RingObject *self)
{
    return PRIMES * self->ring->n * sizeof(uint64_t);
}

/* The coefficients of a sum, from its length; false with ValueError where it has none. */
static bool sum_length(const Py_buffer *sum, size_t *coefficients)
{
    const size_t unit = PRIMES * sizeof(uint64_t);
    *coefficients = (size_t)sum->len / unit;
    return is_of(sum, *coefficients * unit, "sum");
}

static const Steps *variant(const char *name)
{
    if (!strcmp(name, "generic"))
        return &lattice_generic;
    if (!strcmp(name, "avx2"))
        return lattice_avx2();
    return strcmp(name, "ifma") ? NULL : lattice_ifma();
}

/* Numbers of polynomials and places of values: far more than there will be. */
#define MAX_PLACE (1LL << 60)

/* --- Ring -----------------------------------------------------------------------------------*/

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    Py_ssize_t n;
    unsigned long long given[2 * PRIMES];
    uint64_t primes[PRIMES], roots[PRIMES];
    const char *name;
    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Ring takes no keywords");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "n(KKKK)(KKKK)s", &n, &given[0], &given[1], &given[2], &given[3],
                          &given[4], &given[5], &given[6], &given[7], &name))
        return NULL;
    if (!in_range(n, MIN_N, MAX_N, "n"))
        return NULL;
    for (int j = 0; j < PRIMES; j++) {
        primes[j] = given[j];
        roots[j] = given[PRIMES + j];
        if (n & (n - 1) || primes[j] >> (WORD_BITS - 1) != 1 || roots[j] >= primes[j]) {
            PyErr_SetString(PyExc_ValueError, "expected n a power of two, 2^49 < p < 2^50");
            return NULL;
        }
    }
    const Steps *steps = variant(name);
    if (!steps) {
        PyErr_Format(PyExc_RuntimeError, "the variant %s cannot run here", name);
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    RingObject *self = (RingObject *)allocate(type, 0);
    if (!self)
        return NULL;
    self->steps = steps;
    self->ring = PyMem_Calloc(1, sizeof *self->ring);
    if (!self->ring || lattice_ring_set_up(self->ring, (size_t)n, primes, roots) != LATTICE_OK) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void ring_dealloc(PyObject *object)
{
    RingObject *self = (RingObject *)object;
    PyTypeObject *type = Py_TYPE(object);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    if (self->ring)
        lattice_ring_free(self->ring);
    PyMem_Free(self->ring);
    free_object(object);
    Py_DECREF(type);
}

static PyObject *sample(PyObject *object, PyObject *args)
{
    const RingObject *self = (RingObject *)object;
    PyObject *result = NULL;
    long long polynomial;
    Py_buffer b[2] = {0};
    if (PyArg_ParseTuple(args, "y*Lw*", &b[0], &polynomial, &b[1]) &&
        in_range(polynomial, 0, MAX_PLACE, "polynomial") && is_of(&b[0], KEY_BYTES, "key") &&
        is_of(&b[1], 8 * self->ring->n, "out")) {
        Py_BEGIN_ALLOW_THREADS
        lattice_sample(self->ring, self->steps, b[0].buf, (uint64_t)polynomial, b[1].buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    release_all(b, 2);
    return result;
}

static PyObject *transform(PyObject *object, PyObject *args)
{
    const RingObject *self = (RingObject *)object;
    PyObject *result = NULL;
    Py_buffer b[2] = {0};
    if (PyArg_ParseTuple(args, "y*w*", &b[0], &b[1]) &&
        is_of(&b[0], 8 * self->ring->n, "coefficients") &&
        is_of(&b[1], table_bytes(self), "out")) {
        Py_BEGIN_ALLOW_THREADS
        lattice_transform(self->ring, b[0].buf, b[1].buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    release_all(b, 2);
    return result;
}

/* Polynomials, from their slots and values; false with ValueError. */
static bool part_of(int slot_bits, long long first, Py_ssize_t values, Part *part)
{
    if (!in_range(slot_bits, 3, 52, "slot bits") || !in_range(first, 0, MAX_PLACE, "first") ||
        !in_range(values, 0, PY_SSIZE_T_MAX / 64, "values"))
        return false;
    part->slot_bits = (unsigned)slot_bits;
    part->slots = VALUE_BITS / (unsigned)slot_bits;
    part->first = (uint64_t)first;
    part->values = (size_t)values;
    return true;
}

enum { MASK_BYTES = 1 + KEY_BYTES };

static PyObject *pad(PyObject *object, PyObject *args)
{
    const RingObject *self = (RingObject *)object;
    PyObject *result = NULL, *secret, *seed;
    Py_buffer b[7] = {0};
    enum { K_A, K_E, MASKS, VALUES, OUT, SECRET, SEED };
    int slot_bits, kind;
    double scale, one, limit;
    long long first, first_value;
    Mask *masks = NULL;
    if (!PyArg_ParseTuple(args, "y*Oy*y*iCy*dddOLLw*", &b[K_A], &secret, &b[K_E], &b[MASKS],
                          &slot_bits, &kind, &b[VALUES], &scale, &one, &limit, &seed, &first,
                          &first_value, &b[OUT]))
        goto done;
    const size_t item = kind == 'f' ? 4 : 8;
    Part part;
    if (!part_of(slot_bits, first, b[VALUES].len / (Py_ssize_t)item, &part) ||
        !in_range(first_value, 0, MAX_PLACE, "first value") ||
        !is_of(&b[VALUES], part.values * item, "values") || !is_of(&b[K_A], KEY_BYTES, "k_a") ||
        !is_of(&b[K_E], KEY_BYTES, "k_e") ||
        !is_of(&b[OUT], COEFFICIENT_BYTES * lattice_coefficients(self->ring, &part), "out"))
        goto done;
    const size_t count = (size_t)b[MASKS].len / MASK_BYTES;
    if (!is_of(&b[MASKS], count * MASK_BYTES, "masks"))
        goto done;
    if (secret != Py_None && (PyObject_GetBuffer(secret, &b[SECRET], PyBUF_SIMPLE) < 0 ||
                              !is_of(&b[SECRET], table_bytes(self), "secret")))
        goto done;
    if (seed != Py_None && (PyObject_GetBuffer(seed, &b[SEED], PyBUF_SIMPLE) < 0 ||
                            !is_of(&b[SEED], KEY_BYTES, "seed")))
        goto done;
    if (!(limit >= 0 && limit < (double)(1ULL << (slot_bits - 1))) || !isfinite(scale) ||
        !isfinite(one)) {
        PyErr_SetString(PyExc_ValueError, "limit or scale out of range");
        goto done;
    }
    Values values = {0};
    if (kind == 'f')
        values.floats = b[VALUES].buf;
    else if (kind == 'd')
        values.doubles = b[VALUES].buf;
    else
        values.integers = b[VALUES].buf;
    masks = PyMem_Calloc(count + 1, sizeof *masks);
    if (!masks) {
        PyErr_NoMemory();
        goto done;
    }
    for (size_t i = 0; i < count; i++) {
        const uint8_t *from = (const uint8_t *)b[MASKS].buf + MASK_BYTES * i;
        masks[i] = (Mask){from + 1, from[0] != 0};
    }
    int status;
    size_t clamped = 0;
    Py_BEGIN_ALLOW_THREADS
    status = lattice_pad(self->ring, self->steps, b[K_A].buf, b[SECRET].buf, b[K_E].buf, masks,
                         count, &part, &values, scale, one, limit, b[SEED].buf,
                         (uint64_t)first_value, b[OUT].buf, &clamped);
    Py_END_ALLOW_THREADS
    if (status == LATTICE_MEMORY)
        PyErr_NoMemory();
    else
        result = Py_BuildValue("(Nn)", PyBool_FromLong(status == LATTICE_OK),
                               (Py_ssize_t)clamped);
done:
    PyMem_Free(masks);
    release_all(b, 7);
    return result;
}

static PyObject *open_body(PyObject *object, PyObject *args)
{
    const RingObject *self = (RingObject *)object;
    PyObject *result = NULL;
    Py_buffer b[4] = {0};
    enum { K_A, SECRET, BODY, OUT };
    int slot_bits;
    long long first, bound;
    Part part;
    if (!PyArg_ParseTuple(args, "y*y*Liy*Lw*", &b[K_A], &b[SECRET], &bound, &slot_bits, &b[BODY],
                          &first, &b[OUT]) ||
        !part_of(slot_bits, first, b[OUT].len / 8, &part) ||
        !is_of(&b[OUT], 8 * part.values, "out") || !is_of(&b[K_A], KEY_BYTES, "k_a") ||
        !is_of(&b[SECRET], table_bytes(self), "secret") ||
        !in_range(bound, 0, 1LL << NOISE_BITS, "bound") ||
        !is_of(&b[BODY], COEFFICIENT_BYTES * lattice_coefficients(self->ring, &part), "body"))
        goto done;
    int status;
    bool good = false;
    Py_BEGIN_ALLOW_THREADS
    status = lattice_open(self->ring, self->steps, b[K_A].buf, b[SECRET].buf, (uint64_t)bound,
                          &part, b[BODY].buf, b[OUT].buf, &good);
    Py_END_ALLOW_THREADS
    if (status == LATTICE_MEMORY)
        PyErr_NoMemory();
    else
        result = Py_BuildValue("(NN)", PyBool_FromLong(status == LATTICE_OK),
                               PyBool_FromLong(good));
done:
    release_all(b, 4);
    return result;
}

static PyObject *sum_body(PyObject *object, PyObject *args)
{
    const RingObject *self = (RingObject *)object;
    PyObject *result = NULL;
    Py_buffer b[2] = {0};
    size_t coefficients;
    int how;
    if (!PyArg_ParseTuple(args, "w*y*i", &b[0], &b[1], &how) || !sum_length(&b[0], &coefficients) ||
        !is_of(&b[1], COEFFICIENT_BYTES * coefficients, "body") ||
        !in_range(how, SUM_ADD, SUM_SUBTRACT_FROM, "how"))
        goto done;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = lattice_sum_body(self->ring, self->steps, b[0].buf, coefficients, b[1].buf, how);
    Py_END_ALLOW_THREADS
    result = PyBool_FromLong(status == LATTICE_OK);
done:
    release_all(b, 2);
    return result;
}

static PyObject *sum_mask(PyObject *object, PyObject *args)
{
    const RingObject *self = (RingObject *)object;
    PyObject *result = NULL;
    Py_buffer b[2] = {0};
    size_t coefficients;
    long long first;
    int minus;
    if (!PyArg_ParseTuple(args, "w*Lpy*", &b[0], &first, &minus, &b[1]) ||
        !in_range(first, 0, MAX_PLACE, "first") || !sum_length(&b[0], &coefficients) ||
        !is_of(&b[1], KEY_BYTES, "key"))
        goto done;
    const Mask mask = {b[1].buf, minus != 0};
    Py_BEGIN_ALLOW_THREADS
    lattice_sum_mask(self->ring, self->steps, b[0].buf, coefficients, (uint64_t)first, &mask);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    release_all(b, 2);
    return result;
}

static PyObject *sum_reduce(PyObject *object, PyObject *args)
{
    const RingObject *self = (RingObject *)object;
    PyObject *result = NULL;
    Py_buffer b[1] = {0};
    size_t coefficients;
    if (PyArg_ParseTuple(args, "w*", &b[0]) && sum_length(&b[0], &coefficients)) {
        Py_BEGIN_ALLOW_THREADS
        lattice_sum_reduce(self->ring, self->steps, b[0].buf, coefficients);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    release_all(b, 1);
    return result;
}

static PyObject *sum_write(PyObject *object, PyObject *args)
{
    const RingObject *self = (RingObject *)object;
    PyObject *result = NULL;
    Py_buffer b[2] = {0};
    size_t coefficients;
    if (PyArg_ParseTuple(args, "w*w*", &b[0], &b[1]) && sum_length(&b[0], &coefficients) &&
        is_of(&b[1], COEFFICIENT_BYTES * coefficients, "out")) {
        Py_BEGIN_ALLOW_THREADS
        lattice_sum_write(self->ring, self->steps, b[0].buf, coefficients, b[1].buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    release_all(b, 2);
    return result;
}

static PyMethodDef ring_methods[] = {
    {"sample", sample, METH_VARARGS, NULL},
    {"transform", transform, METH_VARARGS, NULL},
    {"pad", pad, METH_VARARGS, NULL},
    {"open", open_body, METH_VARARGS, NULL},
    {"sum_body", sum_body, METH_VARARGS, NULL},
    {"sum_mask", sum_mask, METH_VARARGS, NULL},
    {"sum_reduce", sum_reduce, METH_VARARGS, NULL},
    {"sum_write", sum_write, METH_VARARGS, NULL},
    {0},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, ring_methods},
    {0},
};

static PyType_Spec ring_spec = {
    .name = "dtl.core.lattice._lattice.Ring",
    .basicsize = sizeof(RingObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = ring_slots,
};

/* --- the module -----------------------------------------------------------------------------*/

static PyObject *variants(PyObject *module, PyObject *unused)
{
    static const char *const names[] = {"generic", "avx2", "ifma"};
    (void)module;
    (void)unused;
    PyObject *found = PyList_New(0);
    for (size_t i = 0; found && i < sizeof names / sizeof *names; i++) {
        if (!variant(names[i]))
            continue;
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name || PyList_Append(found, name) < 0)
            Py_CLEAR(found);
        Py_XDECREF(name);
    }
    return found;
}

static PyMethodDef functions[] = {
    {"variants", variants, METH_NOARGS, NULL},
    {0},
};

static int set_up(PyObject *module)
{
    State *state = PyModule_GetState(module);
    state->ring_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &ring_spec, NULL);
    if (!state->ring_type)
        return -1;
    return PyModule_AddType(module, state->ring_type);
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->ring_type);
    return 0;
}

static int clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->ring_type);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, set_up},
    {0},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "dtl.core.lattice._lattice",
    .m_size = sizeof(State),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
};

PyMODINIT_FUNC PyInit__lattice(void)
{
    return PyModuleDef_Init(&definition);
}
