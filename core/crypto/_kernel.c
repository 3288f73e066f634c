/* The Python side of the native kernel: checks every size, releases the GIL, calls _ifma.c.
 *
 * Arrays come as C-contiguous buffers of bytes; results are written into buffers that the
 * caller made. Wrong sizes raise ValueError before anything is computed. native.py is the
 * only caller.
 */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <string.h>

#include "_ifma.h"

static bool in_range(Py_ssize_t value, Py_ssize_t least, Py_ssize_t most, const char *name)
{
    if (value < least || value > most) {
        PyErr_Format(PyExc_ValueError, "%s: expected %zd to %zd, found %zd", name, least, most,
                     value);
        return false;
    }
    return true;
}

#if IFMA_BUILT

typedef struct {
    PyTypeObject *modulus_type;
    PyTypeObject *table_type;
} State;

typedef struct {
    PyObject_HEAD
    ifma_modulus *mod;
    Py_ssize_t width;
} Modulus;

typedef struct {
    PyObject_HEAD
    Modulus *modulus;
    ifma_table *table;
    char *filled;
    Py_ssize_t lanes, bits, blocks;
} Table;

/* --- arguments ------------------------------------------------------------------------------*/

/* How many items of `size` bytes a buffer holds; -1 with ValueError where it does not divide. */
static Py_ssize_t items(const Py_buffer *buffer, Py_ssize_t size, const char *name)
{
    if (buffer->len % size) {
        PyErr_Format(PyExc_ValueError, "%s: %zd bytes are not a multiple of %zd", name,
                     buffer->len, size);
        return -1;
    }
    return buffer->len / size;
}

/* Whether a buffer has `count` items of `size` bytes. */
static bool is_of(const Py_buffer *buffer, Py_ssize_t count, Py_ssize_t size, const char *name)
{
    Py_ssize_t found = items(buffer, size, name);
    if (found >= 0 && found != count)
        PyErr_Format(PyExc_ValueError, "%s: expected %zd items of %zd bytes, found %zd", name,
                     count, size, found);
    return found == count;
}

static PyObject *none_or_error(int status)
{
    if (status == IFMA_MEMORY)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *bool_or_error(int status)
{
    if (status == IFMA_MEMORY)
        return PyErr_NoMemory();
    return PyBool_FromLong(status == IFMA_OK);
}

static void release_all(Py_buffer *buffers, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (buffers[i].obj)
            PyBuffer_Release(&buffers[i]);
}

/* --- Modulus --------------------------------------------------------------------------------*/

static PyObject *modulus_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    Py_buffer b[3] = {0};
    Modulus *self = NULL;
    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Modulus takes no keywords");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "y*y*y*", &b[0], &b[1], &b[2]))
        goto done;
    const Py_ssize_t width = b[0].len;
    const uint8_t *n = b[0].buf;
    if (!in_range(width, IFMA_MIN_WIDTH, IFMA_MAX_WIDTH, "width of the modulus") ||
        !is_of(&b[1], 1, width, "complement") || !is_of(&b[2], 2, width, "cube"))
        goto done;
    if (!(n[0] & 1) || !n[width - 1]) {
        PyErr_SetString(PyExc_ValueError, "the modulus must be odd, its top byte not zero");
        goto done;
    }
    if (ifma_unavailable()) {
        PyErr_SetString(PyExc_RuntimeError, ifma_unavailable());
        goto done;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    self = (Modulus *)allocate(type, 0);
    if (!self)
        goto done;
    self->width = width;
    self->mod = ifma_modulus_new(n, (size_t)width, b[1].buf, b[2].buf);
    if (!self->mod) {
        Py_CLEAR(self);
        PyErr_NoMemory();
    }
done:
    release_all(b, 3);
    return (PyObject *)self;
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_object(self);
    Py_DECREF(type);
}

static void modulus_dealloc(PyObject *self)
{
    ifma_modulus_free(((Modulus *)self)->mod);
    dealloc(self);
}

static PyObject *element_bytes(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromSize_t(ifma_element_bytes((size_t)((Modulus *)self)->width));
}

static PyObject *product(PyObject *self, PyObject *args)
{
    const Modulus *m = (Modulus *)self;
    PyObject *sequence, *result = NULL;
    Py_buffer b[2] = {0}, *operands = NULL;
    const uint8_t **pointers = NULL;
    Py_ssize_t many = 0, columns;
    if (!PyArg_ParseTuple(args, "O!ny*w*", &PyTuple_Type, &sequence, &columns, &b[0], &b[1]))
        goto done;
    const Py_ssize_t count = items(&b[1], 2 * m->width, "out");
    if (count < 0 || !in_range(columns, 0, PY_SSIZE_T_MAX, "columns") ||
        !is_of(&b[0], 2, m->width, "scale"))
        goto done;
    const Py_ssize_t wanted = PyTuple_Size(sequence);
    if (!in_range(wanted, 1, PY_SSIZE_T_MAX / (Py_ssize_t)sizeof *operands, "batches"))
        goto done;
    operands = PyMem_Calloc((size_t)wanted, sizeof *operands);
    pointers = PyMem_Calloc((size_t)wanted, sizeof *pointers);
    if (!operands || !pointers) {
        PyErr_NoMemory();
        goto done;
    }
    for (; many < wanted; many++) {
        PyObject *item = PyTuple_GetItem(sequence, many);
        if (!item || PyObject_GetBuffer(item, &operands[many], PyBUF_SIMPLE) < 0)
            goto done;
        pointers[many] = operands[many].buf;
        if (!is_of(&operands[many], count, 2 * m->width, "batch")) {
            many++;
            goto done;
        }
    }
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ifma_product(m->mod, pointers, (size_t)many, (size_t)count, (size_t)columns,
                          b[0].buf, b[1].buf);
    Py_END_ALLOW_THREADS
    result = none_or_error(status);
done:
    if (operands)
        release_all(operands, (size_t)many);
    PyMem_Free(operands);
    PyMem_Free(pointers);
    release_all(b, 2);
    return result;
}

static PyObject *running(PyObject *self, PyObject *args)
{
    const Modulus *m = (Modulus *)self;
    PyObject *result = NULL;
    Py_buffer b[3] = {0};
    if (!PyArg_ParseTuple(args, "y*w*w*", &b[0], &b[1], &b[2]))
        goto done;
    const Py_ssize_t count = items(&b[0], 2 * m->width, "batch");
    const Py_ssize_t element = (Py_ssize_t)ifma_element_bytes((size_t)m->width);
    if (count < 0 || !is_of(&b[1], (count + IFMA_LANES - 1) / IFMA_LANES, element, "prefixes") ||
        !is_of(&b[2], IFMA_LANES, 2 * m->width, "totals"))
        goto done;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ifma_running(m->mod, b[0].buf, (size_t)count, b[1].buf, b[2].buf);
    Py_END_ALLOW_THREADS
    result = none_or_error(status);
done:
    release_all(b, 3);
    return result;
}

static PyObject *unwind(PyObject *self, PyObject *args)
{
    const Modulus *m = (Modulus *)self;
    PyObject *result = NULL;
    Py_buffer b[4] = {0};
    if (!PyArg_ParseTuple(args, "y*y*y*w*", &b[0], &b[1], &b[2], &b[3]))
        goto done;
    const Py_ssize_t count = items(&b[0], 2 * m->width, "batch");
    const Py_ssize_t element = (Py_ssize_t)ifma_element_bytes((size_t)m->width);
    if (count < 0 || !is_of(&b[1], (count + IFMA_LANES - 1) / IFMA_LANES, element, "prefixes") ||
        !is_of(&b[2], IFMA_LANES, 2 * m->width, "inverses") ||
        !is_of(&b[3], count, 2 * m->width, "out"))
        goto done;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ifma_unwind(m->mod, b[0].buf, (size_t)count, b[1].buf, b[2].buf, b[3].buf);
    Py_END_ALLOW_THREADS
    result = none_or_error(status);
done:
    release_all(b, 4);
    return result;
}

static PyObject *add_blocks(PyObject *self, PyObject *args)
{
    const Modulus *m = (Modulus *)self;
    PyObject *result = NULL;
    Py_buffer b[3] = {0};
    if (!PyArg_ParseTuple(args, "y*y*w*", &b[0], &b[1], &b[2]))
        goto done;
    const Py_ssize_t count = items(&b[0], 2 * m->width, "batch");
    if (count < 0 || !is_of(&b[1], count, m->width, "blocks") ||
        !is_of(&b[2], count, 2 * m->width, "out"))
        goto done;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ifma_add_blocks(m->mod, b[0].buf, b[1].buf, (size_t)count, b[2].buf);
    Py_END_ALLOW_THREADS
    result = none_or_error(status);
done:
    release_all(b, 3);
    return result;
}

static PyObject *check(PyObject *self, PyObject *args)
{
    const Modulus *m = (Modulus *)self;
    PyObject *result = NULL;
    Py_buffer b[2] = {0};
    if (!PyArg_ParseTuple(args, "y*w*", &b[0], &b[1]))
        goto done;
    const Py_ssize_t count = items(&b[0], 2 * m->width, "batch");
    if (count < 0 || !is_of(&b[1], IFMA_LANES, m->width, "products"))
        goto done;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ifma_check(m->mod, b[0].buf, (size_t)count, b[1].buf);
    Py_END_ALLOW_THREADS
    result = bool_or_error(status);
done:
    release_all(b, 2);
    return result;
}

static PyObject *logarithms(PyObject *self, PyObject *args)
{
    const Modulus *m = (Modulus *)self;
    PyObject *result = NULL;
    Py_buffer b[3] = {0};
    if (!PyArg_ParseTuple(args, "y*w*w*", &b[0], &b[1], &b[2]))
        goto done;
    const Py_ssize_t count = items(&b[0], 2 * m->width, "batch");
    if (count < 0 || !is_of(&b[1], count, m->width, "out") || !is_of(&b[2], count, 1, "good"))
        goto done;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ifma_logarithms(m->mod, b[0].buf, (size_t)count, b[1].buf, b[2].buf);
    Py_END_ALLOW_THREADS
    result = none_or_error(status);
done:
    release_all(b, 3);
    return result;
}

enum { MAX_EXPONENT_BYTES = 1 << 16, MAX_EXPONENTS = 1 << 16 };

static PyObject *shared_base_powers(PyObject *self, PyObject *args)
{
    const Modulus *m = (Modulus *)self;
    PyObject *result = NULL;
    Py_ssize_t width;
    Py_buffer b[3] = {0};
    if (!PyArg_ParseTuple(args, "y*y*nw*", &b[0], &b[1], &width, &b[2]))
        goto done;
    const Py_ssize_t count = items(&b[0], 2 * m->width, "bases");
    if (count < 0 || !in_range(width, 1, MAX_EXPONENT_BYTES, "bytes of an exponent"))
        goto done;
    const Py_ssize_t exponents = items(&b[1], width, "exponents");
    if (exponents < 0 || !in_range(exponents, 1, MAX_EXPONENTS, "exponents") ||
        !is_of(&b[2], count, exponents * 2 * m->width, "out"))
        goto done;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ifma_shared_powers(m->mod, b[0].buf, (size_t)count, b[1].buf, (size_t)exponents,
                                (size_t)width, b[2].buf);
    Py_END_ALLOW_THREADS
    result = none_or_error(status);
done:
    release_all(b, 3);
    return result;
}

static PyObject *secret_powers(PyObject *self, PyObject *args)
{
    const Modulus *m = (Modulus *)self;
    PyObject *result = NULL;
    Py_ssize_t width, bits;
    Py_buffer b[3] = {0};
    if (!PyArg_ParseTuple(args, "y*y*nnw*", &b[0], &b[1], &width, &bits, &b[2]))
        goto done;
    const Py_ssize_t count = items(&b[0], 2 * m->width, "bases");
    if (count < 0 || !in_range(width, 1, MAX_EXPONENT_BYTES, "bytes of an exponent") ||
        !in_range(bits, 1, 8 * width, "bits of an exponent"))
        goto done;
    const Py_ssize_t exponents = items(&b[1], width, "exponents");
    if (exponents < 0 || !in_range(exponents, 1, MAX_EXPONENTS, "exponents") ||
        !is_of(&b[2], count, exponents * 2 * m->width, "out"))
        goto done;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ifma_secret_powers(m->mod, b[0].buf, (size_t)count, b[1].buf, (size_t)exponents,
                                (size_t)width, (size_t)bits, b[2].buf);
    Py_END_ALLOW_THREADS
    result = none_or_error(status);
done:
    release_all(b, 3);
    return result;
}

static PyObject *weighted_products(PyObject *self, PyObject *args)
{
    const Modulus *m = (Modulus *)self;
    PyObject *result = NULL;
    Py_ssize_t width, window;
    Py_buffer b[3] = {0};
    if (!PyArg_ParseTuple(args, "y*y*nnw*", &b[0], &b[1], &width, &window, &b[2]))
        goto done;
    if (!in_range(width, 1, MAX_EXPONENT_BYTES, "bytes of a weight") ||
        !in_range(window, 0, IFMA_MAX_WINDOW, "window"))
        goto done;
    const Py_ssize_t count = items(&b[1], width, "weights");
    const Py_ssize_t columns = items(&b[2], 2 * m->width, "out");
    if (count < 0 || columns < 0 || !in_range(columns, 1, PY_SSIZE_T_MAX / 4096, "columns") ||
        !is_of(&b[0], count, columns * 2 * m->width, "batch"))
        goto done;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ifma_weighted(m->mod, b[0].buf, b[1].buf, (size_t)count, (size_t)columns,
                           (size_t)width, (size_t)window, b[2].buf);
    Py_END_ALLOW_THREADS
    result = none_or_error(status);
done:
    release_all(b, 3);
    return result;
}

/* --- Table ----------------------------------------------------------------------------------*/

enum { MAX_ROWS = 16, MAX_COLUMNS = 1 << 16 };

static PyObject *table(PyObject *self, PyObject *args)
{
    Modulus *m = (Modulus *)self;
    Table *made = NULL;
    Py_ssize_t rows, columns, depth;
    int groups;
    Py_buffer b[1] = {0};
    State *state = PyType_GetModuleState(Py_TYPE(self));
    if (!state || !PyArg_ParseTuple(args, "y*nnnp", &b[0], &rows, &columns, &depth, &groups))
        goto done;
    const Py_ssize_t lanes = items(&b[0], 2 * m->width, "bases");
    if (lanes < 0 || !in_range(lanes, 1, IFMA_LANES, "bases") ||
        !in_range(rows, 1, MAX_ROWS, "rows") || !in_range(columns, 1, MAX_COLUMNS, "columns") ||
        !in_range(depth, 1, columns, "depth"))
        goto done;
    allocfunc allocate = (allocfunc)PyType_GetSlot(state->table_type, Py_tp_alloc);
    made = (Table *)allocate(state->table_type, 0);
    if (!made)
        goto done;
    made->lanes = lanes;
    made->bits = rows * columns;
    made->blocks = (columns + depth - 1) / depth;
    Py_INCREF(self);
    made->modulus = m;
    made->filled = PyMem_Calloc((size_t)made->blocks, 1);
    if (made->filled) {
        Py_BEGIN_ALLOW_THREADS
        made->table = ifma_table_new(m->mod, b[0].buf, (size_t)lanes, (size_t)rows,
                                     (size_t)columns, (size_t)depth, groups);
        Py_END_ALLOW_THREADS
    }
    if (!made->table) {
        Py_CLEAR(made);
        PyErr_NoMemory();
    }
done:
    release_all(b, 1);
    return (PyObject *)made;
}

static void table_dealloc(PyObject *self)
{
    Table *t = (Table *)self;
    ifma_table_free(t->table);
    PyMem_Free(t->filled);
    Py_XDECREF((PyObject *)t->modulus);
    dealloc(self);
}

static PyObject *fill(PyObject *self, PyObject *args)
{
    Table *t = (Table *)self;
    Py_ssize_t block;
    if (!PyArg_ParseTuple(args, "n", &block) || !in_range(block, 0, t->blocks - 1, "block"))
        return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ifma_table_fill(t->table, (size_t)block);
    Py_END_ALLOW_THREADS
    if (status == IFMA_OK)
        t->filled[block] = 1;
    return none_or_error(status);
}

static PyObject *powers(PyObject *self, PyObject *args)
{
    const Table *t = (Table *)self;
    const Py_ssize_t width = t->modulus->width;
    PyObject *blocks, *result = NULL;
    Py_ssize_t exponent_width;
    int masked;
    Py_buffer b[3] = {0};
    if (!PyArg_ParseTuple(args, "y*nOpw*", &b[0], &exponent_width, &blocks, &masked, &b[1]))
        goto done;
    if (!in_range(exponent_width, 1, MAX_EXPONENT_BYTES, "bytes of an exponent"))
        goto done;
    const Py_ssize_t count = items(&b[0], exponent_width, "exponents");
    if (count < 0 || !is_of(&b[1], count, t->lanes * 2 * width, "out"))
        goto done;
    if (blocks != Py_None && (PyObject_GetBuffer(blocks, &b[2], PyBUF_SIMPLE) < 0 ||
                              !is_of(&b[2], count, t->lanes * width, "blocks")))
        goto done;
    if (memchr(t->filled, 0, (size_t)t->blocks)) {
        PyErr_SetString(PyExc_ValueError, "the table is not filled yet");
        goto done;
    }
    const uint8_t *exponents = b[0].buf;
    for (Py_ssize_t i = 0; i < count; i++)
        for (Py_ssize_t j = t->bits; j < 8 * exponent_width; j++)
            if (exponents[i * exponent_width + j / 8] >> j % 8 & 1) {
                PyErr_SetString(PyExc_ValueError, "an exponent is longer than the table");
                goto done;
            }
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ifma_table_powers(t->table, exponents, (size_t)count, (size_t)exponent_width,
                               b[2].buf, masked, b[1].buf);
    Py_END_ALLOW_THREADS
    result = none_or_error(status);
done:
    release_all(b, 3);
    return result;
}

/* --- the module -----------------------------------------------------------------------------*/

static PyMethodDef modulus_methods[] = {
    {"element_bytes", element_bytes, METH_NOARGS, NULL},
    {"product", product, METH_VARARGS, NULL},
    {"running", running, METH_VARARGS, NULL},
    {"unwind", unwind, METH_VARARGS, NULL},
    {"add_blocks", add_blocks, METH_VARARGS, NULL},
    {"check", check, METH_VARARGS, NULL},
    {"logarithms", logarithms, METH_VARARGS, NULL},
    {"shared_base_powers", shared_base_powers, METH_VARARGS, NULL},
    {"secret_powers", secret_powers, METH_VARARGS, NULL},
    {"weighted_products", weighted_products, METH_VARARGS, NULL},
    {"table", table, METH_VARARGS, NULL},
    {0},
};

static PyType_Slot modulus_slots[] = {
    {Py_tp_new, modulus_new},
    {Py_tp_dealloc, modulus_dealloc},
    {Py_tp_methods, modulus_methods},
    {0},
};

static PyType_Spec modulus_spec = {
    .name = "dtl.core.crypto._kernel.Modulus",
    .basicsize = sizeof(Modulus),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = modulus_slots,
};

static PyMethodDef table_methods[] = {
    {"fill", fill, METH_VARARGS, NULL},
    {"powers", powers, METH_VARARGS, NULL},
    {0},
};

static PyType_Slot table_slots[] = {
    {Py_tp_dealloc, table_dealloc},
    {Py_tp_methods, table_methods},
    {0},
};

static PyType_Spec table_spec = {
    .name = "dtl.core.crypto._kernel.Table",
    .basicsize = sizeof(Table),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = table_slots,
};

#else

typedef struct {
    PyTypeObject *modulus_type, *table_type;
} State;

#endif

static PyObject *unavailable(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    const char *reason = ifma_unavailable();
    if (!reason)
        Py_RETURN_NONE;
    return PyUnicode_FromString(reason);
}

static PyObject *radix_bits(PyObject *module, PyObject *args)
{
    (void)module;
    Py_ssize_t width;
    if (!PyArg_ParseTuple(args, "n", &width) ||
        !in_range(width, IFMA_MIN_WIDTH, IFMA_MAX_WIDTH, "width of the modulus"))
        return NULL;
    return PyLong_FromSize_t(ifma_radix_bits((size_t)width));
}

static PyMethodDef functions[] = {
    {"unavailable", unavailable, METH_NOARGS, NULL},
    {"radix_bits", radix_bits, METH_VARARGS, NULL},
    {0},
};

static int set_up(PyObject *module)
{
#if IFMA_BUILT
    State *state = PyModule_GetState(module);
    state->modulus_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &modulus_spec, NULL);
    if (!state->modulus_type)
        return -1;
    state->table_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &table_spec, NULL);
    if (!state->table_type)
        return -1;
    if (PyModule_AddType(module, state->modulus_type) < 0)
        return -1;
#endif
    if (PyModule_AddIntConstant(module, "MIN_WIDTH", IFMA_MIN_WIDTH) < 0)
        return -1;
    return PyModule_AddIntConstant(module, "MAX_WIDTH", IFMA_MAX_WIDTH);
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->modulus_type);
    Py_VISIT(state->table_type);
    return 0;
}

static int clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->modulus_type);
    Py_CLEAR(state->table_type);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, set_up},
    {0},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "dtl.core.crypto._kernel",
    .m_size = sizeof(State),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
};

PyMODINIT_FUNC PyInit__kernel(void)
{
    return PyModuleDef_Init(&definition);
}
