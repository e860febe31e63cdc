"""A network and a row of weights for each training class, learned together; new classes get a head fitted to them.

Joint multi-task training (Wang, Zhao & Li 2021) where the tasks are episodes, each of which is classified among its own
classes by their rows; a plain classifier over all training classes (Chen et al. 2019, Tian et al. 2020; the
pre-training of Meta-Transfer Learning, Sun et al. 2019) where they are batches, `config.data.batch`. There is no inner
loop, and training does not divide a task into support and query images.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from metajax import heads, losses, networks
from metajax.errors import UserError
from metajax.types import Algorithm


def make(
  model,
  *,
  way,
  num_classes,
  objective=losses.CLASSIFICATION,
  normalize=False,
  row_scale=0.0,
  bias=False,
  hidden=0,
  head='logistic_regression',
  head_c=1.0,
  batch_norm='running',
  batch_norm_momentum=0.9,
):
  """A classifier with a table of class rows.

  Args:
    model: a Flax module, inputs (n, ...) -> features (n, d). One that has `num_outputs` is taken without its head.
    way: classes of a training task; in evaluation, of an episode.
    num_classes: of the training split.
    objective: classification; there are no classes in regression.
    normalize: whether features have length 1 in front of the rows; in evaluation they have in any case.
    row_scale: rows are drawn uniformly up to so many times PyTorch's bound, 1 / sqrt(d). 0 for sqrt(num_classes / way),
      as in Wang et al.'s code; of many classes their rows are so long that they learn slowly.
    bias: whether each class has one, drawn up to PyTorch's bound.
    hidden: units of a layer with ReLU between features and rows, which evaluation leaves out; 0 for none.
    head: what evaluation fits to the normalised features of the support images, see `heads.make`.
    head_c: its c.
    batch_norm: 'running': in training each task's own statistics, in evaluation running averages. 'transductive' and
      'support' are about evaluation's episodes, see `networks.embedding`.
    batch_norm_momentum: how much of the running average stays at each meta-update; a meta-batch's tasks are averaged.

  Returns:
    Algorithm, whose params are {'embedding': the model's, 'head': {'rows': (num_classes, d), ...}}.

  Raises:
    UserError: an unknown batch-norm mode or head; regression; a setting out of its range.
  """
  networks.check_batch_norm(batch_norm)
  if objective is not losses.CLASSIFICATION:
    raise UserError('classifier needs classes: regression has none')
  if min(hidden, row_scale) < 0:
    raise UserError(f'hidden = {hidden}, row_scale = {row_scale}: neither can be negative')
  model = networks.without_head(model) or model
  embedding = networks.embedding(model, batch_norm, lambda params, _: params['embedding'])
  adapt, predict = heads.learner(heads.make(head, c=head_c), embedding, way)
  between = nn.Dense(hidden)

  def init(rng, inputs):
    rng_model, rng_hidden, rng_rows, rng_bias = jax.random.split(rng, 4)
    features, model_state = model.init_with_output(rng_model, inputs)
    model_state = dict(model_state)
    params = {'embedding': model_state.pop('params', {}), 'head': {}}
    if hidden:
      features, variables = between.init_with_output(rng_hidden, features)
      params['head']['hidden'] = variables['params']
    d = features.shape[-1]
    bound = math.sqrt(1 / d)
    rows = jax.random.uniform(rng_rows, (num_classes, d), minval=-bound, maxval=bound)
    params['head']['rows'] = (row_scale or math.sqrt(num_classes / way)) * rows
    if bias:
      params['head']['bias'] = jax.random.uniform(rng_bias, (num_classes,), minval=-bound, maxval=bound)
    return params, model_state

  def loss(params, model_state, episode, rng):
    (inputs, targets), class_ids, head = episode.query, episode.class_ids, params['head']
    features, state = networks.by_batch(model, params['embedding'], model_state, inputs, rng)
    if normalize:
      features = heads.unit(features)
    if hidden:
      features = nn.relu(between.apply({'params': head['hidden']}, features))
    outputs = jnp.matmul(features, head['rows'][class_ids].T, precision='highest')
    if bias:
      outputs += head['bias'][class_ids]
    momentum = batch_norm_momentum if batch_norm == 'running' else 1.0
    each = objective.losses(outputs, targets)
    return each, (networks.updated(model_state, state, momentum), objective.metrics(outputs, targets))

  return Algorithm(init, adapt, predict, loss, embedding=embedding, adopt=networks.adopt, episodic=False)
