"""Kernels of a step of the LSTM rule on a GPU: sums of squares, what a tensor tells its coordinates, the coordinates' update.

They are Triton's, so that any GPU it compiles for runs them, and its interpreter a CPU.
"""

# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# What Triton compiles is not Python: a branch on a constant is taken or left when it compiles, its ranges are loops.

import math

import triton
import triton.language as tl

from metarobust.meta_optimizers._features import FAST, SECOND, SLOW, TINY
from metarobust.meta_optimizers._layout import ROLES
from metarobust.meta_optimizers._update_rule import COEFFICIENT_SPEED, LARGEST

BEFORE_GATES = 3
"""Numbers in a tensor's row of the table, before the biases of its gates: log rate, coefficient of h, root of the fan-in."""

_FAST, _SLOW, _SECOND = tl.constexpr(FAST), tl.constexpr(SLOW), tl.constexpr(SECOND)
_TINY, _LARGEST, _BEFORE_GATES = tl.constexpr(TINY), tl.constexpr(LARGEST), tl.constexpr(BEFORE_GATES)
_ROLES, _SPEED = tl.constexpr(len(ROLES)), tl.constexpr(COEFFICIENT_SPEED)
_E_10, _LEAST = tl.constexpr(math.exp(10)), tl.constexpr(math.exp(-10))


@triton.jit
def _cut(values, largest):
    """Clamped to ``largest`` on either side; NaN stays NaN."""
    return tl.where(values > largest, largest, tl.where(values < -largest, -largest, values))


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _stream(addresses, place, where, size):
    """Values of a tensor given by its address; zeros beyond its end, and everywhere if the address is 0."""
    address = tl.load(addresses + place)
    inside = where < tl.where(address != 0, size, 0)
    return tl.load(address.to(tl.pointer_type(tl.float32)) + where, mask=inside, other=0.0)


@triton.jit
def squares_kernel(addresses, owner, begin, sizes, squares, tensors, blocks, TWO: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of squares of a block: of its parameters, of g, of h."""
    block = tl.program_id(0).to(tl.int64)
    tensor = tl.load(owner + block)
    where = tl.load(begin + block) + tl.arange(0, BLOCK)
    size = tl.load(sizes + tensor)
    p = _stream(addresses, tensor, where, size)
    g = _cut(_stream(addresses, tensors + tensor, where, size), _LARGEST)
    tl.store(squares + block, tl.sum(p * p))
    tl.store(squares + blocks + block, tl.sum(g * g))
    if TWO:
        h = _cut(_stream(addresses, 2 * tensors + tensor, where, size), _LARGEST)
        tl.store(squares + 2 * blocks + block, tl.sum(h * h))


@triton.jit
def tensors_kernel(
    squares, first_block, sizes, roles, fan_in, table,
    bias, time_weight, input_weight, log_rate, factor,
    blocks, basis_1, basis_2, log_initial_rate,
    GATES: tl.constexpr, GATES_UP: tl.constexpr, INPUTS: tl.constexpr, DYNAMIC: tl.constexpr, TWO: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """A row of the table: what a tensor's role, fan-in and statistics and the time give to its coordinates."""
    tensor = tl.program_id(0).to(tl.int64)
    first, last = tl.load(first_block + tensor), tl.load(first_block + tensor + 1)
    part = tl.arange(0, CHUNK)
    p_sum, g_sum, h_sum = (tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32))
    block = first
    while block < last:
        inside = block + part < last
        p_sum += tl.load(squares + block + part, mask=inside, other=0.0)
        g_sum += tl.load(squares + blocks + block + part, mask=inside, other=0.0)
        if TWO:
            h_sum += tl.load(squares + 2 * blocks + block + part, mask=inside, other=0.0)
        block += CHUNK
    size, inputs = tl.load(sizes + tensor).to(tl.float32), tl.load(fan_in + tensor)
    g_size = tl.sum(g_sum) / size + 1e-20
    gate = tl.arange(0, GATES_UP)
    known = gate < GATES
    row = input_weight + gate * INPUTS
    role = tl.load(roles + tensor)
    found = tl.load(bias + gate, mask=known, other=0.0) + tl.load(time_weight + 3 * gate, mask=known, other=0.0)
    found += basis_1 * tl.load(time_weight + 3 * gate + 1, mask=known, other=0.0)
    found += basis_2 * tl.load(time_weight + 3 * gate + 2, mask=known, other=0.0)
    found += tl.load(row + DYNAMIC + role, mask=known, other=0.0)
    found += tl.log(inputs) / 5 * tl.load(row + DYNAMIC + _ROLES, mask=known, other=0.0)
    found += tl.log(tl.sum(p_sum) / size * inputs + 1e-10) / 4 * tl.load(row + 8, mask=known, other=0.0)
    found += tl.log(g_size) / 20 * tl.load(row + 9, mask=known, other=0.0)
    coefficient = 0.0
    if TWO:
        told = _cut(tl.log((tl.sum(h_sum) / size + 1e-20) / g_size) / 4, 5.0)
        found += told * tl.load(row + 12, mask=known, other=0.0)
        of_role = factor + 3 * role
        coefficient = _SPEED * (tl.load(of_role) + basis_1 * tl.load(of_role + 1) + basis_2 * tl.load(of_role + 2))
    of_role = log_rate + 3 * role
    rate = tl.load(of_role) + basis_1 * tl.load(of_role + 1) + basis_2 * tl.load(of_role + 2) + log_initial_rate
    out = table + tensor * (_BEFORE_GATES + GATES)
    tl.store(out, rate)
    tl.store(out + 1, coefficient)
    tl.store(out + 2, tl.sqrt(inputs))
    tl.store(out + _BEFORE_GATES + gate, found, mask=known)


@triton.jit
def _add(open_in, keep, leave, candidate, value, row, stride, UNITS: tl.constexpr, unit, known):
    """One input, ``value [BLOCK]``, times its weights to the four gates of all units."""
    value = value[:, None]
    open_in += value * tl.load(row + unit * stride, mask=known, other=0.0)[None, :]
    keep += value * tl.load(row + (UNITS + unit) * stride, mask=known, other=0.0)[None, :]
    leave += value * tl.load(row + (2 * UNITS + unit) * stride, mask=known, other=0.0)[None, :]
    candidate += value * tl.load(row + (3 * UNITS + unit) * stride, mask=known, other=0.0)[None, :]
    return open_in, keep, leave, candidate


@triton.jit
def step_kernel(
    addresses, owner, begin, sizes, rows, table,
    m_g, m_slow, v_g, m_h, v_gh, v_h, hidden, cell,
    input_weight, recurrent_weight, between_weight, bias, readout,
    tensors, coordinates, first, slow, second, lr, output_scale,
    UNITS: tl.constexpr, UNITS_UP: tl.constexpr, LAYERS: tl.constexpr, INPUTS: tl.constexpr, TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The update of a block's coordinates, written into the parameters and the state."""
    block = tl.program_id(0).to(tl.int64)
    tensor = tl.load(owner + block)
    where = tl.load(begin + block) + tl.arange(0, BLOCK)
    size = tl.load(sizes + tensor)
    inside = where < size
    row = tl.load(rows + tensor) + where
    address = tl.load(addresses + tensor).to(tl.pointer_type(tl.float32)) + where
    told = table + tensor * (_BEFORE_GATES + 4 * UNITS)
    p = tl.load(address, mask=inside, other=0.0)
    g = _cut(_stream(addresses, tensors + tensor, where, size), _LARGEST)
    mean = tl.load(m_g + row, mask=inside, other=0.0)
    mean += (1 - _FAST) * (g - mean)
    mean_slow = tl.load(m_slow + row, mask=inside, other=0.0)
    mean_slow += (1 - _SLOW) * (g - mean_slow)
    square = _SECOND * tl.load(v_g + row, mask=inside, other=0.0) + (1 - _SECOND) * g * g

    unit = tl.arange(0, UNITS_UP)
    known = unit < UNITS
    gates = told + _BEFORE_GATES
    zero = tl.zeros([BLOCK, UNITS_UP], tl.float32)
    i = zero + tl.load(gates + unit, mask=known, other=0.0)[None, :]
    f = zero + tl.load(gates + UNITS + unit, mask=known, other=0.0)[None, :]
    o = zero + tl.load(gates + 2 * UNITS + unit, mask=known, other=0.0)[None, :]
    c = zero + tl.load(gates + 3 * UNITS + unit, mask=known, other=0.0)[None, :]
    scale = tl.sqrt(square / second + _TINY)
    weighted = p * tl.load(told + 2)
    w = input_weight
    i, f, o, c = _add(i, f, o, c, tl.log(tl.maximum(tl.abs(g), _LEAST)) / 10, w, INPUTS, UNITS, unit, known)
    i, f, o, c = _add(i, f, o, c, _cut(g * _E_10, 1.0), w + 1, INPUTS, UNITS, unit, known)
    i, f, o, c = _add(i, f, o, c, _cut(g / scale, 5.0), w + 2, INPUTS, UNITS, unit, known)
    i, f, o, c = _add(i, f, o, c, _cut(mean / (first * scale), 5.0), w + 3, INPUTS, UNITS, unit, known)
    i, f, o, c = _add(i, f, o, c, _cut(mean_slow / (slow * scale), 5.0), w + 4, INPUTS, UNITS, unit, known)
    i, f, o, c = _add(i, f, o, c, tl.log(tl.maximum(scale, 1e-10)) / 10, w + 5, INPUTS, UNITS, unit, known)
    i, f, o, c = _add(i, f, o, c, weighted, w + 6, INPUTS, UNITS, unit, known)
    i, f, o, c = _add(i, f, o, c, _tanh(3 * weighted), w + 7, INPUTS, UNITS, unit, known)
    direction = mean
    if TWO:
        h = _cut(_stream(addresses, 2 * tensors + tensor, where, size), _LARGEST)
        mean_h = tl.load(m_h + row, mask=inside, other=0.0)
        mean_h += (1 - _FAST) * (h - mean_h)
        product = _SECOND * tl.load(v_gh + row, mask=inside, other=0.0) + (1 - _SECOND) * g * h
        square_h = _SECOND * tl.load(v_h + row, mask=inside, other=0.0) + (1 - _SECOND) * h * h
        scale = tl.sqrt(square_h / second + _TINY)
        i, f, o, c = _add(i, f, o, c, _cut(h / scale, 5.0), w + 10, INPUTS, UNITS, unit, known)
        i, f, o, c = _add(i, f, o, c, _cut(mean_h / (first * scale), 5.0), w + 11, INPUTS, UNITS, unit, known)

    apart = tl.cast(coordinates, tl.int64)  # of the rows of two units; a multiple of it may need more than 32 bits
    of_units = row[:, None] + unit[None, :] * apart
    both = inside[:, None] & known[None, :]
    below = zero
    for layer in tl.static_range(LAYERS):
        state = layer * UNITS * apart
        if layer > 0:
            above = bias + layer * 4 * UNITS
            i = zero + tl.load(above + unit, mask=known, other=0.0)[None, :]
            f = zero + tl.load(above + UNITS + unit, mask=known, other=0.0)[None, :]
            o = zero + tl.load(above + 2 * UNITS + unit, mask=known, other=0.0)[None, :]
            c = zero + tl.load(above + 3 * UNITS + unit, mask=known, other=0.0)[None, :]
            between = between_weight + (layer - 1) * 4 * UNITS * UNITS
            for k in tl.range(0, UNITS, loop_unroll_factor=8):
                value = tl.sum(tl.where((unit == k)[None, :], below, 0.0), 1)
                i, f, o, c = _add(i, f, o, c, value, between + k, UNITS, UNITS, unit, known)
        recurrent = recurrent_weight + layer * 4 * UNITS * UNITS
        for k in tl.range(0, UNITS, loop_unroll_factor=8):
            value = tl.load(hidden + state + k * apart + row, mask=inside, other=0.0)
            i, f, o, c = _add(i, f, o, c, value, recurrent + k, UNITS, UNITS, unit, known)
        kept = tl.load(cell + state + of_units, mask=both, other=0.0)
        kept = tl.sigmoid(f) * kept + tl.sigmoid(i) * _tanh(c)
        below = tl.sigmoid(o) * _tanh(kept)
        tl.debug_barrier()  # all has been read by now, by whichever thread
        tl.store(cell + state + of_units, kept, mask=both)
        tl.store(hidden + state + of_units, below, mask=both)

    tl.store(m_g + row, mean, mask=inside)
    tl.store(m_slow + row, mean_slow, mask=inside)
    tl.store(v_g + row, square, mask=inside)
    if TWO:
        tl.store(m_h + row, mean_h, mask=inside)
        tl.store(v_gh + row, product, mask=inside)
        tl.store(v_h + row, square_h, mask=inside)
    out = tl.sum(below * tl.load(readout + unit, mask=known, other=0.0)[None, :], 1)
    rate = tl.exp(tl.load(told) + out)
    shift = tl.sum(below * tl.load(readout + UNITS + unit, mask=known, other=0.0)[None, :], 1)
    if TWO:
        coefficient = tl.sum(below * tl.load(readout + 2 * UNITS + unit, mask=known, other=0.0)[None, :], 1) + tl.load(told + 1)
        direction = mean + coefficient * mean_h
        square = tl.maximum(square + coefficient * (2 * product + coefficient * square_h), 0.0)
    direction = direction / first / (tl.sqrt(square / second + _TINY) + 1e-8)
    tl.store(address, p + lr * (output_scale * shift - rate * direction), mask=inside)
