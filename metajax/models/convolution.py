"""3x3 convolution and 2x2 max pooling that stay fast with weights of one's own per task, at every order of derivative.

XLA has slow spots here: an ordinary convolution under `vmap` over tasks becomes a grouped one, its gradients reverse
windows, and the gradient of `reduce_window` is a scatter. The functions below are closed under differentiation: every
derivative, of any order, is one of them again, and each is a plain convolution, a matrix product, or an elementwise
pass. Reverse mode only, as `jax.custom_vjp` has it: `jax.grad` of `jax.grad` is fine, `jax.jvp` is not.

What suits a CPU is to work in blocks that its cache holds, and its convolution is faster than patches times a matrix
as long as it sees one task at a time. Elsewhere everything is one batched matrix product.
"""

import functools

import jax
import jax.numpy as jnp

_BLOCK = 500_000  # values that an operand of one block has: 2 MB of float32, what a CPU core's cache holds


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
  return _patches(x, 3, stride=2) @ kernel.reshape(-1, kernel.shape[-1])


def _convolve(x, kernel):
  if jax.default_backend() == 'cpu':
    dims = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dims)
  return _patches(x, 3) @ kernel.reshape(-1, kernel.shape[-1])


def _correlate(x, g):
  h, w, c = x.shape[1:]
  features = g.shape[-1]

  def by_patches(x, g):
    return (_patches(x, 3).reshape(-1, 9 * c).T @ g.reshape(-1, features)).reshape(3, 3, c, features)

  def crosswise(x, g):
    # Entry (i, j) pairs x shifted by i rows with g shifted by j columns the other way: three copies of each, and one
    # product for all nine entries, in place of nine copies of x.
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    g = jnp.pad(g, ((0, 0), (0, 0), (1, 1), (0, 0)))
    x = jnp.concatenate([x[:, i : i + h] for i in range(3)], axis=-1).reshape(-1, 3 * c)
    g = jnp.concatenate([g[:, :, 2 - j : 2 - j + w] for j in range(3)], axis=-1).reshape(-1, 3 * features)
    return (x.T @ g).reshape(3, c, 3, features).swapaxes(1, 2)

  method, copied = (by_patches, 9 * c) if 2 * c < features else (crosswise, 3 * (c + features))
  return _sum_over_blocks(method, h * w * copied, x, g)


def _patches(x, size, stride=1):
  """Windows of (n, h, w, c) padded by one pixel: (n, h', w', size * size * c), ordered as a kernel's rows."""
  h, w = x.shape[1] + 2 - size + 1, x.shape[2] + 2 - size + 1
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return jnp.concatenate(
    [x[:, i : i + h : stride, j : j + w : stride] for i in range(size) for j in range(size)], axis=-1
  )


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
  return _top(x, sign)[0]


@jax.custom_vjp
def _top(x, sign):
  """The kept entries and their positions, each (n, h // 2, w // 2, c)."""
  windows = _windows(x)
  position = _first_maximum(*(sign * entry for entry in windows))
  return _at(position, *windows), position


@jax.custom_vjp
def _take(x, position):
  return _at(position, *_windows(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _put(g, position, size):
  n, h, w, c = g.shape
  place = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
  x = jnp.where(position[:, :, None, :, None] == place, g[:, :, None, :, None], 0).reshape(n, 2 * h, 2 * w, c)
  return jnp.pad(x, ((0, 0), (0, size[0] - 2 * h), (0, size[1] - 2 * w), (0, 0)))


def _top_forward(x, sign):
  entries, position = _top(x, sign)
  return (entries, position), (position, x.shape[1:3])


_top.defvjp(_top_forward, lambda saved, g: (_put(g[0], *saved), None))
_take.defvjp(
  lambda x, position: (_take(x, position), (position, x.shape[1:3])),
  lambda saved, g: (_put(g, *saved), None),
)
_put.defvjp(
  lambda g, position, size: (_put(g, position, size), position),
  lambda size, position, x: (_take(x, position), None),
)


def _windows(x):
  """The four entries of each window, (n, h // 2, w // 2, c) each."""
  n, h, w, c = x.shape
  x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
  return [x[:, :, i, :, j] for i in range(2) for j in range(2)]


def _first_maximum(a, b, c, d):
  upper, lower = jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3)
  return jnp.where(jnp.maximum(a, b) >= jnp.maximum(c, d), upper, lower).astype(jnp.uint8)


def _at(position, a, b, c, d):
  return jnp.where(position < 2, jnp.where(position == 0, a, b), jnp.where(position == 2, c, d))


# Convolution of a few channels and pooling in one. Such a layer, the first of a network, moves memory rather than
# computes: its output before pooling is by far the largest array. Here that output exists only block by block. The
# four pixels of a pooling window become four groups of outputs of one 4x4 convolution with stride 2, so that a block is
# one product of a matrix of patches, which is the same at every inner step, and pooling a maximum over the groups.


def pooling_patches(x):
  """4x4 windows with stride 2 of (n, h, w, c), h and w even, padded by one pixel: (n * h // 2 * w // 2, 16 * c)."""
  return _patches(x, 4, stride=2).reshape(-1, 16 * x.shape[-1])


def pooling_kernel(kernel):
  """The kernel (3, 3, c, features) at the four pixels of a pooling window: (16 * c, 4 * features)."""
  c, features = kernel.shape[2:]
  placed = [jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in range(2) for j in range(2)]
  return jnp.stack(placed, axis=3).reshape(16 * c, 4 * features)


def second_moments(patches, mean):
  """The covariance matrix (k, k) of the rows of patches (rows, k) around `mean` (k,)."""
  product = _sum_over_blocks(lambda p: (p - mean).T @ (p - mean), 2 * patches.shape[1], patches)
  return product / patches.shape[0]


def top_of_product(patches, kernel, sign):
  """Of patches (rows, k) times kernel (k, 4 * features) the top of the four groups, see `top2x2`: (rows, features)."""
  return _top_product(patches, kernel, sign)[0]


@jax.custom_vjp
def _top_product(patches, kernel, sign):
  def of_block(patches):
    groups = jnp.split(patches @ kernel, 4, axis=-1)
    position = _first_maximum(*(sign * group for group in groups))
    return _at(position, *groups), position

  return _map_blocks(of_block, kernel.shape[1], patches)


@jax.custom_vjp
def _take_product(patches, kernel, position):
  return _map_blocks(
    lambda p, position: _at(position, *jnp.split(p @ kernel, 4, -1)), kernel.shape[1], patches, position
  )


@jax.custom_vjp
def _product_gradient(patches, g, position):
  """The transpose of `_take_product` in its kernel, (k, 4 * features)."""
  return _sum_over_blocks(lambda p, g, at: p.T @ _spread(g, at), 4 * g.shape[1], patches, g, position)


def _spread(g, position):
  """Entries (rows, features) in their group, zeros in the others: (rows, 4 * features)."""
  return jnp.concatenate([jnp.where(position == i, g, 0) for i in range(4)], axis=-1)


def _top_product_forward(patches, kernel, sign):
  entries, position = _top_product(patches, kernel, sign)
  return (entries, position), (patches, kernel, position)


def _product_backward(saved, g):
  patches, kernel, position = saved
  return _spread(g, position) @ kernel.T, _product_gradient(patches, g, position), None


_top_product.defvjp(_top_product_forward, lambda saved, g: _product_backward(saved, g[0]))
_take_product.defvjp(
  lambda patches, kernel, position: (_take_product(patches, kernel, position), (patches, kernel, position)),
  _product_backward,
)
_product_gradient.defvjp(
  lambda patches, g, position: (_product_gradient(patches, g, position), (patches, g, position)),
  lambda saved, h: (_spread(*saved[1:]) @ h.T, _take_product(saved[0], h, saved[2]), None),
)


def _map_blocks(function, per_row, *arrays):
  """`function` of blocks of rows of `arrays`, put together; `per_row` values of a block's largest array a row."""
  blocks = _blocks(arrays[0].shape[0], per_row)
  if blocks == 1:
    return function(*arrays)
  results = jax.lax.map(lambda block: function(*block), _cut(arrays, blocks))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _sum_over_blocks(function, per_row, *arrays):
  """The sum of an array that `function` makes of each block of rows of `arrays`."""
  blocks = _blocks(arrays[0].shape[0], per_row)
  if blocks == 1:
    return function(*arrays)
  cut = _cut(arrays, blocks)
  first = jax.eval_shape(function, *(x[0] for x in cut))

  def add(total, block):
    return total + function(*block), None

  return jax.lax.scan(add, jnp.zeros(first.shape, first.dtype), cut)[0]


def _blocks(rows, per_row):
  """How many equal blocks to cut into: on a CPU the fewest that fit into a cache."""
  if jax.default_backend() != 'cpu':
    return 1
  return next(n for n in range(1, rows + 1) if rows % n == 0 and (rows // n * per_row <= _BLOCK or n == rows))


def _cut(arrays, blocks):
  return [x.reshape(blocks, -1, *x.shape[1:]) for x in arrays]
