"""Model-agnostic meta-learning (Finn, Abbeel & Levine 2017) and what differs from it by an option.

Learned step sizes are those of Meta-SGD (Li et al. 2017) and MAML++ (Antoniou, Edwards & Storkey 2019), whose other
parts are options too; `meta_sgd.py` and `mamlpp.py` switch them on.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax import inner_loop, losses, networks
from metajax.errors import UserError
from metajax.types import Algorithm, Phase


class Adapted(NamedTuple):
  """What MAML leaves of a task: fast weights, and the statistics that normalise its queries."""

  params: Any
  model_state: Any


def make(
  model,
  *,
  objective=losses.CLASSIFICATION,
  inner_steps=5,
  inner_lr=0.01,
  learned_lr='no',
  inner_lr_range=(),
  positive_lr=False,
  first_order=False,
  first_order_epochs=0,
  multi_step_epochs=0,
  epoch=500,
  inner_params=(),
  adapt_norm=True,
  per_step_norm=False,
  per_step_statistics=False,
  batch_norm='transductive',
  batch_norm_momentum=0.9,
  checkpoint=False,
):
  """MAML with exact second-order gradients through the inner loop.

  Where evaluation takes more inner steps than training, those beyond use the last one's step sizes and rows.

  Args:
    model: a Flax module, inputs (n, ...) -> outputs (n, way).
    objective: what the task minimises.
    inner_steps: gradient steps on the support set; may differ between training and evaluation.
    inner_lr: step size of the inner loop (alpha); the initial one where it is learned.
    learned_lr: what has a step size that the outer loop learns, see `inner_loop.step_sizes`.
    inner_lr_range: (low, high) to draw the initial step sizes from, uniformly, in place of `inner_lr`.
    positive_lr: learn the logarithms of step sizes, so that none becomes zero or negative.
    first_order: leave out second derivatives (FOMAML, section 5.2).
    first_order_epochs: leave them out in so many epochs at the beginning (MAML++, derivative-order annealing; one more
      than the number in the authors' configs).
    multi_step_epochs: in so many epochs at the beginning, queries count after every inner step, weighted by
      `importance` (MAML++, multi-step loss).
    epoch: meta-updates of one.
    inner_params: names of the model's top-level parameters that the inner loop moves; all if empty.
    adapt_norm: whether it moves those of normalisation layers too, see `networks.is_norm`.
    per_step_norm: those that it does not move have a value for each inner step (MAML++); queries after a step see the
      one that its support set saw.
    per_step_statistics: so have running averages (MAML++), of the support set in a step and then of the queries after
      it, where the loss asks for these; in evaluation they normalise the support sets too.
    batch_norm: statistics that normalise queries; the support set has its own, but see above. 'transductive': those
      of the query batch, so queries see one another (the practice of the paper's code). 'support': those of the
      support set under the fast weights. 'running': the query batch's in training, their running average in
      evaluation. The last two need layers that keep a batch's statistics as they are and use given ones when
      'batch_stats' is not mutable, such as `models.layers.BatchNorm`; Flax's own BatchNorm serves 'transductive' alone.
    batch_norm_momentum: how much of the running average stays at each meta-update.
    checkpoint: trade time for memory in the backward pass, see `inner_loop.sgd`.

  Returns:
    Algorithm, whose params are the model's, or with learned step sizes {'network': the model's, 'inner_lr' or
    'log_inner_lr': step sizes}. What has a value for each step has a leading axis of inner_steps.

  Raises:
    UserError: settings that are out of range or do not go together; by `init`, such as do not suit the model.
  """
  networks.check_batch_norm(batch_norm)
  if inner_steps < 0:
    raise UserError(f'inner_steps = {inner_steps}: it cannot be negative')
  if min(first_order_epochs, multi_step_epochs, epoch - 1) < 0:
    numbers = f'first_order_epochs = {first_order_epochs}, multi_step_epochs = {multi_step_epochs}, epoch = {epoch}'
    raise UserError(f'{numbers}: none can be negative, and an epoch has one meta-update at least')
  if first_order and first_order_epochs:
    raise UserError(f'first_order_epochs = {first_order_epochs}, but first_order is for good: choose one')
  if per_step_statistics and batch_norm != 'running':
    raise UserError(f"per_step_statistics are for batch_norm 'running': {batch_norm!r} does not read them")
  step_sizes = inner_loop.step_sizes(learned_lr, inner_lr, inner_lr_range, positive_lr)
  learned = learned_lr != 'no'
  rates_key = 'log_inner_lr' if positive_lr else 'inner_lr'  # so that neither is taken for the other

  def init(rng, inputs):
    if inner_steps < 1 and (multi_step_epochs or per_step_norm or per_step_statistics or learned):
      raise UserError('inner_steps = 0, but another setting of the algorithm is about inner steps')
    rng_model, rng_rates = jax.random.split(rng) if inner_lr_range else (rng, rng)
    model_state = dict(model.init(rng_model, inputs))
    params = model_state.pop('params')
    if unknown := set(inner_params) - set(params):
      raise UserError(f'inner_params {sorted(unknown)} are not in the model, which has {sorted(params)}')
    fast, rows, rest = divide(params)
    if inner_steps and not jax.tree.leaves(fast):
      raise UserError(f'inner_params = {inner_params}, adapt_norm = {adapt_norm}: the inner loop would move nothing')
    if per_step_norm:
      if not jax.tree.leaves(rows):
        raise UserError(
          'per_step_norm: the model has no normalisation layers whose parameters the inner loop leaves alone; set '
          'config.algorithm.per_step_norm=False, or adapt_norm=False'
        )
      params = _merged(fast, _repeated(rows, inner_steps), rest)
    if per_step_statistics:
      if 'batch_stats' not in model_state:
        raise UserError('per_step_statistics: the model keeps none; set config.algorithm.per_step_statistics=False')
      model_state['batch_stats'] = _repeated(model_state['batch_stats'], inner_steps)
    if learned:
      params = {'network': params, rates_key: step_sizes.init(rng_rates, fast, inner_steps)}
    return params, model_state

  def divide(params):
    """The weights that the inner loop moves, those with a row for each step, the rest: each None among the others."""

    def kind(path, _):
      norm = networks.is_norm(path)
      if (not inner_params or path[0].key in inner_params) and (adapt_norm or not norm):
        return 'fast'
      return 'row' if norm and per_step_norm else 'rest'

    kinds = jax.tree.map_with_path(kind, params)
    return [
      jax.tree.map(lambda p, k, one=one: p if k == one else None, params, kinds) for one in ('fast', 'row', 'rest')
    ]

  def unfold(params, model_state):
    """Fast weights; tables of what has a row for each step; what makes an Adapted of the first and a row."""
    fast, rows, rest = divide(params['network'] if learned else params)
    statistics = {'batch_stats': model_state['batch_stats']} if per_step_statistics else {}

    def whole(fast, row):
      return Adapted(_merged(fast, row[0], rest), {**model_state, **row[1]})

    return fast, (rows, statistics), whole

  def descend(params, unfolded, support, rng, *, training, **options):
    """The inner loop: what `inner_loop.sgd` returns; in training it keeps what normalised each step's support set."""
    fast, tables, whole = unfolded
    rows = inner_loop.rows(tables, np.arange(inner_steps))
    rates, rate = step_sizes.of_steps(params[rates_key] if learned else None, inner_steps)
    normalise = networks.by_batch if training or not per_step_statistics else networks.by_state

    def support_loss(fast, step):
      _, row = step
      # One dropout mask for all steps.
      outputs, state = normalise(model, *whole(fast, row), support.inputs, rng)
      kept = {'batch_stats': state['batch_stats']} if per_step_statistics else {}
      return jnp.mean(objective.losses(outputs, support.targets)), kept

    return inner_loop.sgd(support_loss, fast, (rates, rows), rate=lambda step: rate(step[0]), **options)

  def finished(adapted, support, rng=None):
    """With the statistics that its queries are to be normalised by."""
    if batch_norm != 'support':
      return adapted
    return adapted._replace(model_state=networks.by_batch(model, *adapted, support.inputs, rng)[1])

  def adapt(params, model_state, support, rng):
    del rng  # of dropout, which is for training
    _, tables, whole = unfolded = unfold(params, model_state)
    fast, _ = descend(params, unfolded, support, None, training=False, first_order=first_order, checkpoint=checkpoint)
    return finished(whole(fast, inner_loop.rows(tables, inner_steps - 1)), support)

  def trajectory(params, model_state, support, rng):
    del rng
    fast, tables, whole = unfolded = unfold(params, model_state)
    _, _, path = descend(params, unfolded, support, None, training=False, first_order=True, after=lambda fast, _: fast)
    rows = inner_loop.rows(tables, np.arange(-1, inner_steps))
    return jax.vmap(lambda fast, row: finished(whole(fast, row), support))(inner_loop.prepend(fast, path), rows)

  def predict_along(params, model_state, support, inputs, rng):
    del rng
    fast, tables, whole = unfolded = unfold(params, model_state)

    def outputs(fast, row):
      return predict(params, model_state, finished(whole(fast, row), support), inputs)

    # Between the steps, so that there is one copy of the fast weights, and not one for each step.
    after = {'first_order': True, 'after': lambda fast, step: outputs(fast, step[1])}
    _, _, path = descend(params, unfolded, support, None, training=False, **after)
    return inner_loop.prepend(outputs(fast, inner_loop.rows(tables, -1)), path)

  def predict(params, model_state, adapted, inputs):
    del params, model_state
    normalise = networks.by_batch if batch_norm == 'transductive' else networks.by_state
    return normalise(model, *adapted, inputs)[0]

  def loss(params, model_state, episode, rng, step=None, *, first_order=first_order, multi_step=False):
    """The loss of a task, with `multi_step` after `step` meta-updates."""
    rng_support, rng_query = networks.split(rng)
    _, tables, whole = unfolded = unfold(params, model_state)
    targets = episode.query.targets

    def query(fast, row):
      normalise = networks.by_state if batch_norm == 'support' else networks.by_batch
      adapted = finished(whole(fast, row), episode.support, rng_support)
      return normalise(model, *adapted, episode.query.inputs, rng_query)

    options = {'first_order': first_order, 'checkpoint': checkpoint}
    if multi_step:
      options['after'] = lambda fast, _: fast
    fast, of_support, *path = descend(params, unfolded, episode.support, rng_support, training=True, **options)
    if multi_step:
      rows = inner_loop.rows(tables, np.arange(inner_steps))
      after_step = jax.checkpoint(query, prevent_cse=False) if checkpoint else query
      outputs, states = jax.lax.map(lambda step: after_step(*step), (*path, rows))
      weights = importance(step // epoch, inner_steps, multi_step_epochs)
      each = jax.vmap(objective.losses, (0, None))(outputs, targets)
      values = jnp.matmul(weights.astype(each.dtype), each, precision='highest')
      outputs, state = outputs[-1], jax.tree.map(lambda x: x[-1], states)
    else:
      outputs, state = query(fast, inner_loop.rows(tables, inner_steps - 1))
      weights, values = jax.nn.one_hot(inner_steps - 1, inner_steps), objective.losses(outputs, targets)

    momentum = batch_norm_momentum if batch_norm == 'running' else 1.0
    if per_step_statistics:
      averages = networks.averaged(model_state['batch_stats'], of_support['batch_stats'], momentum)
      if multi_step:
        averages = networks.averaged(averages, states['batch_stats'], momentum)
      else:
        last = networks.averaged(inner_loop.rows(averages, inner_steps - 1), state['batch_stats'], momentum)
        averages = jax.tree.map(lambda rows, row: rows.at[-1].set(row), averages, last)
      model_state = {**networks.updated(model_state, state), 'batch_stats': averages}
    else:
      model_state = networks.updated(model_state, state, momentum)
    metrics = objective.metrics(outputs, targets)
    if multi_step_epochs:
      metrics['loss_importance'] = weights
    if learned:
      metrics |= step_sizes.metrics(params[rates_key])
    return values, (model_state, metrics)

  first_order_end, multi_step_end = first_order_epochs * epoch, multi_step_epochs * epoch
  phases = tuple(
    Phase(
      start,
      functools.partial(loss, first_order=first_order or start < first_order_end, multi_step=start < multi_step_end),
    )
    for start in sorted({0, first_order_end, multi_step_end})
  )
  # There is no one network where each step has parts of its own.
  features = None if per_step_norm or per_step_statistics else networks.without_head(model)
  embedding = features and networks.embedding(
    features, batch_norm, lambda params, _: params['network'] if learned else params
  )
  return Algorithm(
    init,
    adapt,
    predict,
    loss,
    trajectory,
    predict_along,
    phases=phases if len(phases) > 1 else (),
    embedding=embedding,
    adopt=embedding and networks.adopt,
  )


def importance(epoch, steps, epochs):
  """How much the queries after each inner step count in an epoch (Antoniou et al. 2019, section 4; their code).

  From all the same to almost the last alone; after `epochs`, at which the last one would have 1 - 0.03 (steps - 1) /
  steps, the loss is of it alone.

  Args:
    epoch: scalar, counted from 0.
    steps: of the inner loop.
    epochs: in which the loss is of several steps.

  Returns:
    (steps,) floats, which sum to 1.
  """
  least = 0.03 / steps
  rest = jnp.maximum(1 / steps - epoch / (steps * epochs), least)
  last = jnp.minimum(1 / steps + epoch * (steps - 1) / (steps * epochs), 1 - (steps - 1) * least)
  return jnp.full(steps, rest, float).at[-1].set(last)


def _merged(*trees):
  """One pytree of several of which each leaf has a value in one, and is None in the others."""
  return jax.tree.map(lambda *x: next((y for y in x if y is not None), None), *trees, is_leaf=lambda x: x is None)


def _repeated(tree, times):
  return jax.tree.map(lambda x: jnp.repeat(x[None], times, axis=0), tree)
