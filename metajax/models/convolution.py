"""3x3 convolution and 2x2 max pooling that stay fast with weights of one's own per task, at every order of derivative.

XLA has slow spots here: an ordinary convolution under `vmap` over tasks becomes a grouped one, its gradients reverse
windows, and the gradient of `reduce_window` is a scatter. Below, every derivative of any order is a plain convolution,
a matrix product or an elementwise pass: those of `conv3x3`, pooling and `pooled_relu` are again functions of the same
few. Reverse mode only, as `jax.custom_vjp` has it: `jax.grad` of `jax.grad` is fine, `jax.jvp` is not.

What suits a CPU is to work in blocks that its cache holds, and its convolution is faster than patches times a matrix
as long as it sees one task at a time. Elsewhere everything is one batched matrix product.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

_BLOCK = 250_000  # values that an operand of one block has: 1 MB of float32, half of what a CPU core's cache holds


@jax.custom_vjp
def conv3x3(x, kernel):
  """3x3 convolution with stride 1 and one pixel of zero padding.

  Args:
    x: (n, h, w, c).
    kernel: (3, 3, c, features).

  Returns:
    (n, h, w, features).
  """
  return _per_task(_convolve, foldable=True)(x, kernel)


@jax.custom_vjp
def kernel_gradient(x, g):
  """The transpose of `conv3x3` in its kernel: (3, 3, c, features), from x (n, h, w, c) and g (n, h, w, features)."""
  return _per_task(_correlate)(x, g)


def _transposed(kernel):
  """The kernel whose convolution is the transpose of `conv3x3` in x."""
  # The barrier keeps XLA from folding the reversal into the convolution, where its CPU backend has only plain loops.
  return jax.lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))


conv3x3.defvjp(
  lambda x, kernel: (conv3x3(x, kernel), (x, kernel)),
  lambda saved, g: (conv3x3(g, _transposed(saved[1])), kernel_gradient(saved[0], g)),
)
kernel_gradient.defvjp(
  lambda x, g: (kernel_gradient(x, g), (x, g)),
  lambda saved, h: (conv3x3(saved[1], _transposed(h)), conv3x3(saved[0], h)),
)


def strided_conv3x3(x, kernel):
  """3x3 convolution with stride 2 and one pixel of zero padding: (n, h, w, c) to (n, ceil(h / 2), ceil(w / 2), f)."""
  return _patches(x, stride=2) @ kernel.reshape(-1, kernel.shape[-1])


def _convolve(x, kernel):
  if jax.default_backend() == 'cpu':
    dims = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dims)
  return _patches(x) @ kernel.reshape(-1, kernel.shape[-1])


def _correlate(x, g):
  h, w, c = x.shape[1:]
  features = g.shape[-1]

  def by_patches(x, g):
    return _transposed_times(_patches(x).reshape(-1, 9 * c), g.reshape(-1, features)).reshape(3, 3, c, features)

  def crosswise(x, g):
    # Entry (i, j) pairs x shifted by i rows with g shifted by j columns the other way: three copies of each, and one
    # product for all nine entries, in place of nine copies of x.
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    g = jnp.pad(g, ((0, 0), (0, 0), (1, 1), (0, 0)))
    x = jnp.concatenate([x[:, i : i + h] for i in range(3)], axis=-1).reshape(-1, 3 * c)
    g = jnp.concatenate([g[:, :, 2 - j : 2 - j + w] for j in range(3)], axis=-1).reshape(-1, 3 * features)
    return _transposed_times(x, g).reshape(3, c, 3, features).swapaxes(1, 2)

  method, copied = (by_patches, 9 * c) if 2 * c < features else (crosswise, 3 * (c + features))
  return _sum_over_blocks(method, h * w * copied, x, g)


def _patches(x, stride=1):
  """3x3 windows of (n, h, w, c) padded by one pixel: (n, h', w', 9 * c), ordered as a kernel's rows."""
  h, w = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return jnp.concatenate([x[:, i : i + h : stride, j : j + w : stride] for i in range(3) for j in range(3)], axis=-1)


def _per_task(function, foldable=False):
  """On a CPU, makes `vmap` of `function(x, other)` a loop over tasks.

  Only if each task has an `other` of its own, where `function` is foldable: with one for all, the tasks' examples are
  put together.
  """
  if jax.default_backend() != 'cpu':
    return function
  function = jax.custom_batching.custom_vmap(function)

  @function.def_vmap
  def over_tasks(tasks, batched, x, other):
    if foldable and not batched[1]:
      return function(x.reshape(-1, *x.shape[2:]), other).reshape(tasks, x.shape[1], *x.shape[2:-1], -1), True
    x, other = (a if b else jnp.broadcast_to(a, (tasks, *a.shape)) for a, b in zip((x, other), batched, strict=True))
    return jax.lax.map(lambda pair: function(*pair), (x, other)), True

  return function


# 2x2 max pooling. The position of each window's maximum, 0..3, is all that a derivative needs: to take the entries
# there and to put entries there are each other's transposes. Of equals the first counts.


def max_pool2x2(x):
  """2x2 max pooling with stride 2 of (n, h, w, c); an odd last row or column is dropped."""
  return top2x2(x, jnp.ones(x.shape[-1], x.dtype))


def top2x2(x, sign):
  """2x2 pooling of (n, h, w, c) that keeps the maximum where `sign` (c,) is 1, the minimum where it is -1."""
  h, w = x.shape[1:3]
  return _top(x[:, : h // 2 * 2, : w // 2 * 2], sign)[0]


@jax.custom_vjp
def _top(x, sign):
  """The kept entries and their positions, each (n, h / 2, w / 2, c); h and w are even."""
  windows = _windows(x)
  position = _first_maximum(*(sign * entry for entry in windows))
  return _at(position, *windows), position


@jax.custom_vjp
def _take(x, position):
  return _at(position, *_windows(x))


@jax.custom_vjp
def _put(g, position):
  n, h, w, c = g.shape
  place = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
  return jnp.where(position[:, :, None, :, None] == place, g[:, :, None, :, None], 0).reshape(n, 2 * h, 2 * w, c)


def _top_forward(x, sign):
  entries, position = _top(x, sign)
  return (entries, position), position


_top.defvjp(_top_forward, lambda position, g: (_put(g[0], position), None))
_take.defvjp(lambda x, position: (_take(x, position), position), lambda position, g: (_put(g, position), None))
_put.defvjp(lambda g, position: (_put(g, position), position), lambda position, x: (_take(x, position), None))


def _windows(x):
  """The four entries of each window of x, whose sizes are even: (n, h / 2, w / 2, c) each."""
  n, h, w, c = x.shape
  x = x.reshape(n, h // 2, 2, w // 2, 2, c)
  return [x[:, :, i, :, j] for i in range(2) for j in range(2)]


def _first_maximum(a, b, c, d):
  upper, lower = jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3)
  return jnp.where(jnp.maximum(a, b) >= jnp.maximum(c, d), upper, lower).astype(jnp.uint8)


def _at(position, a, b, c, d):
  return jnp.where(position < 2, jnp.where(position == 0, a, b), jnp.where(position == 2, c, d))


def relu(x, negative_slope=0.0):
  """ReLU, or LeakyReLU of a slope: negative entries times `negative_slope`."""
  return nn.leaky_relu(x, negative_slope) if negative_slope else nn.relu(x)


# Convolution of a few channels, pooling and ReLU in one. Such a layer, the first of a network, moves memory rather than
# computes: its output before pooling is by far the largest array. On a CPU that output exists only block by block. The
# four pixels of a pooling window become four groups of outputs of one 4x4 convolution with stride 2, so that a block is
# one product of a matrix of patches, and pooling a maximum over the groups. All that a derivative needs besides is the
# position of each maximum, 0..3, and 4 more where it is not positive: ReLU made it zero, LeakyReLU multiplied it.


def squares(x):
  """(n, h, w, c), h and w even, padded by one pixel and cut into squares of 2x2: (n, h / 2 + 1, w / 2 + 1, 4 * c)."""
  n, h, w, c = x.shape
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(n, h // 2 + 1, 2, w // 2 + 1, 2, c)
  return x.swapaxes(2, 3).reshape(n, h // 2 + 1, w // 2 + 1, 4 * c)


def pooling_kernel(kernel):
  """The kernel (3, 3, c, features) at the four pixels of a pooling window: (16 * c, 4 * features)."""
  c, features = kernel.shape[2:]
  placed = [jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in range(2) for j in range(2)]
  placed = jnp.stack(placed, axis=3).reshape(2, 2, 2, 2, c, 4 * features)  # row and column: which square, and in it
  return placed.transpose(0, 2, 1, 3, 4, 5).reshape(16 * c, 4 * features)


def patch_moments(squares):
  """Mean (16 * c,) and covariance matrix (16 * c, 16 * c) of the patches that `pooling_kernel` is multiplied with."""
  # Moments around a value near the mean, so that the difference at the end loses no digits.
  near = jnp.mean(squares[0], axis=(0, 1))

  def sums(squares):
    squares = squares - near
    patches = _pooling_patches(squares)
    return jnp.sum(squares, axis=0, keepdims=True), _transposed_times(patches, patches, precision='highest')

  n, pixels, values = squares.shape[0], _pooled_pixels(squares), 4 * squares.shape[-1]
  squares_sum, products = _sum_over_blocks(sums, 2 * pixels * values, squares)
  mean = jnp.mean(_pooling_patches(squares_sum), axis=0) / n
  return mean + jnp.tile(near, 4), products / (n * pixels) - jnp.outer(mean, mean)


def pooled_relu(squares, kernel, bias, negative_slope=0.0):
  """`relu` of the 2x2 maximum of a convolution plus `bias` (features,).

  Args:
    squares: `squares(x)` of images x (n, h, w, c).
    kernel: `pooling_kernel(kernel)` of the kernel.
    bias: (features,).
    negative_slope: of LeakyReLU; 0 for ReLU.

  Returns:
    (n, h / 2, w / 2, features).
  """
  return _pooled_relu(negative_slope, squares, kernel, bias)[0]


def _pooling_patches(squares):
  """(rows, 16 * c): each two by two squares, 4x4 pixels."""
  h, w = squares.shape[1] - 1, squares.shape[2] - 1
  shifted = [squares[:, i : i + h, j : j + w] for i in range(2) for j in range(2)]
  return jnp.concatenate(shifted, axis=-1).reshape(-1, 4 * squares.shape[-1])


def _pooled_pixels(squares):
  """How many pixels, and so patches, one image has after pooling."""
  return (squares.shape[1] - 1) * (squares.shape[2] - 1)


def _groups(squares, kernel):
  """The four pixels of each pooling window, each (n, h, w, features)."""
  n, h, w = squares.shape[:3]
  products = (_pooling_patches(squares) @ kernel).reshape(n, h - 1, w - 1, 4, -1)
  return [products[..., i, :] for i in range(4)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pooled_relu(slope, squares, kernel, bias):
  def of_block(squares):
    groups = _groups(squares, kernel)
    position = _first_maximum(*groups)
    value = relu(_at(position, *groups) + bias, slope).astype(squares.dtype)
    return value, jnp.where(value > 0, position, position + 4).astype(jnp.uint8)

  return _map_blocks(of_block, _pooled_pixels(squares) * kernel.shape[1], squares)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take_product(slope, squares, kernel, bias, position):
  def of_block(squares, position):
    value = _at(position % 4, *_groups(squares, kernel)) + bias
    return jnp.where(position < 4, value, slope * value if slope else 0).astype(squares.dtype)

  return _map_blocks(of_block, _pooled_pixels(squares) * kernel.shape[1], squares, position)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product_gradient(slope, squares, g, position):
  """The transpose of `_take_product` in kernel and bias."""

  def of_block(squares, g, position):
    spread = _spread(slope, g, position)
    kernel = _transposed_times(_pooling_patches(squares), spread)
    bias = jnp.sum(spread, axis=0, dtype=jnp.promote_types(spread.dtype, jnp.float32))
    return kernel, bias.reshape(4, -1).sum(axis=0)

  return _sum_over_blocks(of_block, 4 * g[0].size, squares, g, position)


def _spread(slope, g, position):
  """Entries (n, h, w, features) in their group, zeros in the others: (n * h * w, 4 * features)."""
  g, position = (x.reshape(-1, x.shape[-1]) for x in (g, position))
  negative = [jnp.where(position == i + 4, slope * g, 0) if slope else 0 for i in range(4)]
  return jnp.concatenate([jnp.where(position == i, g, negative[i]) for i in range(4)], axis=-1)


def _squares_gradient(slope, squares, kernel, g, position):
  """The transpose of `_take_product` in squares."""
  return jax.vjp(_pooling_patches, squares)[1](_spread(slope, g, position) @ kernel.T)[0]


def _pooled_relu_forward(slope, squares, kernel, bias):
  value, position = _pooled_relu(slope, squares, kernel, bias)
  return (value, position), (squares, kernel, position)


def _take_product_forward(slope, squares, kernel, bias, position):
  return _take_product(slope, squares, kernel, bias, position), (squares, kernel, position)


def _product_backward(slope, saved, g):
  squares, kernel, position = saved
  return _squares_gradient(slope, squares, kernel, g, position), *_product_gradient(slope, squares, g, position)


_pooled_relu.defvjp(_pooled_relu_forward, lambda slope, saved, g: _product_backward(slope, saved, g[0]))
_take_product.defvjp(_take_product_forward, lambda slope, saved, g: (*_product_backward(slope, saved, g), None))
_product_gradient.defvjp(
  lambda slope, squares, g, position: (_product_gradient(slope, squares, g, position), (squares, g, position)),
  lambda slope, saved, h: (
    _squares_gradient(slope, saved[0], h[0], *saved[1:]),
    _take_product(slope, saved[0], *h, saved[2]),
    None,
  ),
)


def _transposed_times(a, b, precision=None):
  """a.T @ b, without a copy of a that is transposed."""
  return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision)


def _map_blocks(function, per_row, *arrays):
  """`function` of blocks of rows of `arrays`, put together; `per_row` values of a block's largest array a row."""
  blocks, rows = _blocks(arrays[0].shape[0], per_row)
  if blocks == 1:
    return function(*arrays)

  def put(i, results):
    new = function(*_block(i, rows, arrays))
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i * rows, 0), results, new)

  like = jax.eval_shape(lambda: function(*_block(0, rows, arrays)))
  zeros = jax.tree.map(lambda s: jnp.zeros((blocks * rows, *s.shape[1:]), s.dtype), like)
  return jax.lax.fori_loop(0, blocks, put, zeros)


def _sum_over_blocks(function, per_row, *arrays):
  """The sum of what `function` makes of each block of rows of `arrays`."""
  blocks, rows = _blocks(arrays[0].shape[0], per_row)
  if blocks == 1:
    return function(*arrays)

  def add(i, total):
    return jax.tree.map(jnp.add, total, function(*_block(i, rows, arrays)))

  like = jax.eval_shape(lambda: function(*_block(0, rows, arrays)))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), like)
  return jax.tree.map(lambda s, x: x.astype(s.dtype), like, jax.lax.fori_loop(0, blocks, add, zeros))


def _blocks(rows, per_row):
  """Into how many equal blocks to cut, and the rows of each: on a CPU the fewest that fit into a cache.

  Of a symbolic number of rows (`jax.export`) there is one.
  """
  if jax.default_backend() != 'cpu' or not isinstance(rows, int):
    return 1, rows
  blocks = next(n for n in range(1, rows + 1) if rows % n == 0 and (rows // n * per_row <= _BLOCK or n == rows))
  return blocks, rows // blocks


def _block(i, rows, arrays):
  # Sliced where they are: `scan` over reshaped arrays would have XLA copy them first, to change nothing but strides.
  return [jax.lax.dynamic_slice_in_dim(x, i * rows, rows) for x in arrays]
