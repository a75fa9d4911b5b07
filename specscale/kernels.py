"""The CUDA kernels of the grouped step, in Triton; `specscale.grouped` says what they are for, and launches them.

Each spectral kernel does what a function of `specscale.block` does. Arithmetic is in float32, products by tensor cores
in three parts each (`tf32x3`, as accurate as float32), whatever torch's switches say. Partial sums are added in a fixed
order.
"""

import torch
import triton
import triton.language as tl

from specscale.block import CANCELLATION, CAUTION, CAUTION_OF_ALL, DEPENDENT, NOISE, ROUNDING, ROUNDS, SQUARINGS
from specscale.lowering import GROWING, NUM_GROWING, NUM_ROOT, NUM_SETTLING, SAFETY

# A row of the table, int64.
FIELDS = tl.constexpr(40)
WEIGHT, M_, N_, MODE = (tl.constexpr(i) for i in range(4))
"""The matrix as `A (M, N)`, `M >= N`: its address, and how its tiles are read."""
I_LENGTH, I_OUTER, I_INNER, J_LENGTH, J_OUTER, J_INNER = (tl.constexpr(i) for i in range(4, 10))
"""Row `i` lies `(i // I_LENGTH) * I_OUTER + (i % I_LENGTH) * I_INNER` elements behind the first; columns likewise."""
BASIS, ORDER_LENGTH, ORDER_STRIDE = (tl.constexpr(i) for i in range(10, 13))
"""Column `j` has row `(j % ORDER_LENGTH) * ORDER_STRIDE + j // ORDER_LENGTH` of the block: the weight's own order."""
V_, Y_, R_, T_, PRODUCTS, GRAM_V, GRAM_Y, SMALL = (tl.constexpr(i) for i in range(13, 21))
"""Scratch: blocks, images, residuals, their images, partial sums, and small matrices."""
NUM_I, NUM_J, NUM_CHUNKS, IS_EXACT = (tl.constexpr(i) for i in range(21, 25))
TARGET, SKIP_MASK, NORM, RESIDUAL, ERROR, INDEX, AGE, STATS, NUM_MATRICES = (tl.constexpr(i) for i in range(25, 34))
NUM_TILES, PARTIAL_SQUARES, WEIGHT_NUMBER, NORM_BEFORE = (tl.constexpr(i) for i in range(34, 38))

# Offsets in a matrix's small scratch.
SQUARES, FRAME_Y, FRAME_S, GRAM, LENGTHS, OF_BASIS, OF_IMAGES = (
    tl.constexpr(i) for i in (0, 256, 1280, 2304, 3328, 3344, 3856)
)
REST, OF_CHANGE = tl.constexpr(4368), tl.constexpr(4624)
"""The Gram matrix of the residuals outside the block; `[Y, T] OF_CHANGE` times the block is added to the weight."""
STEP, FACTOR, IS_KEPT, IS_DONE, COUNT = (tl.constexpr(i) for i in range(5136, 5141))
"""The length of the update, zero where nothing changes; the factor on the weight; whether the new block is kept;
whether the matrix needs no further iteration in this step, and how many it has taken."""
SMALL_SIZE = 5141
GRAM_V_SIZE, GRAM_Y_SIZE = 768, 512
"""A tile's part of Gram matrices: that of `[V, R]`; and first `Y^T Y`, later `[Y, T]^T T`."""
_GRAM_V_SIZE, _GRAM_Y_SIZE = tl.constexpr(GRAM_V_SIZE), tl.constexpr(GRAM_Y_SIZE)

MOVE_FIRST, LOWER, SCALE, SCALE_DOWN = (tl.constexpr(i) for i in range(4))
"""What is done to a weight: `Spectral`, `Cap`, and `Normalize` with both sides or one."""

SIDE = 128
"""Rows and columns of a tile of the weight that one program updates, `STRIP` at a time."""
_SIDE, STRIP = tl.constexpr(SIDE), tl.constexpr(16)
_NOISE, _ROUNDS, _SQUARINGS = tl.constexpr(NOISE), tl.constexpr(ROUNDS), tl.constexpr(SQUARINGS)
_CAUTION, _CAUTION_OF_ALL, _SAFETY = tl.constexpr(CAUTION), tl.constexpr(CAUTION_OF_ALL), tl.constexpr(SAFETY)
_GROW_1, _GROW_3, _GROW_5 = (tl.constexpr(factor) for factor in GROWING)
_NUM_GROWING, _NUM_SETTLING, _NUM_ROOT = tl.constexpr(NUM_GROWING), tl.constexpr(NUM_SETTLING), tl.constexpr(NUM_ROOT)
_ROUNDING, _CANCELLATION, _DEPENDENT = tl.constexpr(ROUNDING), tl.constexpr(CANCELLATION), tl.constexpr(DEPENDENT)
PRECISION = tl.constexpr("tf32x3")
EPS = tl.constexpr(torch.finfo(torch.float32).eps)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

COLUMNS_CONTIGUOUS, ROWS_CONTIGUOUS, STRIDED = (tl.constexpr(i) for i in range(3))
"""How a tile is read: 16 bytes at a time along its columns or rows, or element by element at any strides."""


@triton.jit
def _floats(address):
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _float(address):
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def _scale(row):
    """A power of two near the norm of the step before, which keeps squares in float32's range."""
    norm = tl.load(_float(tl.load(row + NORM)))
    # The exponent's bits; zero, infinity and NaN have none of these.
    exponent = (norm.to(tl.int32, bitcast=True) >> 23) & 0xFF
    known = (exponent > 0) & (exponent < 255)
    exponent = tl.where(known, tl.minimum(tl.maximum(exponent, 27), 227), 127)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _offset(index, length, outer, inner):
    """Where an index of two levels lies. Divisions are of 32 bits: those of 64 are calls of a function."""
    length = length.to(tl.int32)
    return (index // length) * outer + (index % length) * inner


@triton.jit
def _parts(x):
    """`x` as a sum of two numbers for tensor cores: the nearest one of TF32's 11 binary digits, and the rest."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _add_product(acc, a, b):
    """`acc + a b` by three products, as `tf32x3` does it, but with fewer passes of `a` through shared memory.

    Tensor cores cut off what they add up, so the sum over blocks must not be theirs (Ootomo & Yokota, "Recovering
    single precision accuracy from tensor cores while surpassing the FP32 theoretical peak performance", 2022).
    """
    a_high, a_low = _parts(a)
    b_high, b_low = _parts(b)
    product = tl.dot(a_low, b_high, input_precision="tf32")
    product = tl.dot(a_high, b_low, product, input_precision="tf32")
    return acc + tl.dot(a_high, b_high, product, input_precision="tf32")


@triton.jit
def _product(
    row, out, start, stop, x, x_length, x_stride, IS_ORDERED: tl.constexpr,
    OUT_SIZE: tl.constexpr, OUT_LENGTH: tl.constexpr, OUT_OUTER: tl.constexpr, OUT_INNER: tl.constexpr,
    SUM_LENGTH: tl.constexpr, SUM_OUTER: tl.constexpr, SUM_INNER: tl.constexpr,
    OUT_CONTIGUOUS: tl.constexpr, SUM_CONTIGUOUS: tl.constexpr,
    DTYPE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`sum over start <= s < stop of A[out, s] X[s]`, unscaled, `(TILE, 16)`; for `A^T`, the sides change places.

    Row `s` of `X` is the one that the weight's own order has there, unless `IS_ORDERED`.
    """
    # Hints go on values in the function that loads: on what a helper returns they are lost.
    a = tl.load(row + WEIGHT).to(tl.pointer_type(DTYPE))
    a16 = tl.multiple_of(a, 16)
    mode = tl.load(row + MODE)
    out_size = tl.load(row + OUT_SIZE)
    c = tl.arange(0, 16)
    acc = tl.zeros((TILE, 16), tl.float32)

    # One of three loops runs. In branches of an `if`, they would not share their memory.
    stride = tl.multiple_of(tl.load(row + OUT_INNER), VECTOR)
    # A multiple of VECTOR that the compiler can see: a hint on an argument is lost.
    end = (stop // VECTOR) * VECTOR
    rows, has_row = a16 + out[:, None] * stride, out[:, None] < out_size
    for first in range(start, tl.where(mode == SUM_CONTIGUOUS, stop, start), DEPTH):
        s = first + tl.arange(0, DEPTH)
        tile = tl.load(rows + s[None, :], mask=has_row & (s[None, :] < end), other=0.0).to(tl.float32)
        at = s if IS_ORDERED else (s % x_length) * x_stride + s // x_length
        columns = tl.load(x + at[:, None] * 16 + c[None, :], mask=s[:, None] < stop, other=0.0)
        acc = _add_product(acc, tile, columns)

    # The product of the transposes: Triton 3.6 reads a tile that is transposed after its load 4 bytes at a time.
    across = tl.zeros((16, TILE), tl.float32)
    stride = tl.multiple_of(tl.load(row + SUM_INNER), VECTOR)
    end = (out_size // VECTOR) * VECTOR
    rows, has_row = a16 + out[None, :], out[None, :] < end
    for first in range(start, tl.where(mode == OUT_CONTIGUOUS, stop, start), DEPTH):
        s = first + tl.arange(0, DEPTH)
        tile = tl.load(rows + s[:, None] * stride, mask=has_row & (s[:, None] < stop), other=0.0).to(tl.float32)
        at = s if IS_ORDERED else (s % x_length) * x_stride + s // x_length
        columns = tl.load(x + at[:, None] * 16 + c[None, :], mask=s[:, None] < stop, other=0.0)
        across = _add_product(across, tl.trans(columns), tile)

    out_at = _offset(out, tl.load(row + OUT_LENGTH), tl.load(row + OUT_OUTER), tl.load(row + OUT_INNER))
    length, outer, inner = tl.load(row + SUM_LENGTH), tl.load(row + SUM_OUTER), tl.load(row + SUM_INNER)
    rows, has_row = a + out_at[:, None], out[:, None] < out_size
    for first in range(start, tl.where(mode == STRIDED, stop, start), DEPTH):
        s = first + tl.arange(0, DEPTH)
        sum_at = _offset(s, length, outer, inner)
        tile = tl.load(rows + sum_at[None, :], mask=has_row & (s[None, :] < stop), other=0.0).to(tl.float32)
        at = s if IS_ORDERED else (s % x_length) * x_stride + s // x_length
        columns = tl.load(x + at[:, None] * 16 + c[None, :], mask=s[:, None] < stop, other=0.0)
        acc = _add_product(acc, tile, columns)
    return acc + tl.trans(across)


@triton.jit
def _columns(address, index, size):
    """Rows of a block `(size, 16)`; zero behind its end."""
    c = tl.arange(0, 16)
    return tl.load(_floats(address) + index[:, None] * 16 + c[None, :], mask=index[:, None] < size, other=0.0)


@triton.jit
def _store_columns(address, index, size, values):
    c = tl.arange(0, 16)
    tl.store(_floats(address) + index[:, None] * 16 + c[None, :], values, mask=index[:, None] < size)


@triton.jit
def _store_gram(address, SIDE: tl.constexpr, values):
    """A block `(16, 16)` of a matrix with `SIDE` columns."""
    r, c = tl.arange(0, 16), tl.arange(0, 16)
    tl.store(address + r[:, None] * SIDE + c[None, :], values)


@triton.jit
def _store_frame(address, head, across, tail):
    """The matrix `[[head, across], [0, tail]]`, `(32, 32)`."""
    _store_gram(address, 32, head)
    _store_gram(address + 16, 32, across)
    _store_gram(address + 512, 32, tl.zeros((16, 16), tl.float32))
    _store_gram(address + 528, 32, tail)


@triton.jit
def _matrix(address, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return tl.load(address + r[:, None] * COLUMNS + c[None, :])


@triton.jit
def _sum_of_parts(address, count, ROWS: tl.constexpr, STRIDE: tl.constexpr):
    """The sum of `count` matrices `(ROWS, 16)`, `STRIDE` apart, in a fixed order."""
    p, r, c = tl.arange(0, 8), tl.arange(0, ROWS), tl.arange(0, 16)
    at = p[:, None, None] * STRIDE + r[None, :, None] * 16 + c[None, None, :]
    total = tl.zeros((8, ROWS, 16), tl.float32)
    for first in range(0, count, 8):
        mask = (first + p < count)[:, None, None]
        total += tl.load(address + first * STRIDE + at, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _sums_of_three_parts(address, count, STRIDE: tl.constexpr):
    """The sums of `count` times three matrices `(16, 16)`, one behind another: loads of all three are under way."""
    p, r, c = tl.arange(0, 8), tl.arange(0, 16), tl.arange(0, 16)
    at = p[:, None, None] * STRIDE + r[None, :, None] * 16 + c[None, None, :]
    one = tl.zeros((8, 16, 16), tl.float32)
    two, three = one, one
    for first in range(0, count, 8):
        mask = (first + p < count)[:, None, None]
        part = address + first * STRIDE + at
        one += tl.load(part, mask=mask, other=0.0)
        two += tl.load(part + 256, mask=mask, other=0.0)
        three += tl.load(part + 512, mask=mask, other=0.0)
    return tl.sum(one, axis=0), tl.sum(two, axis=0), tl.sum(three, axis=0)


@triton.jit
def _hash32(x):
    """`specscale.random`'s hash."""
    x = (x ^ (x >> 32)) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


@triton.jit
def images(table, row_tiles, column_tiles, num_row_tiles, DTYPE: tl.constexpr, VECTOR: tl.constexpr,
            TILE: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """`Y = A V` with parts of `Y^T Y`; the last programs copy the block into scratch, in the order of the columns."""
    pid = tl.program_id(0)
    if pid < num_row_tiles:
        row = table + tl.load(row_tiles + 2 * pid) * FIELDS
        t = tl.load(row_tiles + 2 * pid + 1)
        i = t * TILE + tl.arange(0, TILE)
        n = tl.load(row + N_).to(tl.int32)
        length, stride = tl.load(row + ORDER_LENGTH).to(tl.int32), tl.load(row + ORDER_STRIDE).to(tl.int32)
        y = _product(
            row, i, 0, n, _floats(tl.load(row + BASIS)), length, stride, False,
            M_, I_LENGTH, I_OUTER, I_INNER, J_LENGTH, J_OUTER, J_INNER, ROWS_CONTIGUOUS, COLUMNS_CONTIGUOUS,
            DTYPE, VECTOR, TILE, DEPTH,
        )  # fmt: skip
        y = y * _scale(row)[1]
        _store_columns(tl.load(row + Y_), i, tl.load(row + M_), y)
        part = _floats(tl.load(row + GRAM_Y)) + t * _GRAM_Y_SIZE
        _store_gram(part, 16, tl.dot(tl.trans(y), y, input_precision=PRECISION))
    else:
        pid -= num_row_tiles
        row = table + tl.load(column_tiles + 2 * pid) * FIELDS
        j = tl.load(column_tiles + 2 * pid + 1) * TILE + tl.arange(0, TILE)
        n = tl.load(row + N_).to(tl.int32)
        length, stride = tl.load(row + ORDER_LENGTH).to(tl.int32), tl.load(row + ORDER_STRIDE).to(tl.int32)
        at = (j % length) * stride + j // length
        c = tl.arange(0, 16)
        v = tl.load(_floats(tl.load(row + BASIS)) + at[:, None] * 16 + c[None, :], mask=j[:, None] < n, other=0.0)
        _store_columns(tl.load(row + V_), j, n, v)


@triton.jit
def products(table, chunks, FIRST: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr,
              DEPTH: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """`A^T Y`, in parts of `CHUNK` rows each."""
    pid = tl.program_id(0)
    row = table + tl.load(chunks + 3 * pid) * FIELDS
    if FIRST or tl.load(_floats(tl.load(row + SMALL)) + IS_DONE) == 0:
        j = tl.load(chunks + 3 * pid + 1) * TILE + tl.arange(0, TILE)
        chunk = tl.load(chunks + 3 * pid + 2)
        m, n = tl.load(row + M_).to(tl.int32), tl.load(row + N_)
        stop = tl.minimum(m, (chunk + 1) * CHUNK)
        product = _product(
            row, j, chunk * CHUNK, stop, _floats(tl.load(row + Y_)), 0, 0, True,
            N_, J_LENGTH, J_OUTER, J_INNER, I_LENGTH, I_OUTER, I_INNER, COLUMNS_CONTIGUOUS, ROWS_CONTIGUOUS,
            DTYPE, VECTOR, TILE, DEPTH,
        )  # fmt: skip
        _store_columns(tl.load(row + PRODUCTS) + chunk * n * 64, j, n, product * _scale(row)[1])


@triton.jit
def residuals(table, column_tiles, FIRST: tl.constexpr, TILE: tl.constexpr):
    """`R = A^T Y - V (Y^T Y)`, with noise in its last column once, and parts of the Gram matrix of `[V, R]`."""
    pid = tl.program_id(0)
    row = table + tl.load(column_tiles + 2 * pid) * FIELDS
    small = _floats(tl.load(row + SMALL))
    if FIRST or tl.load(small + IS_DONE) == 0:
        t = tl.load(column_tiles + 2 * pid + 1)
        j = t * TILE + tl.arange(0, TILE)
        n = tl.load(row + N_)
        c = tl.arange(0, 16)
        if FIRST:
            squares = _sum_of_parts(_floats(tl.load(row + GRAM_Y)), tl.load(row + NUM_I), 16, _GRAM_Y_SIZE)
            if t == 0:
                _store_gram(small + SQUARES, 16, squares)
        else:
            squares = _matrix(small + SQUARES, 16, 16)
        if tl.load(row + IS_EXACT) != 0:
            _store_columns(tl.load(row + R_), j, n, tl.where(j[:, None] == c[None, :] + 16, 1.0, 0.0))
        else:
            v = _columns(tl.load(row + V_), j, n)
            r = tl.zeros((TILE, 16), tl.float32)
            for chunk in range(0, tl.load(row + NUM_CHUNKS)):
                r += _columns(tl.load(row + PRODUCTS) + chunk * n * 64, j, n)
            r -= tl.dot(v, squares, input_precision=PRECISION)
            if FIRST:
                q = tl.arange(0, 16)
                largest = tl.max(tl.max(tl.where(q[:, None] == c[None, :], squares, 0.0), axis=1), axis=0)
                length = largest * _NOISE / tl.sqrt(n.to(tl.float32))
                key = tl.load(row + INDEX) + ((tl.load(_float(tl.load(row + AGE))) + 0.5).to(tl.int64) << 32)
                order = tl.load(row + ORDER_LENGTH)
                at = (j % order) * tl.load(row + ORDER_STRIDE) + j // order
                sign = 1 - (_hash32(_hash32(key) + at) & 1) * 2
                r += tl.where((c[None, :] == 15) & (j[:, None] < n), length * sign.to(tl.float32)[:, None], 0.0)
            _store_columns(tl.load(row + R_), j, n, r)
            part = _floats(tl.load(row + GRAM_V)) + t * _GRAM_V_SIZE
            _store_gram(part, 16, tl.dot(tl.trans(v), v, input_precision=PRECISION))
            _store_gram(part + 256, 16, tl.dot(tl.trans(v), r, input_precision=PRECISION))
            _store_gram(part + 512, 16, tl.dot(tl.trans(r), r, input_precision=PRECISION))


@triton.jit
def sum_products(table, totals, column_tiles, FIRST: tl.constexpr, TILE: tl.constexpr):
    """The sums of this process's parts of `A^T Y`, and at first of `Y^T Y`, where those of all processes are added."""
    pid = tl.program_id(0)
    number = tl.load(column_tiles + 2 * pid)
    row, total = table + number * FIELDS, totals + number * FIELDS
    if FIRST or tl.load(_floats(tl.load(row + SMALL)) + IS_DONE) == 0:
        t = tl.load(column_tiles + 2 * pid + 1)
        if FIRST and t == 0:
            squares = _sum_of_parts(_floats(tl.load(row + GRAM_Y)), tl.load(row + NUM_I), 16, _GRAM_Y_SIZE)
            _store_gram(_floats(tl.load(total + GRAM_Y)), 16, squares)
        if tl.load(row + IS_EXACT) == 0:
            j = t * TILE + tl.arange(0, TILE)
            n = tl.load(row + N_)
            product = tl.zeros((TILE, 16), tl.float32)
            for chunk in range(0, tl.load(row + NUM_CHUNKS)):
                product += _columns(tl.load(row + PRODUCTS) + chunk * n * 64, j, n)
            _store_columns(tl.load(total + PRODUCTS), j, n, product)


@triton.jit
def sum_grams(table, totals, FIRST: tl.constexpr):
    """The sums of this process's parts of `[Y, T]^T T`, where those of all processes are added."""
    row, total = table + tl.program_id(0) * FIELDS, totals + tl.program_id(0) * FIELDS
    if FIRST or tl.load(_floats(tl.load(row + SMALL)) + IS_DONE) == 0:
        right = _sum_of_parts(_floats(tl.load(row + GRAM_Y)), tl.load(row + NUM_I), 32, _GRAM_Y_SIZE)
        d, c = tl.arange(0, 32), tl.arange(0, 16)
        tl.store(_floats(tl.load(total + GRAM_Y)) + d[:, None] * 16 + c[None, :], right)


@triton.jit
def _eliminated(square, shift):
    """`L^-1` of the Cholesky factor `L` of `square + shift`, `(16, 16)`, and the squares of `L`'s diagonal.

    By elimination in `[square, 1]`. The diagonal comes along both axes: one dimension of a tile cannot be used as the
    other.
    """
    r, c = tl.arange(0, 16), tl.arange(0, 16)
    inverse = tl.where(r[:, None] == c[None, :], 1.0, 0.0)
    square = square + shift * inverse
    pivots, pivots_across = tl.zeros((16,), tl.float32), tl.zeros((16,), tl.float32)
    for k in range(16):
        line = tl.sum(tl.where(r[:, None] == k, square, 0.0), axis=0)
        own = tl.sum(tl.where(r[:, None] == k, inverse, 0.0), axis=0)
        column = tl.sum(tl.where(c[None, :] == k, square, 0.0), axis=1)
        pivot = tl.maximum(tl.sum(tl.where(c == k, line, 0.0), axis=0), 1e-12)
        factors = tl.where(r > k, column / pivot, 0.0)
        square -= factors[:, None] * line[None, :]
        inverse = tl.where(r[:, None] == k, own[None, :] / tl.sqrt(pivot), inverse - factors[:, None] * own[None, :])
        pivots, pivots_across = tl.where(r == k, pivot, pivots), tl.where(c == k, pivot, pivots_across)
    return inverse, pivots, pivots_across


@triton.jit
def _eliminated_where(normalized, exists, exists_across, eye):
    """`_eliminated` for `block._shifted_factor`."""
    square = tl.where(exists[:, None] & exists_across[None, :], normalized, 0.0)
    return _eliminated(square + tl.where(exists, 0.0, 1.0)[:, None] * eye, 1e-5)


@triton.jit
def orthogonalize(table, FIRST: tl.constexpr):
    """The frame in which `[V, R]` is orthonormal: `block.orthogonalize`."""
    row = table + tl.program_id(0) * FIELDS
    small = _floats(tl.load(row + SMALL))
    if FIRST or tl.load(small + IS_DONE) == 0:
        r, c = tl.arange(0, 16), tl.arange(0, 16)
        eye = tl.where(r[:, None] == c[None, :], 1.0, 0.0)
        zero = tl.zeros((16, 16), tl.float32)
        if tl.load(row + IS_EXACT) != 0:
            for k in range(3):
                _store_frame(small + FRAME_Y + 1024 * k, eye, zero, eye)
            tl.store(small + LENGTHS + c, tl.zeros((16,), tl.float32))
        else:
            vv, vr, rr = _sums_of_three_parts(_floats(tl.load(row + GRAM_V)), tl.load(row + NUM_J), _GRAM_V_SIZE)
            inverse, _, _ = _eliminated(vv, 0.0)
            overlap = tl.dot(inverse, vr, input_precision="ieee")
            L = tl.trans(inverse)
            rest = rr - tl.dot(tl.trans(overlap), overlap, input_precision="ieee")
            largest = tl.max(tl.max(_matrix(small + SQUARES, 16, 16) * eye, axis=1), axis=0)
            squares, squares_across = tl.sum(rest * eye, axis=1), tl.sum(rest * eye, axis=0)
            least = largest * (_ROUNDING * EPS)
            least = least * least
            exists = squares > tl.maximum(least, tl.sum(rr * eye, axis=1) * _CANCELLATION)
            exists_across = squares_across > tl.maximum(least, tl.sum(rr * eye, axis=0) * _CANCELLATION)
            scales = tl.where(exists, 1.0 / tl.sqrt(tl.where(exists, squares, 1.0)), 0.0)
            scales_across = tl.where(exists_across, 1.0 / tl.sqrt(tl.where(exists_across, squares_across, 1.0)), 0.0)
            normalized = scales[:, None] * rest * scales_across[None, :]
            _, pivots, pivots_across = _eliminated_where(normalized, exists, exists_across, eye)
            exists = exists & (pivots > _DEPENDENT) & (pivots * squares > least)
            exists_across = exists_across & (pivots_across > _DEPENDENT) & (pivots_across * squares_across > least)
            inverse, _, _ = _eliminated_where(normalized, exists, exists_across, eye)
            M = scales[:, None] * tl.trans(inverse) * tl.where(exists_across, 1.0, 0.0)[None, :]
            K = tl.dot(L, tl.dot(overlap, M, input_precision="ieee"), input_precision="ieee")
            gram = tl.dot(tl.trans(M), tl.dot(rest, M, input_precision="ieee"), input_precision="ieee")
            _store_gram(small + REST, 16, rest)
            _store_frame(small + FRAME_Y, L, zero, eye)
            _store_frame(small + FRAME_S, L, -K, M)
            _store_frame(small + GRAM, eye, zero, gram)
            tl.store(small + LENGTHS + r, tl.sqrt(tl.maximum(squares, 0.0)))


@triton.jit
def images_of_rest(table, row_tiles, FIRST: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr,
                    TILE: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """`T = (A R) M - Y K`, and parts of `[Y, T]^T T`."""
    pid = tl.program_id(0)
    row = table + tl.load(row_tiles + 2 * pid) * FIELDS
    small = _floats(tl.load(row + SMALL))
    if FIRST or tl.load(small + IS_DONE) == 0:
        t = tl.load(row_tiles + 2 * pid + 1)
        i = t * TILE + tl.arange(0, TILE)
        m, n = tl.load(row + M_), tl.load(row + N_).to(tl.int32)
        image = _product(
            row, i, 0, n, _floats(tl.load(row + R_)), 0, 0, True,
            M_, I_LENGTH, I_OUTER, I_INNER, J_LENGTH, J_OUTER, J_INNER, ROWS_CONTIGUOUS, COLUMNS_CONTIGUOUS,
            DTYPE, VECTOR, TILE, DEPTH,
        )  # fmt: skip
        r, c = tl.arange(0, 16), tl.arange(0, 16)
        minus_K = tl.load(small + FRAME_S + r[:, None] * 32 + c[None, :] + 16)
        M = tl.load(small + FRAME_S + r[:, None] * 32 + c[None, :] + 528)
        y = _columns(tl.load(row + Y_), i, m)
        image = tl.dot(image * _scale(row)[1], M, input_precision=PRECISION)
        image += tl.dot(y, minus_K, input_precision=PRECISION)
        _store_columns(tl.load(row + T_), i, m, image)
        part = _floats(tl.load(row + GRAM_Y)) + t * _GRAM_Y_SIZE
        _store_gram(part, 16, tl.dot(tl.trans(y), image, input_precision=PRECISION))
        _store_gram(part + 256, 16, tl.dot(tl.trans(image), image, input_precision=PRECISION))


@triton.jit
def _trace_one(square, eye):
    return square / tl.maximum(tl.sum(tl.sum(square * eye, axis=1), axis=0), TINY)


@triton.jit
def _dominant_vector(power, eye, c, NUM_SQUARINGS: tl.constexpr):
    """`block._dominant_vector`, along the rows; `c` numbers the columns."""
    for _ in range(NUM_SQUARINGS // 4):
        for _ in range(4):
            power = tl.dot(power, power, input_precision=PRECISION)
        power = _trace_one(power, eye)
    # Of NaN, any column.
    diagonal = tl.sum(power * eye, axis=1)
    largest = tl.argmax(tl.where(diagonal == diagonal, diagonal, -1.0), axis=0)
    vector = tl.sum(tl.where(c[None, :] == largest, power, 0.0), axis=1)
    return vector / tl.sqrt(tl.maximum(tl.sum(vector * vector, axis=0), TINY))


@triton.jit
def _is_off(row, skip):
    """Whether nothing of the matrix must change, its state included."""
    return tl.load(skip + tl.load(row + WEIGHT_NUMBER)) > 0


@triton.jit
def _is_skipped(row, value):
    """Whether a matrix of this norm must not change."""
    is_finite = (value >= 0) & (value < float("inf"))
    return (tl.load(_float(tl.load(row + SKIP_MASK))) > 0) | (value == 0) | (is_finite == 0)


@triton.jit
def _report(row, is_off, norm_before, norm, residual, error, count):
    """Write the buffers of a matrix, where it is not off, and its stats."""
    if is_off == 0:
        tl.store(_float(tl.load(row + NORM_BEFORE)), norm_before)
        tl.store(_float(tl.load(row + NORM)), norm)
        tl.store(_float(tl.load(row + RESIDUAL)), residual)
        tl.store(_float(tl.load(row + ERROR)), error)
    stats = _float(tl.load(row + STATS))
    tl.store(stats, norm)
    tl.store(stats + tl.load(row + NUM_MATRICES), error)
    tl.store(stats + 2 * tl.load(row + NUM_MATRICES), count)


@triton.jit
def _orthonormal(X, d):
    """The columns of `X (32, 16)`, which `d` numbers, made orthonormal from the first to the last."""
    for k in range(16):
        column = tl.sum(tl.where(d[None, :] == k, X, 0.0), axis=1)
        along = tl.sum(X * column[:, None], axis=0)
        square = tl.maximum(tl.sum(tl.where(d == k, along, 0.0), axis=0), TINY)
        X -= tl.where(d[None, :] > k, column[:, None] * (along / square)[None, :], 0.0)
    return X / tl.sqrt(tl.maximum(tl.sum(X * X, axis=0), TINY))[None, :]


@triton.jit
def _norm_from_gram(square, eye):
    """`linalg.norm_from_gram`."""
    trace = tl.maximum(tl.sum(tl.sum(square * eye, axis=1), axis=0), TINY)
    power = square / trace
    for _ in range(3):
        power = tl.dot(power, power, input_precision=PRECISION)
    return tl.sqrt(trace * tl.exp(tl.log(tl.maximum(tl.sum(tl.sum(power * eye, axis=1), axis=0), TINY)) / 8))


@triton.jit
def _excess_part(relative, eye):
    """`lowering._excess_part_by_products`."""
    above = relative - eye
    length = tl.maximum(tl.sqrt(tl.sum(tl.sum(above * above, axis=1), axis=0)), TINY)
    sign = above / length
    for _ in range(_NUM_GROWING):
        square = tl.dot(sign, sign, input_precision=PRECISION)
        grown = eye * _GROW_1 + tl.dot(square, eye * _GROW_3 + square * _GROW_5, input_precision=PRECISION)
        sign = tl.dot(sign, grown, input_precision=PRECISION)
    for _ in range(_NUM_SETTLING):
        settled = 1.5 * eye - 0.5 * tl.dot(sign, sign, input_precision=PRECISION)
        sign = tl.dot(sign, settled, input_precision=PRECISION)
    larger = eye + 0.5 * (above + tl.dot(above, sign, input_precision=PRECISION))
    larger = 0.5 * (larger + tl.trans(larger))
    length = tl.sqrt(tl.sum(tl.sum(larger * larger, axis=1), axis=0))
    root, inverse = larger / length, eye
    for _ in range(_NUM_ROOT):
        step = 1.5 * eye - 0.5 * tl.dot(inverse, root, input_precision=PRECISION)
        root = tl.dot(root, step, input_precision=PRECISION)
        inverse = tl.dot(step, inverse, input_precision=PRECISION)
    return eye - inverse / tl.sqrt(length)


@triton.jit(do_not_specialize_on_alignment=["skip"])
def rayleigh_ritz(table, skip, tolerance, FIRST: tl.constexpr, LAST: tl.constexpr, MAP: tl.constexpr):
    """`block.rayleigh_ritz`; where the error is small enough, the length of the update and what is reported."""
    row = table + tl.program_id(0) * FIELDS
    small = _floats(tl.load(row + SMALL))
    if FIRST or tl.load(small + IS_DONE) == 0:
        is_exact = tl.load(row + IS_EXACT) != 0
        # Early: other warps must have read it before one of them writes it.
        count = 1.0 if FIRST else tl.load(small + COUNT) + 1
        r, c = tl.arange(0, 32), tl.arange(0, 32)
        q, d = tl.arange(0, 16), tl.arange(0, 16)
        eye = tl.where(r[:, None] == c[None, :], 1.0, 0.0)
        eye16 = tl.where(q[:, None] == d[None, :], 1.0, 0.0)
        frame = _matrix(small + FRAME_Y, 32, 32)
        G = _matrix(small + GRAM, 32, 32)
        # [Y, T]^T [Y, T]: the right half is a sum of parts, the upper left corner is known.
        right = _sum_of_parts(_floats(tl.load(row + GRAM_Y)), tl.load(row + NUM_I), 32, _GRAM_Y_SIZE)
        to_the_right = tl.where(c[None, :] == q[:, None] + 16, 1.0, 0.0)
        H = tl.dot(right, to_the_right, input_precision="ieee")
        is_corner = (r[:, None] < 16) & (c[None, :] < 16)
        corner = tl.load(small + SQUARES + r[:, None] * 16 + c[None, :], mask=is_corner, other=0.0)
        H = H + tl.where(c[None, :] < 16, tl.trans(H), 0.0) + corner
        H = tl.dot(tl.trans(frame), tl.dot(H, frame, input_precision=PRECISION), input_precision=PRECISION)
        root = 1.5 * eye - 0.5 * G
        square = tl.dot(root, tl.dot(H, root, input_precision=PRECISION), input_precision=PRECISION)
        square = 0.5 * (square + tl.trans(square))
        square = _trace_one(square + tl.where((r[:, None] == 0) & (c[None, :] == 0), TINY, 0.0), eye)

        # The first vector: a column of a high power.
        first = _dominant_vector(square, eye, c, _SQUARINGS)

        # The subspace: orthogonal iteration.
        along = tl.sum(square * first[:, None], axis=0)
        rayleigh = tl.sum(tl.sum(tl.where(r[:, None] == c[None, :], along[None, :], 0.0), axis=1) * first, axis=0)
        square = square / tl.maximum(rayleigh, TINY)
        shifted = tl.dot(square, square, input_precision=PRECISION) + 0.03 * eye
        power = tl.dot(tl.dot(shifted, shifted, input_precision=PRECISION), shifted, input_precision=PRECISION)
        X = tl.where(r[:, None] == d[None, :], 1.0, 0.0) + tl.where(r[:, None] == d[None, :] + 16, 0.05, 0.0)
        for _ in range(tl.where(is_exact, 2 * _ROUNDS, _ROUNDS)):
            X = _orthonormal(tl.dot(power, X, input_precision=PRECISION), d)
        # In an exact problem nothing is searched.
        is_search = (d[None, :] == 15) & (is_exact == 0)
        X = tl.where(is_search, 0.0, X)

        # The first vector to the front, by a reflection of the columns; the column that searches to the end.
        mirror = tl.sum(X * first[:, None], axis=0)
        mirror = mirror / tl.sqrt(tl.maximum(tl.sum(mirror * mirror, axis=0), TINY))
        front = tl.sum(tl.where(d == 0, mirror, 0.0), axis=0)
        mirror = mirror + tl.where(d == 0, tl.where(front < 0, -1.0, 1.0), 0.0)
        mirror = mirror / tl.sqrt(tl.maximum(tl.sum(mirror * mirror, axis=0), TINY))
        X = X - 2.0 * tl.sum(X * mirror[None, :], axis=1)[:, None] * mirror[None, :]
        X = X - first[:, None] * tl.sum(X * first[:, None], axis=0)[None, :]
        X = tl.where(d[None, :] == 0, first[:, None], X)
        last = tl.where(r == 31, 1.0, 0.0) + tl.where(r == 15, 0.3, 0.0)
        for _ in range(2):
            overlap = tl.sum(X * last[:, None], axis=0)
            last = last - tl.sum(X * overlap[None, :], axis=1)
            last = last / tl.sqrt(tl.maximum(tl.sum(last * last, axis=0), TINY))
        X = tl.where(is_search, last[:, None], X)

        X = tl.dot(root, X, input_precision=PRECISION)
        XGX = tl.dot(tl.trans(X), tl.dot(G, X, input_precision=PRECISION), input_precision=PRECISION)
        X = tl.dot(X, 1.5 * eye16 - 0.5 * XGX, input_precision=PRECISION)
        lengths = tl.sum(X * tl.dot(G, X, input_precision=PRECISION), axis=0)
        squares = tl.dot(tl.trans(X), tl.dot(H, X, input_precision=PRECISION), input_precision=PRECISION)
        o = r[:, None] * 16 + d[None, :]
        tl.store(small + OF_IMAGES + o, tl.dot(frame, X, input_precision=PRECISION))
        basis_frame = _matrix(small + FRAME_S, 32, 32)
        of_basis = tl.dot(basis_frame, X, input_precision=PRECISION)
        tl.store(small + OF_BASIS + o, of_basis)

        # How good it is.
        before = tl.maximum(tl.max(tl.max(_matrix(small + SQUARES, 16, 16) * eye16, axis=1), axis=0), TINY)
        residuals = tl.load(small + LENGTHS + d)
        diagonal = tl.sum(squares * eye16, axis=0)
        values = diagonal / lengths
        top = tl.max(tl.where(d < 15, values, 0.0), axis=0)
        bottom = tl.maximum(tl.min(tl.where(d < 15, values, top), axis=0), 0.0)
        rho = tl.sqrt(tl.sum(tl.where(d < 15, residuals * residuals, 0.0), axis=0) / 15) / before
        gap = tl.maximum(1 - tl.sqrt(bottom) / tl.sqrt(tl.maximum(top, TINY)), TINY)
        error = rho * tl.minimum((rho / gap) * (rho / gap) / (8 if FIRST else 16), 1.0)
        rise = tl.sqrt(tl.maximum(top, TINY)) / tl.sqrt(before) - 1
        if not FIRST:
            error = tl.minimum(error, tl.maximum(rise, EPS) * (count / 2))
        if MAP == LOWER:
            old_diagonal = tl.sum(_matrix(small + SQUARES, 16, 16) * eye16, axis=0)
            before_all = tl.maximum(tl.sum(tl.where(d < 15, old_diagonal, 0.0), axis=0), TINY)
            rise_of_all = (tl.sum(tl.where(d < 15, diagonal, 0.0), axis=0) / before_all - 1) / 2
            error = tl.maximum(error, tl.maximum(rise, rise_of_all * _CAUTION_OF_ALL) * count * _CAUTION)
        of_first = tl.sum(tl.where(d == 0, diagonal, 0.0), axis=0)
        length = tl.sum(tl.where(d == 0, lengths, 0.0), axis=0)
        scaled_value = tl.sqrt(of_first / length)
        scale = _scale(row)[0]
        value = scale * scaled_value
        is_finite = (value >= 0) & (value < float("inf"))
        if LAST | is_exact | (error <= tolerance) | (is_finite == 0):
            tl.store(small + IS_DONE, 1.0)
            rest = tl.where((q[:, None] == 0) | (d[None, :] == 0), 0.0, squares)
            rounding = of_first * (100 * EPS)
            second = _dominant_vector(_trace_one(rest + rounding * eye16, eye16), eye16, d, 8)
            image = tl.sum(rest * second[:, None], axis=0)
            image = tl.sum(tl.where(q[:, None] == d[None, :], image[None, :], 0.0), axis=1)
            next_value = scale * tl.sqrt(tl.maximum(tl.sum(image * second, axis=0), 0.0))

            target = tl.load(_float(tl.load(row + TARGET)))
            is_off = _is_off(row, skip)
            is_skipped = _is_skipped(row, value)
            tl.store(small + IS_KEPT, tl.where(is_finite & (is_off == 0) & (is_exact == 0), 1.0, 0.0))
            if MAP == LOWER:
                is_skipped = is_skipped | (value <= target)
                # What couples the block with the rest, without the column that searches: see `block.Ritz.coupling`.
                kept = tl.dot(tl.where(r[None, :] == q[:, None], 1.0, 0.0), of_basis, input_precision="ieee")
                is_searched = (q[:, None] < 15) & (d[None, :] < 15)
                outside = tl.where(is_searched, _matrix(small + REST, 16, 16), 0.0)
                coupling = tl.dot(outside, kept, input_precision=PRECISION)
                coupling = tl.dot(tl.trans(kept), coupling, input_precision=PRECISION)
                defect = tl.dot(H, X, input_precision=PRECISION) - tl.dot(X, squares, input_precision=PRECISION)
                of_exact = tl.dot(tl.trans(defect), defect, input_precision=PRECISION)
                couples = tl.where(is_exact, of_exact, coupling) * (_SAFETY * _SAFETY)

                # `lowering.lowering`.
                smallest = tl.min(tl.where(d < 15, diagonal, float("inf")), axis=0)
                searched = tl.sum(tl.where(d == 15, diagonal, 0.0), axis=0)
                rest = tl.maximum(tl.maximum(smallest, searched), 0.0)
                least = (target / scale) * (target / scale)
                level = tl.maximum(least, rest + _norm_from_gram(couples, eye16))
                factor = tl.where(level > least, target / scale / tl.sqrt(level), 1.0)
                raised = squares + couples / tl.maximum(level - rest, TINY)
                # Where nothing changes, numbers that may be NaN are not needed.
                part = _excess_part(tl.where(is_skipped, eye16, raised / tl.maximum(level, TINY)), eye16)
                change = tl.dot(frame, tl.dot(X, part, input_precision=PRECISION), input_precision=PRECISION)
                tl.store(small + OF_CHANGE + o, change * (-scale * factor))
                tl.store(small + FACTOR, factor)
                tl.store(small + STEP, tl.where(is_off | is_skipped, 0.0, 1.0))
                norm = tl.where(is_skipped, value, target)
            elif MAP != MOVE_FIRST:
                if MAP == SCALE_DOWN:
                    is_skipped = is_skipped | (value <= target)
                tl.store(small + FACTOR, target / value)
                tl.store(small + STEP, tl.where(is_off | is_skipped, 0.0, 1.0))
                norm = tl.where(is_skipped, value, target)
            else:
                step = (target - value) / (scaled_value * length)
                tl.store(small + STEP, tl.where(is_off | is_skipped, 0.0, step))
                norm = tl.where(is_skipped, value, tl.maximum(target, next_value))
            is_estimate = is_finite & (is_exact == 0)
            residual = tl.sum(tl.where(d == 0, residuals, 0.0), axis=0) / before
            _report(
                row,
                is_off,
                value,
                norm,
                tl.where(is_estimate, residual, 0.0),
                tl.where(is_estimate, error, 0.0),
                tl.where(is_exact, 0.0, count),
            )
            if (is_exact | is_off) == 0:
                age = _float(tl.load(row + AGE))
                tl.store(age, tl.load(age) + 1)
        else:
            tl.store(small + IS_DONE, 0.0)
            tl.store(small + COUNT, count)
            tl.store(small + SQUARES + q[:, None] * 16 + d[None, :], squares)


@triton.jit
def _combined(first, second, index, size, coefficients):
    """Rows of `[first, second] coefficients`."""
    head = _matrix(coefficients, 16, 16)
    tail = _matrix(coefficients + 256, 16, 16)
    head = tl.dot(_columns(first, index, size), head, input_precision=PRECISION)
    return head + tl.dot(_columns(second, index, size), tail, input_precision=PRECISION)


@triton.jit
def combine(table, row_tiles, column_tiles, num_row_tiles, TILE: tl.constexpr):
    """The new images, and by the last programs the new blocks, between two iterations."""
    pid = tl.program_id(0)
    if pid < num_row_tiles:
        row = table + tl.load(row_tiles + 2 * pid) * FIELDS
        small = _floats(tl.load(row + SMALL))
        if tl.load(small + IS_DONE) == 0:
            i = tl.load(row_tiles + 2 * pid + 1) * TILE + tl.arange(0, TILE)
            m = tl.load(row + M_)
            y = _combined(tl.load(row + Y_), tl.load(row + T_), i, m, small + OF_IMAGES)
            _store_columns(tl.load(row + Y_), i, m, y)
    else:
        pid -= num_row_tiles
        row = table + tl.load(column_tiles + 2 * pid) * FIELDS
        small = _floats(tl.load(row + SMALL))
        if tl.load(small + IS_DONE) == 0:
            j = tl.load(column_tiles + 2 * pid + 1) * TILE + tl.arange(0, TILE)
            n = tl.load(row + N_)
            v = _combined(tl.load(row + V_), tl.load(row + R_), j, n, small + OF_BASIS)
            _store_columns(tl.load(row + V_), j, n, v)


@triton.jit
def _first_column(first, second, index, size, coefficients):
    """The first column of `[first, second] coefficients`."""
    c = tl.arange(0, 16)
    head = tl.load(coefficients + c * 16)
    tail = tl.load(coefficients + 256 + c * 16)
    total = tl.sum(_columns(first, index, size) * head[None, :], axis=1)
    return total + tl.sum(_columns(second, index, size) * tail[None, :], axis=1)


@triton.jit
def _load_strip(row, p, q, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """A strip of a tile of the weight, float32; where one side is contiguous, `q` runs along it."""
    a = tl.load(row + WEIGHT).to(tl.pointer_type(DTYPE))
    m, n = tl.load(row + M_), tl.load(row + N_)
    mode = tl.load(row + MODE)
    if mode == STRIDED:
        p_at = _offset(p, tl.load(row + I_LENGTH), tl.load(row + I_OUTER), tl.load(row + I_INNER))
        q_at = _offset(q, tl.load(row + J_LENGTH), tl.load(row + J_OUTER), tl.load(row + J_INNER))
        mask = (p[:, None] < m) & (q[None, :] < n)
        tile = tl.load(a + p_at[:, None] + q_at[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        swap = mode == ROWS_CONTIGUOUS
        stride = tl.multiple_of(tl.where(swap, tl.load(row + J_INNER), tl.load(row + I_INNER)), VECTOR)
        mask = (p[:, None] < tl.where(swap, n, m)) & (q[None, :] < tl.multiple_of(tl.where(swap, m, n), VECTOR))
        aligned = tl.multiple_of(a, 16) + p[:, None] * stride + q[None, :]
        tile = tl.load(aligned, mask=mask, other=0.0).to(tl.float32)
    return tile


@triton.jit
def _change_strip(row, p, q, factor, change, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Multiply a strip of a tile of the weight by a factor and add a change."""
    a = tl.load(row + WEIGHT).to(tl.pointer_type(DTYPE))
    m, n = tl.load(row + M_), tl.load(row + N_)
    mode = tl.load(row + MODE)
    if mode == STRIDED:
        p_at = _offset(p, tl.load(row + I_LENGTH), tl.load(row + I_OUTER), tl.load(row + I_INNER))
        q_at = _offset(q, tl.load(row + J_LENGTH), tl.load(row + J_OUTER), tl.load(row + J_INNER))
        at = a + p_at[:, None] + q_at[None, :]
        mask = (p[:, None] < m) & (q[None, :] < n)
        tile = tl.load(at, mask=mask, other=0.0).to(tl.float32) * factor + change
        tl.store(at, tile.to(DTYPE), mask=mask)
    else:
        swap = mode == ROWS_CONTIGUOUS
        stride = tl.multiple_of(tl.where(swap, tl.load(row + J_INNER), tl.load(row + I_INNER)), VECTOR)
        aligned_at = tl.multiple_of(a, 16) + p[:, None] * stride + q[None, :]
        mask = (p[:, None] < tl.where(swap, n, m)) & (q[None, :] < tl.multiple_of(tl.where(swap, m, n), VECTOR))
        tile = tl.load(aligned_at, mask=mask, other=0.0).to(tl.float32) * factor + change
        tl.store(aligned_at, tile.to(DTYPE), mask=mask)


@triton.jit
def update(table, update_tiles, column_tiles, num_update_tiles, DTYPE: tl.constexpr, VECTOR: tl.constexpr,
            TILE: tl.constexpr, MAP: tl.constexpr):  # fmt: skip
    """`A <- A + (t - s) u v^T`, `f A - f (A V) F V^T` or `f A`; by the last programs the block for the next step."""
    pid = tl.program_id(0)
    if pid < num_update_tiles:
        row = table + tl.load(update_tiles + 4 * pid) * FIELDS
        small = _floats(tl.load(row + SMALL))
        step = tl.load(small + STEP)
        # A weight that is skipped is not even read: it may hold NaN.
        if step != 0:
            q = tl.load(update_tiles + 4 * pid + 2) * _SIDE + tl.arange(0, _SIDE)
            m, n = tl.load(row + M_), tl.load(row + N_)
            # Along `p` are the rows, with their images, or the columns, with the block.
            swap = tl.load(row + MODE) == ROWS_CONTIGUOUS
            y, t, v, r = tl.load(row + Y_), tl.load(row + T_), tl.load(row + V_), tl.load(row + R_)
            p_first, p_second = tl.where(swap, v, y), tl.where(swap, r, t)
            q_first, q_second = tl.where(swap, y, v), tl.where(swap, t, r)
            OF_LEFT: tl.constexpr = OF_CHANGE if MAP == LOWER else OF_IMAGES
            of_p, of_q = tl.where(swap, OF_BASIS, OF_LEFT), tl.where(swap, OF_LEFT, OF_BASIS)
            p_size, q_size = tl.where(swap, n, m), tl.where(swap, m, n)
            if MAP == LOWER:
                block_q = tl.trans(_combined(q_first, q_second, q, q_size, small + of_q))
            elif MAP == MOVE_FIRST:
                along_q = step * _first_column(q_first, q_second, q, q_size, small + of_q)
            for strip in range(0, _SIDE, STRIP):
                p = tl.load(update_tiles + 4 * pid + 1) * _SIDE + strip + tl.arange(0, STRIP)
                if MAP == LOWER:
                    block_p = _combined(p_first, p_second, p, p_size, small + of_p)
                    change = tl.dot(block_p, block_q, input_precision=PRECISION)
                    _change_strip(row, p, q, tl.load(small + FACTOR), change, DTYPE, VECTOR)
                elif MAP == MOVE_FIRST:
                    along_p = _first_column(p_first, p_second, p, p_size, small + of_p)
                    _change_strip(row, p, q, 1.0, along_p[:, None] * along_q[None, :], DTYPE, VECTOR)
                else:
                    _change_strip(row, p, q, tl.load(small + FACTOR), 0.0, DTYPE, VECTOR)
    else:
        pid -= num_update_tiles
        row = table + tl.load(column_tiles + 2 * pid) * FIELDS
        small = _floats(tl.load(row + SMALL))
        if tl.load(small + IS_KEPT) > 0:
            j = tl.load(column_tiles + 2 * pid + 1) * TILE + tl.arange(0, TILE)
            n = tl.load(row + N_)
            v = _combined(tl.load(row + V_), tl.load(row + R_), j, n, small + OF_BASIS)
            length = tl.load(row + ORDER_LENGTH)
            at = (j % length) * tl.load(row + ORDER_STRIDE) + j // length
            c = tl.arange(0, 16)
            tl.store(_floats(tl.load(row + BASIS)) + at[:, None] * 16 + c[None, :], v, mask=j[:, None] < n)


@triton.jit
def squares(table, update_tiles, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """The sum of squares of each tile; the first program of a matrix keeps the scale that they were taken in."""
    pid = tl.program_id(0)
    row = table + tl.load(update_tiles + 4 * pid) * FIELDS
    q = tl.load(update_tiles + 4 * pid + 2) * _SIDE + tl.arange(0, _SIDE)
    number = tl.load(update_tiles + 4 * pid + 3)
    scale, unscale = _scale(row)
    total = tl.zeros((STRIP, _SIDE), tl.float32)
    for strip in range(0, _SIDE, STRIP):
        p = tl.load(update_tiles + 4 * pid + 1) * _SIDE + strip + tl.arange(0, STRIP)
        part = _load_strip(row, p, q, DTYPE, VECTOR) * unscale
        total += part * part
    partial = _float(tl.load(row + PARTIAL_SQUARES))
    tl.store(partial + 1 + number, tl.sum(tl.sum(total, axis=1), axis=0))
    if number == 0:
        tl.store(partial, scale)


@triton.jit
def sum_squares(table, totals, IS_FIRST: tl.constexpr):
    """The sum of this process's parts of `||A||_F^2`, where those of all processes are added, and once their scale."""
    row, total = table + tl.program_id(0) * FIELDS, totals + tl.program_id(0) * FIELDS
    partial, sums = _float(tl.load(row + PARTIAL_SQUARES)), _float(tl.load(total + PARTIAL_SQUARES))
    count = tl.load(row + NUM_TILES).to(tl.int32)
    k = tl.arange(0, 1024)
    squares = tl.zeros((1024,), tl.float32)
    for start in range(0, count, 1024):
        squares += tl.load(partial + 1 + start + k, mask=start + k < count, other=0.0)
    tl.store(sums + 1, tl.sum(squares, axis=0))
    tl.store(sums, tl.load(partial) if IS_FIRST else 0.0)


@triton.jit(do_not_specialize_on_alignment=["skip"])
def rescale(table, update_tiles, skip, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """`A <- A t / ||A||_F`; every program adds the squares of its matrix up, in the same order."""
    pid = tl.program_id(0)
    row = table + tl.load(update_tiles + 4 * pid) * FIELDS
    number = tl.load(update_tiles + 4 * pid + 3)
    partial = _float(tl.load(row + PARTIAL_SQUARES))
    count = tl.load(row + NUM_TILES).to(tl.int32)
    k = tl.arange(0, 1024)
    total = tl.zeros((1024,), tl.float32)
    for start in range(0, count, 1024):
        total += tl.load(partial + 1 + start + k, mask=start + k < count, other=0.0)
    norm = tl.load(partial) * tl.sqrt(tl.sum(total, axis=0))
    target = tl.load(_float(tl.load(row + TARGET)))
    is_off = _is_off(row, skip)
    is_skipped = _is_skipped(row, norm)
    if (is_off | is_skipped) == 0:
        q = tl.load(update_tiles + 4 * pid + 2) * _SIDE + tl.arange(0, _SIDE)
        for strip in range(0, _SIDE, STRIP):
            p = tl.load(update_tiles + 4 * pid + 1) * _SIDE + strip + tl.arange(0, STRIP)
            _change_strip(row, p, q, target / norm, 0.0, DTYPE, VECTOR)
    if number == 0:
        _report(row, is_off, norm, tl.where(is_skipped, norm, target), 0.0, 0.0, 0.0)
